"""Whether a range of a file lies in the page cache: cachestat(2), Linux 6.5 and newer.

A read that refuses to wait (RWF_NOWAIT) also tells, but after a miss the kernel reads ahead several hundred
KiB: if direct reads follow, those bytes are read from the disk twice.
"""

from __future__ import annotations

import ctypes
import mmap

_CACHESTAT = 451
"""The number of the system call, on every architecture."""


class _Range(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _Counts(ctypes.Structure):
    """Pages of the range, by what the kernel knows of them."""

    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "written_back", "evicted", "just_evicted")
    )


# PyDLL keeps the interpreter lock: the call is short, and getting the lock back may not be.
_syscall = ctypes.PyDLL(None).syscall


def in_page_cache(fd: int, offset: int, length: int) -> bool | None:
    """Whether all pages of bytes [offset, offset + length) are cached; None where the kernel does not say."""
    if not length:
        return True
    counts = _Counts()
    failed = _syscall(
        ctypes.c_long(_CACHESTAT),
        ctypes.c_long(fd),
        ctypes.byref(_Range(offset, length)),
        ctypes.byref(counts),
        ctypes.c_long(0),
    )
    if failed:
        return None
    pages = (offset + length - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE + 1
    return bool(counts.cached >= pages)
