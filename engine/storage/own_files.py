"""Deletes in a directory what Holdfast wrote there, by descriptor: through no link, and into no mount.

A path is not reliable: between a check and the deletion, someone may put a link or a mount in its place. So
every directory on the path is opened once, and deletions are relative to its descriptor. Mounts are
identified by their id, not by the device number, which bind mounts of one file system share.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import NotOursError
from engine.format.names import safe_relative
from engine.storage.base import Cleared
from engine.storage.system import System

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
A_LINK = "is a symbolic link: neither the link nor what it points at is changed"
_STAYS = (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY)
"""How the kernel refuses to remove a directory that is not empty, or a mount point."""


@contextmanager
def opened(root: str, path: str, where: str) -> Iterator[int]:
    """A descriptor of the directory `path` below `root`; "" is the root itself, which may be a link.

    Raises: NotOursError if a part of the path is a link or another mount; OSError.
    """
    fd = os.open(root, _DIRECTORY)
    try:
        for name in safe_relative(path).split("/") if path else ():
            below = _open_below(fd, name, where)
            os.close(fd)
            fd = below
        yield fd
    finally:
        os.close(fd)


def why_not_ours(root: str, path: str) -> str:
    """Why Holdfast must not change the directory `path`, as the end of a sentence; "" if it may."""
    try:
        with opened(root, path, path):
            return ""
    except NotOursError as error:
        return str(error).removeprefix(f"{path} ")
    except OSError:
        return ""  # the change itself will raise


def clear(system: System, parent: int, name: str, where: str, ours: Callable[[str], bool]) -> Cleared:
    """Delete a directory's regular files that are `ours`, its empty directories, and itself if it is empty.

    `parent` is a descriptor. Raises: NotOursError for a link or a mount; OSError.
    """
    fd = _open_below(parent, name, where)
    try:
        removed, left = 0, []
        for item in sorted(os.listdir(fd)):
            if _remove(system, fd, item, ours):
                removed += 1
            else:
                left.append(item)
    finally:
        os.close(fd)
    if left:
        return Cleared(removed, tuple(left), gone=False)
    try:
        system.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in _STAYS:
            raise
        return Cleared(removed, (), gone=False)  # somebody put something there just now
    return Cleared(removed, (), gone=True)


def _remove(system: System, fd: int, item: str, ours: Callable[[str], bool]) -> bool:
    """Whether it is gone. Never descends: Holdfast makes no directories inside a checkpoint."""
    try:
        mode = os.stat(item, dir_fd=fd, follow_symlinks=False).st_mode
        if stat.S_ISDIR(mode):
            system.rmdir(item, dir_fd=fd)
        elif stat.S_ISREG(mode) and ours(item):
            system.unlink(item, dir_fd=fd)
        else:
            return False
    except FileNotFoundError:
        pass  # somebody else was faster
    except OSError as error:
        if error.errno in _STAYS:
            return False
        raise
    return True


def _open_below(parent: int, name: str, where: str) -> int:
    try:
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except OSError as error:
        if stat.S_ISLNK(_mode(parent, name)):
            raise NotOursError(f"{where} {A_LINK}") from error
        raise
    if not _same_mount(parent, fd):
        os.close(fd)
        raise NotOursError(f"{where} is a mount point: what is mounted there is left alone")
    return fd


def _mode(parent: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    except OSError:
        return 0


def _same_mount(one: int, two: int) -> bool:
    ids = _mount_id(one), _mount_id(two)
    if None in ids:  # this /proc does not say, as in some sandboxes
        return os.fstat(one).st_dev == os.fstat(two).st_dev
    return ids[0] == ids[1]


def _mount_id(fd: int) -> int | None:
    """The mount that an open file lies in. Python has no statx, and many containers forbid openat2."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), None)
    except OSError:
        return None
