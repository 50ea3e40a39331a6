"""What every storage promises, as tests to inherit.

A subclass provides the fixture `storage`: an empty storage whose directory exists, and `again`: a second
object for the same place, as another process would open it.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.errors import (
    AlreadyExistsError,
    DamagedError,
    HostilePathError,
    NotFoundError,
)
from engine.storage.base import WINDOW_BYTES, Entry, Storage
from engine.storage.source import BufferSource, Window
from tests.storage.buffers import padded, pattern, source

SEVERAL_WINDOWS = 2 * WINDOW_BYTES + 12_345
SIZES = (0, 1, 4095, 4096, 4097, WINDOW_BYTES, WINDOW_BYTES + 1, SEVERAL_WINDOWS)


def read_all(storage: Storage, path: str) -> bytes:
    with storage.open_reader(path) as reader:
        data = bytearray(reader.file_bytes)
        reader.read_into(0, memoryview(data))
    return bytes(data)


class StorageContract:
    """Tests that hold for every storage."""

    ODD_NAME = "b[1]*?"
    """A file's name that is a pattern to a shell and to fsspec."""

    # Listing

    def test_empty(self, storage: Storage) -> None:
        assert storage.list_dir() == []
        assert storage.list_tree() == {"": {}}

    def test_missing_directory_is_not_empty(self, storage: Storage) -> None:
        with pytest.raises(NotFoundError, match="nowhere"):
            storage.list_dir("nowhere")

    def test_list_dir(self, storage: Storage) -> None:
        storage.make_dir("step")
        storage.write_file("step/b", b"22")
        storage.write_file("step/a", b"1")
        storage.write_file("top", b"333")
        assert storage.list_dir() == [Entry("step", None, True), Entry("top", 3, False)]
        assert storage.list_dir("step") == [Entry("a", 1, False), Entry("b", 2, False)]

    def test_list_tree(self, storage: Storage) -> None:
        for name in ("one", "two", "two/deeper"):
            storage.make_dir(name)
        storage.write_file("top", b"1")
        storage.write_file("one/a", b"22")
        storage.write_file("two/b", b"")
        storage.write_file("two/deeper/c", b"4444")
        assert storage.list_tree() == {"": {"top": 1}, "one": {"a": 2}, "two": {"b": 0}}

    def test_what_another_writes_is_listed_at_once(self, storage: Storage, again: Storage) -> None:
        """No listing may be remembered."""
        storage.make_dir("step")
        storage.write_file("step/a", b"1")
        assert len(again.list_dir("step")) == 1
        storage.write_file("step/b", b"1")
        assert len(again.list_dir("step")) == 2
        assert again.list_tree()["step"] == {"a": 1, "b": 1}
        storage.delete_file("step/a")
        assert [entry.name for entry in again.list_dir("step")] == ["b"]
        assert again.exists("step/a") is False

    # Small files

    def test_size_and_exists(self, storage: Storage) -> None:
        storage.make_dir("step")
        storage.write_file("step/a", b"12345")
        assert storage.size("step/a") == 5
        assert storage.exists("step/a")
        assert storage.exists("step")
        assert not storage.exists("step/b")
        assert not storage.exists("elsewhere/b")
        for missing in ("step/b", "step"):
            with pytest.raises(NotFoundError, match=missing):
                storage.size(missing)

    def test_write_file_replaces(self, storage: Storage) -> None:
        storage.write_file("a", b"first and longer")
        storage.write_file("a", b"second")
        assert storage.read_bytes("a", max_bytes=100) == b"second"
        assert [entry.name for entry in storage.list_dir()] == ["a"]

    @pytest.mark.parametrize("size", [0, 1, 100_000])
    def test_read_bytes(self, storage: Storage, size: int) -> None:
        storage.write_file("a", pattern(size))
        assert storage.read_bytes("a", max_bytes=size) == pattern(size)

    def test_read_bytes_is_bounded(self, storage: Storage) -> None:
        storage.write_file("a", b"12345")
        with pytest.raises(DamagedError, match="4"):
            storage.read_bytes("a", max_bytes=4)

    def test_missing_file(self, storage: Storage) -> None:
        for read in (
            lambda: storage.read_bytes("nowhere", max_bytes=10),
            lambda: storage.open_reader("nowhere"),
            lambda: storage.size("nowhere"),
            lambda: storage.read_into("nowhere", 0, memoryview(bytearray(1))),
        ):
            with pytest.raises(NotFoundError, match="nowhere"):
                read()

    def test_errors_are_builtin_errors_too(self, storage: Storage) -> None:
        with pytest.raises(FileNotFoundError):
            storage.read_bytes("nowhere", max_bytes=10)

    # Publishing

    def test_publish(self, storage: Storage) -> None:
        storage.publish("a", b"one", exclusive=False)
        storage.publish("a", b"two", exclusive=False)
        assert storage.read_bytes("a", max_bytes=10) == b"two"

    def test_publish_exclusive(self, storage: Storage) -> None:
        storage.publish("a", b"one", exclusive=True)
        with pytest.raises(AlreadyExistsError, match="a"):
            storage.publish("a", b"two", exclusive=True)
        assert storage.read_bytes("a", max_bytes=10) == b"one"
        assert storage.list_tree() == {"": {"a": 3}}

    def test_publish_leaves_nothing_else(self, storage: Storage) -> None:
        storage.publish("a", b"one", exclusive=True)
        storage.publish("b", b"two", exclusive=False)
        assert storage.list_tree() == {"": {"a": 3, "b": 3}}

    def test_exclusive_publish_has_one_winner(self, storage: Storage, again: Storage) -> None:
        assert storage.supports_exclusive_create
        assert again.supports_exclusive_create
        callers = 12
        for round_number in range(5):
            name = f"lease-{round_number}"
            line = threading.Barrier(callers)

            def race(caller: int, name: str = name, line: threading.Barrier = line) -> int | None:
                mine = (storage, again)[caller % 2]
                line.wait()
                try:
                    mine.publish(name, str(caller).encode(), exclusive=True)
                except AlreadyExistsError:
                    return None
                return caller

            with ThreadPoolExecutor(callers) as pool:
                winners = [won for won in pool.map(race, range(callers)) if won is not None]
            assert len(winners) == 1
            assert storage.read_bytes(name, max_bytes=10) == str(winners[0]).encode()

    def test_probing_leaves_nothing(self, storage: Storage) -> None:
        assert storage.supports_exclusive_create
        assert storage.list_tree() == {"": {}}

    # Shards

    @pytest.mark.parametrize("size", SIZES)
    def test_write_shard(self, storage: Storage, size: int) -> None:
        data = pattern(size)
        storage.make_dir("step")
        stats = storage.write_shard("step/shard", source(data))
        assert stats.bytes == size == storage.size("step/shard")
        assert min(stats.write_secs, stats.fsync_secs) >= 0
        assert read_all(storage, "step/shard") == data

    def test_write_shard_of_any_buffer(self, storage: Storage) -> None:
        """Neither aligned nor padded: slower, not wrong."""
        data = pattern(WINDOW_BYTES + 4097)
        storage.write_shard("shard", BufferSource(memoryview(b"x" + data)[1:]))
        assert read_all(storage, "shard") == data

    def test_windows_cover_the_file_in_order(self, storage: Storage) -> None:
        seen: list[tuple[int, int]] = []
        storage.write_shard(
            "shard",
            source(pattern(SEVERAL_WINDOWS), lambda begin, end: seen.append((begin, end))),
        )
        assert seen[0][0] == 0
        assert seen[-1][1] == SEVERAL_WINDOWS
        assert all(before[1] == after[0] for before, after in itertools.pairwise(seen))
        assert all(begin % 65536 == 0 for begin, _ in seen)

    @pytest.mark.parametrize(
        ("fatal", "at_byte"),
        [
            (ValueError("mine"), 0),
            (OSError(28, "mine"), WINDOW_BYTES),
            (KeyboardInterrupt("mine"), 2 * WINDOW_BYTES),
        ],
    )
    def test_failed_write_publishes_nothing(
        self, storage: Storage, again: Storage, fatal: BaseException, at_byte: int
    ) -> None:
        def fail(begin: int, end: int) -> None:
            if begin == at_byte:
                raise fatal

        with pytest.raises(type(fatal), match="mine") as raised:
            storage.write_shard("shard", source(pattern(SEVERAL_WINDOWS), fail))
        assert raised.value is fatal
        assert not again.exists("shard")
        assert again.list_tree() == {"": {}}

    def test_a_source_that_ends_early_publishes_nothing(self, storage: Storage) -> None:
        class Short(BufferSource):
            def windows(self, window_bytes: int) -> Generator[Window]:
                yield next(super().windows(window_bytes))

        short = Short(padded(pattern(SEVERAL_WINDOWS)), SEVERAL_WINDOWS)
        with pytest.raises(ValueError, match="ended at byte"):
            storage.write_shard("shard", short)
        assert storage.list_tree() == {"": {}}

    def test_windows_out_of_turn_publish_nothing(self, storage: Storage) -> None:
        class Twice(BufferSource):
            def windows(self, window_bytes: int) -> Generator[Window]:
                first, _, last = super().windows(window_bytes)
                yield from (first, first, last)

        twice = Twice(padded(pattern(SEVERAL_WINDOWS)), SEVERAL_WINDOWS)
        with pytest.raises(ValueError, match="out of turn"):
            storage.write_shard("shard", twice)
        assert storage.list_tree() == {"": {}}

    def test_every_window_is_released_once_it_is_written(self, storage: Storage) -> None:
        """The source uses its memory again: a window that is released too early arrives as another one."""
        data, out, lock = pattern(7 * WINDOW_BYTES + 12_345), [0], threading.Lock()

        class Spoiling(BufferSource):
            def windows(self, window_bytes: int) -> Generator[Window]:
                for window in super().windows(window_bytes):
                    memory = padded(bytes(window.view))

                    def release(memory: memoryview = memory) -> None:
                        memory[:] = b"!" * len(memory)
                        with lock:
                            out[0] -= 1

                    with lock:
                        out[0] += 1
                    yield Window(window.begin, window.end, memory, release)

        storage.write_shard("shard", Spoiling(padded(data), len(data)))
        assert read_all(storage, "shard") == data
        assert out == [0]

    def test_a_shard_is_never_written_twice(self, storage: Storage) -> None:
        storage.write_shard("shard", source(b"one"))
        with pytest.raises(AlreadyExistsError, match="shard"):
            storage.write_shard("shard", source(b"two"))
        assert read_all(storage, "shard") == b"one"

    def test_more_bytes_than_the_buffer_holds(self, storage: Storage) -> None:
        with pytest.raises(ValueError, match="5000"):
            storage.write_shard("shard", BufferSource(padded(b"one"), 5000))
        assert not storage.exists("shard")

    # Reading ranges

    def test_read_ranges(self, storage: Storage) -> None:
        data = pattern(20 << 20)
        storage.write_shard("shard", source(data))
        with storage.open_reader("shard") as reader:
            assert reader.file_bytes == len(data)
            for offset, size in ((0, 1), (4096, 4096), (4097, 9 << 20), (len(data) - 5, 5), (100, 0)):
                target = bytearray(size)
                reader.read_into(offset, memoryview(target))
                assert target == data[offset : offset + size]

    def test_read_past_the_end(self, storage: Storage) -> None:
        storage.write_file("a", b"12345")
        with storage.open_reader("a") as reader:
            for offset, size in ((0, 6), (4, 2), (5, 1), (100, 1)):
                with pytest.raises(DamagedError, match="truncated"):
                    reader.read_into(offset, memoryview(bytearray(size)))

    def test_read_from_threads(self, storage: Storage) -> None:
        data = pattern(4 << 20)
        storage.write_shard("shard", source(data))
        with storage.open_reader("shard") as reader, ThreadPoolExecutor(8) as pool:

            def read(offset: int) -> bool:
                target = bytearray(100_000)
                reader.read_into(offset, memoryview(target))
                return target == data[offset : offset + 100_000]

            assert all(pool.map(read, range(0, 4_000_000, 100_000)))

    # Directories

    def test_make_dir_again(self, storage: Storage) -> None:
        storage.make_dir("a/b/c")
        storage.make_dir("a/b/c")
        storage.make_dir()
        storage.sync_dir("a")
        storage.sync_dir()
        storage.write_file("a/b/c/file", b"1")
        assert storage.size("a/b/c/file") == 1

    def test_rename(self, storage: Storage) -> None:
        storage.make_dir("step")
        storage.write_file("step/a", b"1")
        renamed = storage.rename("step", "dead-step")
        where = "dead-step" if renamed else "step"
        assert storage.list_tree() == {"": {}, where: {"a": 1}}

    def test_delete(self, storage: Storage) -> None:
        storage.make_dir("step/inner")
        for name in ("top", "step/a", "step/b[1]*?", "step/inner/c", "step-2"):
            storage.write_file(name, b"1")
        storage.delete_file("top")
        storage.delete_tree("step")
        assert storage.list_tree() == {"": {"step-2": 1}}
        assert not storage.exists("step")

    def test_delete_what_is_not_there(self, storage: Storage) -> None:
        storage.delete_file("nowhere")
        storage.delete_tree("nowhere")
        storage.delete_file("nowhere/inner")

    def test_clear_a_directory_of_what_is_ours(self, storage: Storage) -> None:
        storage.make_dir("step/inner")
        for name in ("step/a", f"step/{self.ODD_NAME}", "step/c", "step/inner/a", "step-2"):
            storage.write_file(name, b"1")
        cleared = storage.clear_dir("step", lambda name: name in ("a", self.ODD_NAME))
        assert (cleared.removed, cleared.gone) == (2, False)
        assert [name.partition("/")[0] for name in cleared.left] == ["c", "inner"]
        assert storage.clear_dir("step", lambda name: True).removed == 1
        assert storage.read_bytes("step/inner/a", max_bytes=1) == b"1", "whoever calls it ours"
        storage.delete_file("step/inner/a")
        assert storage.clear_dir("step", lambda name: True).gone
        assert storage.clear_dir("step", lambda name: True).removed == 0
        assert storage.list_tree() == {"": {"step-2": 1}}

    def test_versions(self, storage: Storage) -> None:
        storage.make_dir("step")
        storage.write_file("step/a", b"1")
        storage.write_file("step/b", b"1")
        before = storage.versions("step")
        assert set(before) == {"a", "b"}
        assert storage.versions("step") == before
        storage.write_file("step/a", b"22")
        after = storage.versions("step")
        assert after["b"] == before["b"]
        assert after["a"] != before["a"]
        with pytest.raises(NotFoundError):
            storage.versions("nowhere")

    # Hostile paths

    def test_hostile_paths(self, storage: Storage) -> None:
        for path in ("/etc/passwd", "../x", "a/../../x", "a//b", "a\0b", ".", "x/", "a\\b"):
            self.check_refused(storage, path)

    def check_refused(self, storage: Storage, path: str) -> None:
        buffer = memoryview(bytearray(1))
        for use in (
            lambda: storage.list_dir(path),
            lambda: storage.size(path),
            lambda: storage.exists(path),
            lambda: storage.read_bytes(path, max_bytes=1),
            lambda: storage.read_into(path, 0, buffer),
            lambda: storage.open_reader(path),
            lambda: storage.write_file(path, b""),
            lambda: storage.publish(path, b"", exclusive=False),
            lambda: storage.publish(path, b"", exclusive=True),
            lambda: storage.write_shard(path, source(b"1")),
            lambda: storage.make_dir(path),
            lambda: storage.delete_file(path),
            lambda: storage.delete_tree(path),
            lambda: storage.clear_dir(path, lambda name: True),
            lambda: storage.versions(path),
        ):
            with pytest.raises(HostilePathError):
                use()

    def test_describes_itself(self, storage: Storage) -> None:
        assert storage.uri
        assert "\n" not in storage.durability
        free = storage.free_bytes()
        assert free is None or free > 0
