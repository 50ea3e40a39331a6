"""Reading ranges: from the page cache, past it, and where the file system knows neither."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.errors import DamagedError, StorageError
from engine.format.digest import block_digests
from engine.native import kernels
from engine.native.kernels import place_of
from engine.storage import reading
from engine.storage.local import LocalStorage
from engine.storage.residency import in_page_cache
from tests.storage.buffers import pattern

SIZE = 3 * reading.LEAST_DIRECT_BYTES + 1234
DATA = pattern(SIZE)


class Calls:
    """Stands in for os.preadv: notes (direct, flags) of each call, and answers as told."""

    def __init__(self, cached_bytes: int, refuse: frozenset[str] = frozenset()) -> None:
        self.cached_bytes = cached_bytes
        self.refuse = refuse
        self.seen: list[str] = []

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        kind = "direct" if is_direct(fd) else "cached" if flags & os.RWF_NOWAIT else "plain"
        self.seen.append(kind)
        if kind in self.refuse:
            raise OSError(errno.EOPNOTSUPP, "no")
        (view,) = buffers
        if kind == "cached":
            if offset >= self.cached_bytes:
                raise BlockingIOError(errno.EAGAIN, "not cached")
            view = view[: self.cached_bytes - offset]
        if kind == "direct":
            assert offset % 4096 == len(view) % 4096 == 0
        found = DATA[offset : offset + len(view)]
        view[: len(found)] = found
        return len(found)


def is_direct(fd: int) -> bool:
    flags = Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
    return bool(int(flags, 8) & os.O_DIRECT)


def aligned(length: int) -> memoryview:
    return memoryview(mmap.mmap(-1, length))


ROOM = aligned(SIZE)
"""For reads that fail."""


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    (tmp_path / "shard").write_bytes(DATA)
    return LocalStorage(tmp_path)


@pytest.mark.parametrize(
    ("cached_bytes", "refuse", "expected"),
    [
        (SIZE, frozenset(), ["cached", "plain"]),
        (0, frozenset(), ["cached", "direct", "plain"]),
        (8192, frozenset(), ["cached", "cached", "direct", "plain"]),
        (0, frozenset({"cached"}), ["cached", "plain"]),
        (0, frozenset({"direct"}), ["cached", "direct", "plain"]),
    ],
    ids=["warm", "cold", "partly cold", "no RWF_NOWAIT", "no O_DIRECT"],
)
def test_large_reads_take_what_is_cached_and_read_the_rest_direct(
    storage: LocalStorage,
    monkeypatch: pytest.MonkeyPatch,
    cached_bytes: int,
    refuse: frozenset[str],
    expected: list[str],
) -> None:
    calls = Calls(cached_bytes, refuse)
    view = aligned(SIZE)
    with storage.open_reader("shard") as reader:
        monkeypatch.setattr(os, "preadv", calls)
        monkeypatch.setattr(reading, "in_page_cache", lambda fd, offset, length: None)
        reader.read_into(0, view)
    assert bytes(view) == DATA
    assert calls.seen == expected


@pytest.mark.parametrize(
    ("offset", "skip", "length"),
    [(0, 0, 4096), (1, 0, SIZE - 1), (4096, 8, SIZE - 4096)],
    ids=["small", "odd offset", "odd address"],
)
def test_what_direct_reads_cannot_do_goes_through_the_cache(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, offset: int, skip: int, length: int
) -> None:
    calls = Calls(0)
    view = aligned(SIZE + 4096)[skip : skip + length]
    with storage.open_reader("shard") as reader:
        monkeypatch.setattr(os, "preadv", calls)
        reader.read_into(offset, view)
    assert bytes(view) == DATA[offset : offset + length]
    assert calls.seen == ["plain"]


def test_what_is_known_to_be_cold_is_only_read_direct(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(0)
    with storage.open_reader("shard") as reader:
        monkeypatch.setattr(os, "preadv", calls)
        monkeypatch.setattr(reading, "in_page_cache", lambda fd, offset, length: False)
        view = aligned(SIZE)
        reader.read_into(0, view)
        assert reader.read_cached(0, [place_of(ROOM[:4096])], 4096) == (0, b"")
    assert bytes(view) == DATA
    assert calls.seen == ["direct", "plain"], "a request that a miss answers makes the kernel read ahead"


@pytest.fixture(params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled loops and without."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "library", None)
    return str(request.param)


@pytest.mark.parametrize(
    ("offset", "sizes"),
    [
        (100, (5000, 3000)),
        (0, (SIZE,)),
        (4096, (1, 0, 4095, 8192, 100_000, 7)),
        (0, (4096,) * (SIZE // 4096)),
    ],
)
def test_what_is_at_hand_fills_views_one_after_the_other(
    storage: LocalStorage, loops: str, offset: int, sizes: tuple[int, ...]
) -> None:
    views = [aligned(size + 1)[:size] for size in sizes]
    end = offset + sum(sizes)
    with storage.open_reader("shard") as reader:
        count, digests = reader.read_cached(offset, list(map(place_of, views)), 4096)
    assert count == sum(sizes)
    assert b"".join(views) == DATA[offset:end]
    assert digests == block_digests(DATA[offset:end], 4096)


def test_a_file_that_ends_is_at_hand_in_part(
    storage: LocalStorage, loops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "in_page_cache", lambda fd, offset, length: None)
    view = aligned(SIZE + 4096)
    with storage.open_reader("shard") as reader:
        count, digests = reader.read_cached(0, [place_of(view)], 4096)
    assert 0 <= count < len(view)
    assert bytes(view[:count]) == DATA[:count]
    assert digests == block_digests(DATA[:count], 4096)


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EINTR, errno.EOPNOTSUPP])
def test_nothing_is_at_hand(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: object) -> int:
        raise OSError(error, "no")

    monkeypatch.setattr(kernels, "library", None)
    with storage.open_reader("shard") as reader:
        monkeypatch.setattr(os, "preadv", refuse)
        assert reader.read_cached(0, [place_of(ROOM[:4096])], 4096) == (0, b"")


@pytest.mark.skipif(kernels.library is None, reason="nothing is compiled")
def test_blocks_that_the_compiled_loop_has_no_room_for_are_not_at_hand(storage: LocalStorage) -> None:
    with storage.open_reader("shard") as reader:
        assert reader.read_cached(0, [place_of(ROOM)], 1 << 20) == (0, b"")


def test_a_file_that_cannot_be_read_is_an_error(
    tmp_path: Path, loops: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "in_page_cache", lambda fd, offset, length: None)
    write_only = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
    with (
        reading.LocalReader(write_only, 4096, "the file") as reader,
        pytest.raises(StorageError, match="file"),
    ):
        reader.read_cached(0, [place_of(ROOM[:4096])], 4096)


def test_the_kernel_tells_what_is_cached(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    with open(tmp_path / "file", "rb") as file:
        assert file.read() == DATA
        fd = file.fileno()
        assert in_page_cache(fd, 0, SIZE) in (True, None)
        assert in_page_cache(fd, 5000, 100_000) in (True, None)
        # There are no pages behind the end.
        assert in_page_cache(fd, 0, SIZE + 3 * mmap.PAGESIZE) in (False, None)
        assert in_page_cache(fd, SIZE, 0) is True
    assert in_page_cache(-1, 0, SIZE) is None


@pytest.mark.parametrize("warm", [True, False])
def test_the_real_file_reads_the_same_warm_and_cold(
    storage: LocalStorage, tmp_path: Path, warm: bool
) -> None:
    fd = os.open(tmp_path / "shard", os.O_RDONLY)
    os.fsync(fd)
    if not warm:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    view = aligned(SIZE)
    with storage.open_reader("shard") as reader:
        (tmp_path / "shard").unlink()
        reader.read_into(0, view)
    assert bytes(view) == DATA


def test_a_truncated_file_is_damage_also_when_read_direct(storage: LocalStorage) -> None:
    view = aligned(SIZE + 8192)
    with storage.open_reader("shard") as reader, pytest.raises(DamagedError, match=f"ends at byte {SIZE}"):
        reader.read_into(0, view)


def test_both_descriptors_are_closed(storage: LocalStorage) -> None:
    before = set(os.listdir("/proc/self/fd"))
    reader = storage.open_reader("shard")
    reader.close()
    reader.close()
    assert set(os.listdir("/proc/self/fd")) <= before
