"""The write loop of shards: direct, fallen back to buffered, short, interrupted, failing."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Generator
from pathlib import Path

import pytest

from engine.errors import (
    AlreadyExistsError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
)
from engine.storage.base import WINDOW_BYTES
from engine.storage.local import LocalStorage
from engine.storage.source import BufferSource, Window, spans
from engine.storage.system import SYNC_WRITE, System
from tests.storage.buffers import padded, pattern, source
from tests.storage.systems import FailsAt, NoDirect, ScriptedWrites, StrictDirect

SIZE = 2 * WINDOW_BYTES + 12_345
ROUNDED = 2 * WINDOW_BYTES + 16_384
DATA = pattern(SIZE)


def write(tmp_path: Path, system: System, data: bytes = DATA) -> str:
    stats = LocalStorage(tmp_path, system=system).write_shard("shard", source(data))
    written = (tmp_path / "shard").read_bytes()
    assert len(written) == len(data)
    assert written == data
    return stats.method


def nothing_left(tmp_path: Path) -> bool:
    return list(tmp_path.iterdir()) == []


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_direct_writes_whole_sectors_only(tmp_path: Path) -> None:
    system = StrictDirect()
    assert write(tmp_path, system) == "direct"
    assert (system.direct_bytes, system.buffered_bytes) == (ROUNDED, 0)


def test_the_real_file_system(tmp_path: Path) -> None:
    assert write(tmp_path, System()) in ("direct", "buffered")


def test_direct_flag_is_really_set(tmp_path: Path) -> None:
    """Against a file system that has it; the flag must be gone again where the fallback writes."""
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    import fcntl

    try:
        System().set_direct(fd, True)
    except OSError:
        pytest.skip("the temporary directory's file system has no O_DIRECT")
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    with pytest.raises(OSError, match="Invalid"):
        os.pwrite(fd, b"odd", 1)
    System().set_direct(fd, False)
    assert not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    assert os.pwrite(fd, b"odd", 1) == 3
    os.close(fd)


def test_fallback_where_the_flag_is_refused(tmp_path: Path) -> None:
    assert write(tmp_path, NoDirect()) == "buffered"


@pytest.mark.parametrize("refuse_at", [0, WINDOW_BYTES, 2 * WINDOW_BYTES])
def test_fallback_where_the_first_direct_write_is_refused(tmp_path: Path, refuse_at: int) -> None:
    system = StrictDirect(refuse_at)
    assert write(tmp_path, system) == "buffered"
    assert (system.direct_bytes, system.buffered_bytes) == (refuse_at, SIZE - refuse_at)


def test_a_file_system_that_refuses_direct_writes_is_not_asked_for_each_window(tmp_path: Path) -> None:
    refused = []

    class Refusing(StrictDirect):
        def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
            if fd in self.direct:
                refused.append(offset)
            return super().pwrite(fd, view, offset)

    assert write(tmp_path, Refusing(refuse_at=0), pattern(7 * WINDOW_BYTES)) == "buffered"
    assert len(refused) <= System.write_threads + 1, "those that were under way"


def test_tail_without_padding_is_written_buffered(tmp_path: Path) -> None:
    system = StrictDirect()
    whole = BufferSource(padded(DATA)[:SIZE])
    LocalStorage(tmp_path, system=system).write_shard("shard", whole)
    assert (tmp_path / "shard").read_bytes() == DATA
    assert system.buffered_bytes == SIZE % 4096


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("piece", [4096, 100_000, 5 << 20])
def test_short_writes(tmp_path: Path, direct: bool, piece: int) -> None:
    """Each call writes at most `piece` bytes; of a direct one, possibly not whole sectors."""
    system = ScriptedWrites(lambda _, size: min(size, piece), direct=direct)
    data = pattern(WINDOW_BYTES + 12_345) if piece == 4096 else DATA
    write(tmp_path, system, data)
    assert system.calls >= len(data) // piece


def test_short_direct_write_at_odd_length_goes_on_buffered(tmp_path: Path) -> None:
    system = ScriptedWrites(lambda call, _: 10_000 if call == 0 else None)
    assert write(tmp_path, system) == "buffered"
    assert system.buffered_bytes == WINDOW_BYTES - 8192


@pytest.mark.parametrize("direct", [True, False])
def test_interrupted_writes_are_repeated(tmp_path: Path, direct: bool) -> None:
    system = ScriptedWrites(
        lambda call, _: InterruptedError(errno.EINTR, "signal") if call % 2 == 0 else None, direct=direct
    )
    assert write(tmp_path, system) == ("direct" if direct else "buffered")
    assert system.calls == 6


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("nth", [0, 1, 2])
@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (errno.ENOSPC, StorageFullError, "disk is full"),
        (errno.EDQUOT, StorageFullError, "quota"),
        (errno.EIO, StorageError, "input/output error"),
        (errno.EROFS, StorageDeniedError, "read-only"),
    ],
)
def test_failing_write_leaves_nothing(
    tmp_path: Path, direct: bool, nth: int, code: int, kind: type[StorageError], words: str
) -> None:
    before = open_descriptors()
    system = ScriptedWrites(lambda call, _: OSError(code, "bad") if call == nth else None, direct=direct)
    with pytest.raises(kind, match=words) as raised:
        write(tmp_path, system)
    assert raised.value.errno == code
    assert str(tmp_path / "shard") in str(raised.value)
    assert nothing_left(tmp_path)
    assert open_descriptors() == before


@pytest.mark.parametrize("direct", [True, False])
def test_disk_that_fills_up_in_the_middle_of_a_write(tmp_path: Path, direct: bool) -> None:
    """The kernel answers with a short write first, and with ENOSPC only when asked again."""

    def fill(call: int, size: int) -> int | OSError | None:
        return (None, 12_000)[call] if call < 2 else OSError(errno.ENOSPC, "full")

    with pytest.raises(StorageFullError):
        write(tmp_path, ScriptedWrites(fill, direct=direct))
    assert nothing_left(tmp_path)


def test_a_disk_that_writes_nothing_does_not_hang(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="input/output"):
        write(tmp_path, ScriptedWrites(lambda *_: 0))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("call", ["fallocate", "ftruncate", "fsync", "close", "set_direct"])
def test_failing_call_leaves_nothing(tmp_path: Path, call: str) -> None:
    with pytest.raises(StorageFullError, match="shard"):
        write(tmp_path, FailsAt(call, errno.ENOSPC))
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("call", ["sync_range", "drop_cache"])
def test_failing_write_back_leaves_nothing(tmp_path: Path, call: str) -> None:
    class Buffered(FailsAt, NoDirect):
        pass

    with pytest.raises(StorageError, match="shard"):
        write(tmp_path, Buffered(call, errno.EIO))
    assert nothing_left(tmp_path)


def test_buffered_windows_are_flushed_as_they_go(tmp_path: Path) -> None:
    """At most two windows are dirty at any time, and none stays in the page cache."""
    events: list[tuple[str, int]] = []

    class Watching(NoDirect):
        def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
            events.append(("write", offset))
            return super().pwrite(fd, view, offset)

        def sync_range(self, fd: int, begin: int, size: int, how: int) -> None:
            events.append(("start" if how == SYNC_WRITE else "wait", begin))
            super().sync_range(fd, begin, size, how)

        def drop_cache(self, fd: int, begin: int, size: int) -> None:
            events.append(("drop", begin))
            super().drop_cache(fd, begin, size)

        def fsync(self, fd: int) -> None:
            events.append(("fsync", 0))
            super().fsync(fd)

    assert write(tmp_path, Watching()) == "buffered"
    first, second, third = 0, WINDOW_BYTES, 2 * WINDOW_BYTES
    assert events == [
        ("write", first),
        ("start", first),
        ("write", second),
        ("start", second),
        ("wait", first),
        ("drop", first),
        ("write", third),
        ("start", third),
        ("wait", second),
        ("drop", second),
        ("fsync", 0),
        ("drop", 0),
    ]


def test_nothing_more_is_written_after_a_failure(tmp_path: Path) -> None:
    """The other windows wait in a queue: a full disk is not to be asked again for each of them."""
    seen: list[int] = []

    class OneThread(StrictDirect):
        write_threads = 1

    def fail(begin: int, end: int) -> None:
        seen.append(begin)
        raise ValueError("mine")

    system = OneThread()
    with pytest.raises(ValueError, match="mine"):
        LocalStorage(tmp_path, system=system).write_shard("shard", source(DATA, fail))
    assert seen == [0]
    assert system.direct_bytes == 0


def test_failure_to_create(tmp_path: Path) -> None:
    with pytest.raises(StorageDeniedError, match="no permission"):
        write(tmp_path, FailsAt("create", errno.EACCES))


def test_existing_file_survives(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(b"older")
    with pytest.raises(AlreadyExistsError):
        write(tmp_path, System())
    assert (tmp_path / "shard").read_bytes() == b"older"


def test_a_failed_close_is_not_repeated(tmp_path: Path) -> None:
    """After close has failed the descriptor may already be another thread's file."""
    closed: list[int] = []

    class FailingClose(System):
        def close(self, fd: int) -> None:
            closed.append(fd)
            super().close(fd)
            raise OSError(errno.EIO, "close")

    with pytest.raises(StorageError):
        write(tmp_path, FailingClose())
    assert len(closed) == 1


def test_the_next_window_is_prepared_while_others_are_written(tmp_path: Path) -> None:
    """One after the other they would add up, a fifth of the time."""
    third_is_prepared = threading.Event()

    class Waiting(StrictDirect):
        def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
            assert third_is_prepared.wait(30)
            return super().pwrite(fd, view, offset)

    def prepare(begin: int, end: int) -> None:
        if begin == 2 * WINDOW_BYTES:
            third_is_prepared.set()

    LocalStorage(tmp_path, system=Waiting()).write_shard("shard", source(DATA, prepare))
    assert (tmp_path / "shard").read_bytes() == DATA


@pytest.mark.parametrize("direct", [True, False])
def test_few_windows_are_out_at_once(tmp_path: Path, direct: bool) -> None:
    """Else a conversion would hold the whole file in memory before a slow disk."""
    out, most, lock = 0, 0, threading.Lock()

    def release() -> None:
        nonlocal out
        with lock:
            out -= 1

    class Counting(BufferSource):
        def windows(self, window_bytes: int) -> Generator[Window]:
            nonlocal out, most
            for window in super().windows(window_bytes):
                with lock:
                    out += 1
                    most = max(most, out)
                yield Window(window.begin, window.end, window.memory, release)

    data = pattern(6 * WINDOW_BYTES + 12_345)
    system = StrictDirect() if direct else NoDirect()
    LocalStorage(tmp_path, system=system).write_shard("shard", Counting(padded(data), len(data)))
    assert most <= (System.write_threads + 1 if direct else 1)
    assert out == 0


def test_a_source_is_closed_when_the_write_fails(tmp_path: Path) -> None:
    """What it does beside its windows ends before the caller takes its memory back."""
    closed: list[bool] = []

    class Closing(BufferSource):
        def windows(self, window_bytes: int) -> Generator[Window]:
            try:
                yield from super().windows(window_bytes)
            except GeneratorExit:
                closed.append(True)
                raise

    system = ScriptedWrites(lambda call, _: OSError(errno.EIO, "bad"))
    try:
        LocalStorage(tmp_path, system=system).write_shard("shard", Closing(padded(DATA), SIZE))
    except StorageError:
        assert closed == [True]
    else:
        raise AssertionError("the write succeeded")


@pytest.mark.parametrize(
    ("total", "window", "expected"),
    [
        (0, 10, []),
        (1, 10, [(0, 1)]),
        (10, 10, [(0, 10)]),
        (11, 10, [(0, 10), (10, 11)]),
        (30, 10, [(0, 10), (10, 20), (20, 30)]),
    ],
)
def test_windows(total: int, window: int, expected: list[tuple[int, int]]) -> None:
    assert spans(total, window) == expected
