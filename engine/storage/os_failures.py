"""Convert the operating system's errors to Holdfast's: what happened, where, and what to do next."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import (
    AlreadyExistsError,
    NotFoundError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
DENIED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
TRANSIENT = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ETIMEDOUT,
        errno.ESTALE,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ENETUNREACH,
        errno.ENETDOWN,
        errno.EHOSTUNREACH,
        errno.EHOSTDOWN,
        errno.EPIPE,
        errno.EMFILE,
        errno.ENFILE,
    }
)

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space there, keep fewer checkpoints, or choose another directory",
    errno.EDQUOT: "the quota is used up: free space there, keep fewer checkpoints, or ask for more",
    errno.EACCES: "no permission: choose another directory, or have its permissions changed",
    errno.EPERM: "not permitted: choose another directory, or have its permissions changed",
    errno.EROFS: "the file system is mounted read-only: choose another directory, or remount it",
    errno.ENOENT: "there is no such file or directory: check the path",
    errno.EEXIST: "the name is taken already: choose another one",
    errno.ENOTEMPTY: "the name is taken already: choose another one",
    errno.ENOTDIR: "a part of this path is a file, not a directory: check the path",
    errno.EISDIR: "this is a directory, not a file: check the path",
    errno.EIO: "the device reported an input/output error: check the kernel log, and stop using the device",
    errno.EFBIG: "the file is too large for the file system or its limit: check `ulimit -f`",
    errno.EMFILE: "too many open files: raise the limit with `ulimit -n`",
    errno.ENFILE: "too many open files on this machine: close some, then try again",
    errno.ESTALE: "the network file system lost this file: check the mount, then try again",
    errno.ELOOP: "it is a symbolic link, which is not followed here: use the real path",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter path",
}


def storage_error(error: OSError, doing: str, where: str) -> StorageError:
    """The StorageError for an OSError: `doing` ("write", "list", ...) and `where` name what was tried."""
    code = error.errno
    if code in _ADVICE:
        reason = _ADVICE[code]
    else:
        reason = os.strerror(code) if code else str(error)
        reason += ": try again later" if code in TRANSIENT else ""
    mapped = _kind(error)(f"could not {doing} {where}: {reason}")
    mapped.errno = code
    return mapped


def _kind(error: OSError) -> type[StorageError]:
    code = error.errno
    if code in FULL:
        return StorageFullError
    if code in DENIED or isinstance(error, PermissionError):
        return StorageDeniedError
    if code == errno.ENOENT or isinstance(error, FileNotFoundError):
        return NotFoundError
    if code in (errno.EEXIST, errno.ENOTEMPTY) or isinstance(error, FileExistsError):
        return AlreadyExistsError
    if code in TRANSIENT or isinstance(error, ConnectionError | TimeoutError):
        return StorageUnavailableError
    return StorageError


@contextmanager
def mapped(doing: str, where: str) -> Iterator[None]:
    """Turn any OSError of the block into a StorageError; those pass through as they are."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(error, doing, where) from error
