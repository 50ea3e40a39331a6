"""A shard file as memory that `Storage.write_shard` can write from, without being held in memory.

A store uploads from memory, in parts, and may send a part again after a failure: what it was shown must stay
readable until the whole file is written. So the memory is a mapped file: the checkpoint's own where it is
local, a nameless scratch file where it comes out of a store. The kernel may take its pages back at any time,
and we give them back behind the writing. Every range is read and compared with its digests right before it
goes out, by an ordinary read, which reports errors and truncation as exceptions and leaves the GIL alone.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from engine.errors import DamagedError
from engine.format.digest import BLOCK_BYTES, first_bad_block
from engine.format.index import ShardFile
from engine.storage.base import OnWindow, Reader, Storage
from engine.storage.os_failures import mapped

SMALL_BYTES = 32 << 20
"""A file up to this size is read into memory as a whole."""

DIGEST_BYTES_AT_ONCE = 1 << 20
"""Digesting holds the GIL; in between it is given away, since training asks for it at every operation."""

KEPT_WINDOWS = 6
"""Windows of a mapped file that stay in memory behind the newest: a store sends that many at once. What is
needed later, for another try, is read from the disk again."""

LOCAL_READ_BYTES = 8 << 20
"""How much is read at a time from a disk."""

STORE_READ_BYTES = 32 << 20
"""How much is read at a time from a store: in several requests, side by side."""

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Contents:
    """`view` is what to hand to `write_shard`, `on_window` what to hand to it beside."""

    view: memoryview
    on_window: OnWindow


@contextmanager
def shard_contents(
    storage: Storage,
    path: str,
    shard: ShardFile,
    *,
    scratch_dir: str | None = None,
    progress: Progress,
) -> Iterator[Contents]:
    """One shard file, verified window by window.

    Args:
        scratch_dir: where a large file out of a store is put on its way; None for the temporary directory.
        progress: told of bytes as they are read and verified; may raise to break off.
    Raises: DamagedError when the file is not what was written, on entering or from `on_window`; StorageError.
    """
    with ExitStack() as stack:
        reader = stack.enter_context(storage.open_reader(path))
        if reader.file_bytes != shard.file_bytes:
            raise DamagedError(
                f"{storage.describe(path)} has {reader.file_bytes} bytes: {shard.file_bytes} were written"
            )
        pieces = pieces_of(shard, storage)
        if shard.file_bytes <= SMALL_BYTES:
            yield Contents(_read_whole(reader, shard, pieces, progress), _nothing)
            return
        if storage.is_local:
            with mapped("read", storage.describe(path)):
                fd = os.open(storage.describe(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            stack.callback(os.close, fd)
            large: _Large = _Mapped(fd, shard, pieces.step, progress)
        else:
            with mapped("write a scratch file in", scratch_dir or tempfile.gettempdir()):
                file = stack.enter_context(tempfile.TemporaryFile(dir=scratch_dir))
                # Reserved first: a page of a mapping that finds the disk full kills the process.
                os.posix_fallocate(file.fileno(), 0, shard.file_bytes)
            large = _Scratch(file.fileno(), reader, shard, pieces.step, progress)
        yield Contents(memoryview(large.pages), large.bring)


def verify_range(shard: ShardFile, view: memoryview, begin: int) -> None:
    """Compare `view`, the file's bytes from `begin` (a whole number of blocks) on, with the digests.

    Raises: DamagedError naming the first block that differs.
    """
    step = max(shard.block_bytes, DIGEST_BYTES_AT_ONCE // shard.block_bytes * shard.block_bytes)
    for at in range(0, len(view), step):
        first = (begin + at) // shard.block_bytes
        bad = first_bad_block(view[at : at + step], first, shard.digests, shard.block_bytes)
        if bad is not None:
            raise DamagedError(
                f"{shard.file}: block {bad} (from byte {bad * shard.block_bytes}) is not what was written"
            )
        time.sleep(0)


def pieces_of(shard: ShardFile, storage: Storage) -> range:
    """Where to begin reading a file of that storage in pieces of whole blocks; the step is a piece's size."""
    most = LOCAL_READ_BYTES if storage.is_local else STORE_READ_BYTES
    step = max(1, most // shard.block_bytes) * shard.block_bytes
    return range(0, shard.file_bytes, step)


def aligned_buffer(count: int) -> memoryview:
    """Memory for at least so many bytes that direct I/O can use."""
    size = max(1, -(-count // BLOCK_BYTES)) * BLOCK_BYTES
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _read_whole(reader: Reader, shard: ShardFile, pieces: range, progress: Progress) -> memoryview:
    buffer = aligned_buffer(shard.file_bytes)
    for begin in pieces:
        view = buffer[begin : min(begin + pieces.step, shard.file_bytes)]
        reader.read_into(begin, view)
        verify_range(shard, view, begin)
        progress(len(view))
    return buffer


class _Large:
    """A mapped file of which each range is brought in before it is written."""

    def __init__(self, fd: int, shard: ShardFile, piece_bytes: int, progress: Progress) -> None:
        self._fd, self._shard, self._piece_bytes, self._progress = fd, shard, piece_bytes, progress
        with mapped("map", shard.file):
            self.pages = mmap.mmap(fd, shard.file_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._buffers = threading.local()
        self._recent: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def bring(self, begin: int, end: int) -> None:
        """Read and verify [begin, end), rounded to whole blocks. May be called from several threads."""
        block = self._shard.block_bytes
        at = begin // block * block
        limit = min(-(-end // block) * block, self._shard.file_bytes)
        while at < limit:
            view = self._buffer(min(self._piece_bytes, limit - at))
            self._read(at, view)
            verify_range(self._shard, view, at)
            self._keep(at, view)
            at += len(view)
        self._progress(end - begin)
        self._let_go_behind(begin, end)

    def _read(self, begin: int, view: memoryview) -> None:
        raise NotImplementedError

    def _keep(self, begin: int, view: memoryview) -> None:
        """Put what was read and verified where the mapping shows it."""

    def _buffer(self, count: int) -> memoryview:
        held: bytearray | None = getattr(self._buffers, "held", None)
        if held is None or len(held) < count:
            held = self._buffers.held = bytearray(count)
        return memoryview(held)[:count]

    def _let_go_behind(self, begin: int, end: int) -> None:
        """Keep this process small. Whoever still needs a page gets it from the file again."""
        with self._lock:
            self._recent.append((begin, end))
            if len(self._recent) <= KEPT_WINDOWS:
                return
            old_begin, old_end = self._recent.popleft()
        aligned = old_begin // mmap.PAGESIZE * mmap.PAGESIZE
        with suppress(OSError, ValueError):
            self.pages.madvise(mmap.MADV_DONTNEED, aligned, old_end - aligned)
            os.posix_fadvise(self._fd, aligned, old_end - aligned, os.POSIX_FADV_DONTNEED)


class _Mapped(_Large):
    """A local file, mapped as it lies there."""

    def _read(self, begin: int, view: memoryview) -> None:
        # Through the page cache, unlike every other read: the mapping finds these pages there.
        position = 0
        while position < len(view):
            with mapped("read", self._shard.file):
                count = os.preadv(self._fd, [view[position:]], begin + position)
            if count == 0:
                raise DamagedError(f"{self._shard.file} is truncated: it ends at byte {begin + position}")
            position += count


class _Scratch(_Large):
    """A file of a store, put into a scratch file on its way."""

    def __init__(
        self, fd: int, reader: Reader, shard: ShardFile, piece_bytes: int, progress: Progress
    ) -> None:
        super().__init__(fd, shard, piece_bytes, progress)
        self._reader = reader

    def _read(self, begin: int, view: memoryview) -> None:
        self._reader.read_into(begin, view)

    def _keep(self, begin: int, view: memoryview) -> None:
        position = 0
        while position < len(view):
            with mapped("write a scratch file for", self._shard.file):
                position += os.pwrite(self._fd, view[position:], begin + position)


def _nothing(begin: int, end: int) -> None:
    """A file that was read as a whole has been verified already."""
