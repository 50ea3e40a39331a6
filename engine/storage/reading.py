"""Read ranges of a local file: cached bytes from the page cache, others directly from the disk.

A restore reads each byte once. Through the page cache, cold data is copied twice, evicts what others need,
and on a machine whose memory is full waits for the kernel to make room; direct reads do none of that. Warm
data takes only a memory copy from the page cache. The kernel says which data is cached.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence

from engine.errors import DamagedError
from engine.format.digest import scattered_digests
from engine.native import kernels
from engine.native.kernels import Place
from engine.storage.base import Reader
from engine.storage.os_failures import mapped
from engine.storage.residency import in_page_cache

SECTOR_BYTES = 4096
LEAST_DIRECT_BYTES = 256 << 10
"""Smaller reads go through the page cache: their neighbours are likely to be wanted, too."""

_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class LocalReader(Reader):
    """An open descriptor; preadv takes its offset along, so threads share it, and releases the GIL.

    Owns `fd`. Large reads into memory on a 4 KiB boundary, from an offset on one, may be direct.
    """

    def __init__(self, fd: int, file_bytes: int, where: str) -> None:
        self._fd = fd
        self._file_bytes = file_bytes
        self._where = where
        self._direct_fd = _reopen_direct(fd) if file_bytes >= LEAST_DIRECT_BYTES else -1

    @property
    def file_bytes(self) -> int:
        return self._file_bytes

    def read_into(self, offset: int, view: memoryview) -> None:
        flat = memoryview(view).cast("B")
        with mapped("read", self._where):
            position = self._read_large(offset, flat) if len(flat) >= LEAST_DIRECT_BYTES else 0
            while position < len(flat):
                position += self._read_some(self._fd, flat[position:], offset + position, 0)

    def read_cached(self, offset: int, places: Sequence[Place], block_bytes: int) -> tuple[int, bytes]:
        """One request, for what is wholly in the page cache."""
        if in_page_cache(self._fd, offset, sum(size for _, size in places)) is False:
            return 0, b""
        with mapped("read", self._where):
            try:
                if kernels.library is not None:
                    return kernels.read_at_hand(self._fd, offset, places, block_bytes)
                views = [kernels.view_of(place) for place in places if place[1]]
                count = os.preadv(self._fd, views, offset, os.RWF_NOWAIT)
            except (BlockingIOError, InterruptedError):
                return 0, b""
            except OSError as error:
                if error.errno in _REFUSED:
                    return 0, b""  # not on this file system
                raise
        return count, scattered_digests(_first(count, views), block_bytes)

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct_fd = -1

    def _read_large(self, offset: int, flat: memoryview) -> int:
        """Read what is cached, or else direct, in whole sectors. Returns how far it got."""
        if self._direct_fd < 0 or offset % SECTOR_BYTES or _address(flat) % SECTOR_BYTES:
            return 0
        whole = len(flat) // SECTOR_BYTES * SECTOR_BYTES
        position = 0
        fd, flags = self._fd, os.RWF_NOWAIT
        if in_page_cache(fd, offset, whole) is False:
            fd, flags = self._direct_fd, 0
        while position < whole:
            try:
                position += self._read_some(fd, flat[position:whole], offset + position, flags)
            except BlockingIOError:
                fd, flags = self._direct_fd, 0  # not in the page cache
            except OSError as error:
                if error.errno in _REFUSED:
                    return position  # not on this file system
                raise
            if position % SECTOR_BYTES:
                return position  # the file ends here, or is shorter than it should be
        return position

    def _read_some(self, fd: int, view: memoryview, offset: int, flags: int) -> int:
        while True:
            try:
                count = os.preadv(fd, [view], offset, flags)
            except InterruptedError:
                continue
            if count == 0:
                raise DamagedError(
                    f"{self._where} is truncated: it ends at byte {offset},"
                    f" and bytes up to {offset + len(view)} are needed"
                )
            return count


def _first(count: int, views: Sequence[memoryview]) -> list[memoryview]:
    """The first `count` bytes of the views."""
    parts = []
    for view in views:
        parts.append(view[:count])
        count -= len(parts[-1])
    return parts


def _reopen_direct(fd: int) -> int:
    """A second descriptor of the same file, for direct reads; -1 where there are none."""
    try:
        # By way of /proc: the name may belong to another file by now, or to none.
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return -1


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
