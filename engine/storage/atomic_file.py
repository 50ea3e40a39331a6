"""Writes small files and creates directories atomically and durably."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from engine.errors import StorageError
from engine.format.names import TMP_SUFFIX
from engine.storage.system import System

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_NO_RENAME_NEW = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)


def replace_file(system: System, target: str, data: bytes) -> None:
    """Put a whole, synced file under the name and replace any file of that name. OSError otherwise."""
    temporary = _write_temporary(system, target, data)
    with _removed_on_error(system, temporary):
        system.replace(temporary, target)


def create_file(system: System, target: str, data: bytes) -> None:
    """Put a whole, synced file under the name if it is free, in one step; FileExistsError if not.

    Of any number of callers at once, also on several machines, one wins.
    """
    temporary = _write_temporary(system, target, data)
    with _removed_on_error(system, temporary):
        _move_to_free_name(system, temporary, target)


def make_durable_dir(system: System, absolute: str) -> None:
    """Create a directory and its missing parents, each made durable in its own parent."""
    if os.path.isdir(absolute):
        return
    parent = os.path.dirname(absolute)
    if parent != absolute:
        make_durable_dir(system, parent)
    try:
        system.mkdir(absolute)
    except FileExistsError:
        if not os.path.isdir(absolute):
            raise
    # Even if another rank was faster: it may crash before its own fsync.
    system.fsync_dir(parent)


def write_fully(system: System, fd: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`, through interruptions and short writes."""
    position = 0
    while position < len(view):
        try:
            written = system.pwrite(fd, view[position:], offset + position)
        except InterruptedError:
            continue
        if written <= 0:
            raise OSError(errno.EIO, f"a write of {len(view) - position} bytes wrote nothing")
        position += written


def _write_temporary(system: System, target: str, data: bytes) -> str:
    """Write and sync `data` under another name; only the owner may read it until it is whole."""
    temporary = f"{target}.{os.urandom(4).hex()}{TMP_SUFFIX}"
    fd = system.create(temporary, 0o600)
    with _removed_on_error(system, temporary):
        try:
            write_fully(system, fd, memoryview(data), 0)
            system.chmod(fd, 0o666 & ~_umask())
            system.fsync(fd)
        finally:
            system.close(fd)
    return temporary


def _move_to_free_name(system: System, temporary: str, target: str) -> None:
    try:
        system.link(temporary, target)
    except FileExistsError:
        # NFS may answer this to a repeated request whose first answer was lost.
        if not os.path.samefile(temporary, target):
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_to_free_name(system, temporary, target)
        return
    with contextlib.suppress(OSError):  # the file is published; its second name is deleted later
        system.unlink(temporary)


def _rename_to_free_name(system: System, temporary: str, target: str) -> None:
    try:
        system.rename_new(temporary, target)
    except OSError as error:
        if error.errno in _NO_RENAME_NEW:
            raise StorageError(
                f"could not write {target}: its file system has neither hard links nor exclusive renames,"
                " so that two runs could overwrite each other: choose another directory"
            ) from error
        raise


@contextlib.contextmanager
def _removed_on_error(system: System, temporary: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            system.unlink(temporary)
        raise


def _umask() -> int:
    """The process's umask, read from /proc: os.umask can only be read by changing it, for all threads."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
