"""What the remote storage does when the store misbehaves, on memory:// with faults put in."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from engine.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)
from engine.storage import ranged
from engine.storage.base import WINDOW_BYTES
from engine.storage.remote import FsspecStorage
from engine.storage.retry import Retry
from tests.storage.buffers import pattern, source


@pytest.fixture
def storage() -> FsspecStorage:
    options = {"skip_instance_cache": True}
    return FsspecStorage(f"memory://{uuid.uuid4()}/run", options, retry=Retry(sleep=lambda _: None))


def failing(
    monkeypatch: pytest.MonkeyPatch,
    storage: FsspecStorage,
    name: str,
    *errors: Exception,
    after: bool = False,
) -> list[int]:
    """Make the file system's method fail with these errors in turn, then work; `after` it took effect."""
    real: Callable[..., Any] = getattr(storage._fs, name)
    calls: list[int] = []

    def method(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) <= len(errors):
            if after:
                real(*args, **kwargs)
            raise errors[len(calls) - 1]
        return real(*args, **kwargs)

    monkeypatch.setattr(storage._fs, name, method)
    return calls


TRANSIENT = (ConnectionResetError("reset"), TimeoutError("slow"), OSError(16, "503"))


@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("ls", lambda s: s.list_dir()),
        ("find", lambda s: s.list_tree()),
        ("info", lambda s: s.size("a")),
        ("info", lambda s: s.exists("a")),
        ("cat_file", lambda s: s.read_bytes("a", max_bytes=10)),
        ("cat_file", lambda s: s.read_into("a", 0, memoryview(bytearray(3)))),
        ("pipe_file", lambda s: s.write_file("b", b"1")),
        ("pipe_file", lambda s: s.publish("b", b"1", exclusive=False)),
        ("pipe_file", lambda s: s.publish("b", b"1", exclusive=True)),
        ("pipe_file", lambda s: s.write_shard("b", source(b"1"))),
        ("rm_file", lambda s: s.delete_file("a")),
        ("rm", lambda s: s.delete_tree("step")),
    ],
)
def test_every_operation_is_tried_again(
    storage: FsspecStorage,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    use: Callable[[FsspecStorage], object],
) -> None:
    storage.write_file("a", b"123")
    storage.write_file("step/x", b"123")
    calls = failing(monkeypatch, storage, method, *TRANSIENT)
    use(storage)
    assert len(calls) > len(TRANSIENT)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError("403"), StorageDeniedError),
        (OSError(28, "quota"), StorageFullError),
        (FileNotFoundError("404"), NotFoundError),
    ],
)
def test_what_is_not_transient_is_tried_once(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[StorageError]
) -> None:
    calls = failing(monkeypatch, storage, "pipe_file", *[error] * 10)
    with pytest.raises(kind):
        storage.write_file("a", b"1")
    assert len(calls) == 1


def test_exclusive_publish_whose_answer_was_lost(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try finds the object there, and it is ours."""
    assert storage.supports_exclusive_create
    failing(monkeypatch, storage, "pipe_file", ConnectionResetError("reset"), after=True)
    storage.publish("manifest.json", b"mine", exclusive=True)
    assert storage.read_bytes("manifest.json", max_bytes=10) == b"mine"


def test_exclusive_publish_that_another_won_during_an_outage(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage.supports_exclusive_create
    storage.write_file("manifest.json", b"theirs")
    failing(monkeypatch, storage, "pipe_file", ConnectionResetError("reset"))
    with pytest.raises(AlreadyExistsError):
        storage.publish("manifest.json", b"mine", exclusive=True)
    assert storage.read_bytes("manifest.json", max_bytes=10) == b"theirs"


def test_store_that_ignores_the_precondition(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    real = storage._fs.pipe_file
    monkeypatch.setattr(storage._fs, "pipe_file", lambda path, data, mode="": real(path, data))
    assert storage.supports_exclusive_create is False
    storage.publish("a", b"1", exclusive=True)
    with pytest.raises(AlreadyExistsError):
        storage.publish("a", b"2", exclusive=True)
    assert storage.list_tree() == {"": {"a": 1}}


@pytest.mark.parametrize("answer", [TypeError("unexpected keyword 'mode'"), OSError(38, "not implemented")])
def test_store_that_does_not_know_the_precondition(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch, answer: Exception
) -> None:
    failing(monkeypatch, storage, "pipe_file", answer)
    assert storage.supports_exclusive_create is False


@pytest.mark.parametrize(
    ("answer", "kind"),
    [(PermissionError("403"), StorageDeniedError), (OSError(28, "quota"), StorageFullError)],
)
def test_probe_that_fails_is_not_an_answer(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch, answer: Exception, kind: type[StorageError]
) -> None:
    failing(monkeypatch, storage, "pipe_file", answer)
    with pytest.raises(kind):
        assert storage.supports_exclusive_create
    assert storage.supports_exclusive_create is True


@pytest.mark.parametrize(("honoured", "said"), [(True, "honours"), (False, "does not honour")])
def test_probe_runs_once_and_says_what_it_found(
    storage: FsspecStorage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    honoured: bool,
    said: str,
) -> None:
    if not honoured:
        real = storage._fs.pipe_file
        monkeypatch.setattr(storage._fs, "pipe_file", lambda path, data, mode="": real(path, data))
    calls = failing(monkeypatch, storage, "pipe_file")
    with caplog.at_level("INFO", "engine.storage.remote"):
        assert storage.supports_exclusive_create is honoured
        assert storage.supports_exclusive_create is honoured
    assert len(calls) == 2
    assert caplog.messages == [f"{storage.uri} {said} the precondition that an object does not exist"]


def test_client_that_remembers_listings(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems keep a cache of their own, whatever they are told."""
    remembered: dict[tuple[str, str], Any] = {}

    def caching(name: str) -> Callable[..., Any]:
        real = getattr(storage._fs, name)

        def cached(path: str, **options: Any) -> Any:
            if (name, path) not in remembered:
                remembered[name, path] = real(path, **options)
            return remembered[name, path]

        return cached

    for name in ("ls", "find", "info"):
        monkeypatch.setattr(storage._fs, name, caching(name))
    monkeypatch.setattr(storage._fs, "invalidate_cache", lambda *_: remembered.clear())
    for size in (1, 2):
        storage.write_file("a", b"x" * size)
        assert storage.list_dir()[0].bytes == size
        assert storage.list_tree() == {"": {"a": size}}
        assert storage.size("a") == size
    storage.delete_file("a")
    assert not storage.exists("a")


def test_memory_creation_is_one_step(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's memory:// looks whether the name is free, and then takes it: nobody may come in between."""
    assert storage.supports_exclusive_create
    real = storage._fs.pipe_file
    met = threading.Barrier(2)

    def pipe_file(*args: Any, **options: Any) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(0.2)
            pytest.fail("two callers create at the same time")
        real(*args, **options)

    monkeypatch.setattr(storage._fs, "pipe_file", pipe_file)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(storage.publish, name, b"1", exclusive=True) for name in "ab"]:
            done.result()


def test_too_large_to_appear_at_once(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.storage.remote.MAX_PUT_BYTES", 10)
    with pytest.raises(StorageError, match="11 bytes"):
        storage.publish("a", b"x" * 11, exclusive=True)


def test_upload_that_arrives_short_is_removed(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Success reported, bytes lost."""
    real = storage._fs.pipe_file
    monkeypatch.setattr(storage._fs, "pipe_file", lambda path, data: real(path, data[:-1]))
    with pytest.raises(StorageError, match="of 5000 bytes 4999 arrived"):
        storage.write_shard("shard", source(b"x" * 5000))
    assert not storage.exists("shard")


def test_read_that_comes_short(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_file("shard", b"12345")
    monkeypatch.setattr(storage._fs, "cat_file", lambda *_, **__: b"1234")
    with pytest.raises(DamagedError, match="truncated"):
        storage.read_into("shard", 0, memoryview(bytearray(5)))


def test_reads_are_split_and_bounded(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each read in flight is a copy in memory."""
    real, lock = storage._fs.cat_file, threading.Lock()
    asked: list[int] = []
    now, most = 0, 0

    def cat_file(path: str, start: int, end: int) -> Any:
        nonlocal now, most
        with lock:
            asked.append(end - start)
            now += 1
            most = max(most, now)
        try:
            return real(path, start=start, end=end)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(storage._fs, "cat_file", cat_file)
    data = pattern(5 * ranged.PART_BYTES + 999)
    storage.write_file("shard", data)
    target = bytearray(len(data) - 123)
    storage.read_into("shard", 123, memoryview(target))
    assert target == data[123:]
    assert sorted(asked) == [876, *[ranged.PART_BYTES] * 5]
    assert most * ranged.PART_BYTES <= 32 << 20


def test_a_read_that_fails_stops_the_others(storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pattern(12 * ranged.PART_BYTES)
    storage.write_file("shard", data)
    reader = storage.open_reader("shard")
    tried: list[int] = []

    def cat_file(path: str, start: int, end: int) -> Any:
        tried.append(start)
        raise PermissionError("403")

    monkeypatch.setattr(storage._fs, "cat_file", cat_file)
    with pytest.raises(StorageDeniedError):
        reader.read_into(0, memoryview(bytearray(len(data))))
    assert len(tried) < 12


def test_delete_that_reports_success_and_deletes_nothing(
    storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bulk delete answers 200, with the refusals inside."""
    storage.write_file("step/a", b"1")
    monkeypatch.setattr(storage._fs, "rm", lambda paths: None)
    with pytest.raises(StorageError, match="1 objects are left, such as 'a'"):
        storage.delete_tree("step")


def test_options_that_the_client_refuses() -> None:
    class Choosy(MemoryFileSystem):
        protocol = "choosy"

        def __init__(self, *, known: str = "", **kwargs: object) -> None:
            if "unknown" in kwargs:
                raise TypeError("got an unexpected keyword argument 'unknown'")
            super().__init__()

    fsspec.register_implementation("choosy", Choosy, clobber=True)
    with pytest.raises(ConfigError, match="unknown"):
        FsspecStorage("choosy://x", {"unknown": "1"})


class TestRealDirectoriesBehindAProtocol:
    """Protocols like SFTP: directories exist, a put is not atomic, and fsspec's find() hides failures."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> FsspecStorage:
        class Sftp(DirFileSystem):
            protocol = "fakesftp"

            def __init__(self, **options: object) -> None:
                super().__init__(path=str(tmp_path), fs=LocalFileSystem(), skip_instance_cache=True)

            @classmethod
            def _strip_protocol(cls, path: str) -> str:
                return path.removeprefix("fakesftp://").strip("/")

        fsspec.register_implementation("fakesftp", Sftp, clobber=True)
        storage = FsspecStorage("fakesftp://run", {}, retry=Retry(sleep=lambda _: None))
        storage.make_dir()
        return storage

    def test_publish_through_a_temporary_name(
        self, storage: FsspecStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage.make_dir("step")
        storage.publish("step/manifest.json", b"{}", exclusive=False)
        assert storage.list_tree() == {"": {}, "step": {"manifest.json": 2}}
        failing(monkeypatch, storage, "mv", OSError(28, "full"))
        with pytest.raises(StorageFullError):
            storage.publish("step/manifest.json", b"{ }", exclusive=False)
        assert (tmp_path / "run/step/manifest.json").read_bytes() == b"{}"
        assert storage.list_tree() == {"": {}, "step": {"manifest.json": 2}}

    def test_a_listing_that_fails_half_way_fails(
        self, storage: FsspecStorage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for step in ("one", "two"):
            storage.make_dir(step)
            storage.write_file(f"{step}/a", b"1")
        real = storage._fs.ls

        def ls(path: str, **options: Any) -> Any:
            if path.endswith("two"):
                raise ConnectionResetError("reset")
            return real(path, **options)

        monkeypatch.setattr(storage._fs, "ls", ls)
        with pytest.raises(StorageUnavailableError):
            storage.list_tree()

    def test_missing_root_is_not_empty(self, storage: FsspecStorage) -> None:
        with pytest.raises(NotFoundError):
            FsspecStorage("fakesftp://elsewhere", {}).list_dir()

    def test_a_shard_is_written_piece_by_piece_under_a_temporary_name(
        self, storage: FsspecStorage, tmp_path: Path
    ) -> None:
        """No second copy in memory, and nothing under its name before it is whole."""
        size = 2 * WINDOW_BYTES + 5
        seen: list[list[str]] = []

        def look(begin: int, end: int) -> None:
            seen.append([file.name for file in (tmp_path / "run").iterdir()])

        storage.write_shard("shard", source(pattern(size), look))
        assert len(seen) == 3
        assert all(len(names) == 1 and names[0].endswith(".tmp") for names in seen)
        assert (tmp_path / "run/shard").read_bytes() == pattern(size)

    def test_a_shard_that_fails_leaves_nothing(self, storage: FsspecStorage) -> None:
        size = 2 * WINDOW_BYTES + 5

        def fail(begin: int, end: int) -> None:
            if begin:
                raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            storage.write_shard("shard", source(pattern(size), fail))
        assert storage.list_tree() == {"": {}}

    def test_delete_tree(self, storage: FsspecStorage) -> None:
        storage.make_dir("step/inner")
        storage.write_file("step/inner/a", b"1")
        storage.delete_tree("step")
        storage.delete_tree("step")
        assert not storage.exists("step")
