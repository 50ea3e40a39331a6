"""The system calls through which data reaches a disk, in one object that tests replace.

A subclass that fails the k-th call, writes short or records the order stands in for a bad disk; nothing
else in `storage` touches files to write them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import shutil
import time

SYNC_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: start writing the range out, without waiting."""

SYNC_WRITE_AND_WAIT = 1 | 2 | 4
"""SYNC_FILE_RANGE_WAIT_BEFORE | WRITE | WAIT_AFTER: the range's data has left the page cache."""

_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ESPIPE)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _raise_errno(path: str | None = None) -> None:
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), path)


class System:
    """The real calls. Every method raises OSError as the kernel answers."""

    write_threads = 2
    """How many windows of a shard are written at a time. More did not make a disk faster here."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""
        return time.monotonic()

    def create(self, path: str, mode: int = 0o666) -> int:
        """Create and open a new file for writing; FileExistsError if there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)

    def reopen(self, path: str) -> int:
        """Open a file that is there for writing, a second time."""
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        """Write some of `view`; returns how many bytes. Releases the GIL."""
        return os.pwrite(fd, view, offset)

    def set_direct(self, fd: int, on: bool) -> None:
        """Switch O_DIRECT. OSError EINVAL where the file system has none.

        Not as a flag of `open`: a file system that refuses it there may have created the file already.
        """
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)

    def fallocate(self, fd: int, file_bytes: int) -> None:
        """Reserve space; does nothing where the file system cannot.

        Not os.posix_fallocate: where there is no support, glibc emulates it by writing to every block.
        """
        while _libc().fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(file_bytes)) != 0:
            if ctypes.get_errno() in _UNSUPPORTED:
                return
            if ctypes.get_errno() != errno.EINTR:
                _raise_errno()

    def ftruncate(self, fd: int, file_bytes: int) -> None:
        os.ftruncate(fd, file_bytes)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_dir(self, path: str) -> None:
        """Make a directory's entries durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:  # some network and FUSE mounts have no fsync of directories
                raise
        finally:
            os.close(fd)

    def sync_range(self, fd: int, begin: int, size: int, how: int) -> None:
        """sync_file_range(2) over [begin, begin + size), or fdatasync where it is not there. See SYNC_*."""
        flags = ctypes.c_uint(how)
        if _libc().sync_file_range(fd, ctypes.c_int64(begin), ctypes.c_int64(size), flags) == 0:
            return
        if ctypes.get_errno() not in _UNSUPPORTED:
            _raise_errno()
        if how != SYNC_WRITE:
            os.fdatasync(fd)

    def drop_cache(self, fd: int, begin: int, size: int) -> None:
        """Let the page cache forget clean pages of [begin, begin + size); 0 means to the end."""
        os.posix_fadvise(fd, begin, size, os.POSIX_FADV_DONTNEED)

    def chmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def link(self, src: str, dst: str) -> None:
        """A second name for a file; FileExistsError if it is taken."""
        os.link(src, dst, follow_symlinks=False)

    def replace(self, src: str, dst: str) -> None:
        """Rename over whatever has the name."""
        os.replace(src, dst)

    def rename_new(self, src: str, dst: str) -> None:
        """Rename to a free name; FileExistsError if it is taken (renameat2 with RENAME_NOREPLACE)."""
        raw = [_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), ctypes.c_uint(_RENAME_NOREPLACE)]
        if _libc().renameat2(*raw) != 0:
            _raise_errno(dst)

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        """Remove a name; `path` is relative to the directory `dir_fd` where that is given."""
        os.unlink(path, dir_fd=dir_fd)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        """Remove an empty directory; `path` as for `unlink`."""
        os.rmdir(path, dir_fd=dir_fd)

    def mkdir(self, path: str) -> None:
        os.mkdir(path)

    def remove_tree(self, path: str) -> None:
        """Remove a directory and what is in it, following no link; FileNotFoundError if there is none."""
        shutil.rmtree(path)
