"""A directory of this machine: local disks, tmpfs, and network file systems that are mounted."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable

from engine.errors import (
    AlreadyExistsError,
    DamagedError,
    HostilePathError,
    NotOursError,
    StorageDeniedError,
)
from engine.format.names import DEAD_PREFIX, MANIFEST, parse_attempt_name, safe_relative
from engine.storage import atomic_file, own_files, shard_writer
from engine.storage.base import Cleared, Entry, Reader, Storage, WriteStats
from engine.storage.os_failures import mapped
from engine.storage.reading import LocalReader
from engine.storage.source import Source
from engine.storage.system import System


class LocalStorage(Storage):
    """A local directory. Constructing one touches nothing; `make_dir("")` creates it.

    `system` makes the calls that write; tests replace it.
    """

    is_local = True
    durability = "files and their directory entries are fsynced: what returned survives a power cut"

    def __init__(self, root: str | os.PathLike[str], *, system: System | None = None) -> None:
        self._root = os.path.abspath(os.path.expanduser(os.fspath(root)))
        self._system = system or System()
        self.uri = self._root

    @property
    def root(self) -> str:
        """Absolute path of the directory."""
        return self._root

    @property
    def supports_exclusive_create(self) -> bool:
        return True

    def list_dir(self, path: str = "") -> list[Entry]:
        with mapped("list", self.describe(path)), os.scandir(self._path(path)) as found:
            entries = [_entry(item) or (None if path else _linked_checkpoint(item)) for item in found]
        return sorted((entry for entry in entries if entry is not None), key=lambda entry: entry.name)

    def list_tree(self) -> dict[str, dict[str, int]]:
        tree: dict[str, dict[str, int]] = {}
        at_top: dict[str, int] = {}
        for entry in self.list_dir():
            if not entry.is_dir:
                at_top[entry.name] = entry.bytes or 0
                continue
            # Retention may remove a directory between the two listings: then it is simply not there. What is
            # not ours may have any name, and rights like those of lost+found.
            ours = parse_attempt_name(entry.name.removeprefix(DEAD_PREFIX)) is not None
            ignored: tuple[type[Exception], ...] = () if ours else (HostilePathError, StorageDeniedError)
            with contextlib.suppress(FileNotFoundError, *ignored):
                tree[entry.name] = self._sizes(entry.name)
        return {"": at_top, **tree}

    def size(self, path: str) -> int:
        with mapped("look at", self.describe(path)):
            found = os.stat(self._path(path))
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, "not a regular file")
            return found.st_size

    def exists(self, path: str) -> bool:
        with mapped("look at", self.describe(path)):
            try:
                os.stat(self._path(path))
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
        with self.open_reader(path) as reader:
            if reader.file_bytes > max_bytes:
                raise DamagedError(
                    f"{self.describe(path)} has {reader.file_bytes} bytes, more than the {max_bytes} expected"
                )
            data = bytearray(reader.file_bytes)
            reader.read_into(0, memoryview(data))
        return bytes(data)

    def open_reader(self, path: str) -> Reader:
        where = self.describe(path)
        with mapped("read", where):
            # O_NONBLOCK: a FIFO of that name must not hang the open; regular files ignore it.
            fd = os.open(self._path(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                os.close(fd)
                raise DamagedError(f"{where} is not a regular file: it was not written by Holdfast")
        return LocalReader(fd, found.st_size, where)

    def write_file(self, path: str, data: bytes) -> None:
        with mapped("write", self.describe(path)):
            atomic_file.replace_file(self._system, self._own_path(path), data)

    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        put = atomic_file.create_file if exclusive else atomic_file.replace_file
        with mapped("write", self.describe(path)):
            target = self._own_path(path)
            put(self._system, target, data)
            self._system.fsync_dir(os.path.dirname(target))

    def write_shard(self, path: str, source: Source) -> WriteStats:
        return shard_writer.write_shard(self._system, self._own_path(path), source)

    def make_dir(self, path: str = "") -> None:
        with mapped("create", self.describe(path)):
            atomic_file.make_durable_dir(self._system, self._own_path(path))

    def sync_dir(self, path: str = "") -> None:
        with mapped("sync", self.describe(path)):
            self._system.fsync_dir(self._path(path))

    def rename(self, src: str, dst: str) -> bool:
        with mapped("rename", self.describe(src)):
            source, target = self._own_path(src), self._own_path(dst)
            if os.path.lexists(target):  # rename(2) would replace an empty directory
                raise AlreadyExistsError(
                    f"{self.describe(dst)} exists already: {self.describe(src)} keeps its name"
                )
            self._system.replace(source, target)
            self._system.fsync_dir(os.path.dirname(target))
        return True

    def delete_file(self, path: str) -> None:
        parent, _, name = safe_relative(path).rpartition("/")
        with (
            mapped("delete", self.describe(path)),
            contextlib.suppress(FileNotFoundError),
            own_files.opened(self._root, parent, self.describe(parent)) as fd,
        ):
            self._system.unlink(name, dir_fd=fd)

    def delete_tree(self, path: str) -> None:
        with mapped("delete", self.describe(path)):
            target = self._link_path(path)
            if os.path.islink(target):
                self._system.unlink(target)
                return
            with contextlib.suppress(FileNotFoundError):
                self._system.remove_tree(target)

    def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
        parent, _, name = safe_relative(path).rpartition("/")
        where = self.describe(path)
        with mapped("delete", where):
            try:
                with own_files.opened(self._root, parent, self.describe(parent)) as fd:
                    return own_files.clear(self._system, fd, name, where, ours)
            except FileNotFoundError:
                return Cleared(0, (), gone=True)

    def link_target(self, path: str) -> str | None:
        absolute = os.path.join(self._root, safe_relative(path))
        if not os.path.islink(absolute):
            return None
        parent, name = os.path.split(os.path.realpath(absolute))
        return name if parent == os.path.realpath(self._root) else os.path.join(parent, name)

    def why_not_ours(self, path: str) -> str:
        return own_files.why_not_ours(self._root, safe_relative(path))

    def versions(self, path: str) -> dict[str, str]:
        with mapped("list", self.describe(path)), os.scandir(self._path(path)) as found:
            return {item.name: _version(item) for item in found if item.is_file(follow_symlinks=False)}

    def last_change(self, path: str) -> float | None:
        """Of the newest ctime: copies set the time of modification back, and nobody can set this one."""
        absolute = self._path(path)
        with mapped("look at", self.describe(path)):
            newest = os.stat(absolute).st_ctime
            if not os.path.isdir(absolute):
                return newest
            with os.scandir(absolute) as found:
                for item in found:
                    with contextlib.suppress(FileNotFoundError):
                        newest = max(newest, item.stat(follow_symlinks=False).st_ctime)
            return newest

    def free_bytes(self) -> int | None:
        with mapped("look at", self.uri):
            found = os.statvfs(self._root)
            if found.f_blocks == 0:  # some FUSE mounts report no sizes
                return None
            return found.f_bavail * found.f_frsize

    def _path(self, path: str) -> str:
        """The absolute path; HostilePathError if it, or a link on the way, leads out of the root.

        A checkpoint may itself be a link to where it was moved; inside it the same rule holds.
        """
        if not path:
            return self._root
        absolute = os.path.join(self._root, safe_relative(path))
        real = os.path.realpath(absolute)
        if not self._is_inside(real) and not self._in_linked_checkpoint(path, real):
            raise HostilePathError(
                f"{self.describe(path)} leads out of the directory through a symbolic link: use its real path"
            )
        return absolute

    def _is_inside(self, real: str) -> bool:
        return real.startswith(os.path.realpath(self._root).rstrip("/") + "/")

    def _in_linked_checkpoint(self, path: str, real: str) -> bool:
        first = path.partition("/")[0]
        linked = os.path.join(self._root, first)
        if not os.path.islink(linked):
            return False
        if parse_attempt_name(first) is None and not os.path.isfile(os.path.join(linked, MANIFEST)):
            return False
        home = os.path.realpath(linked)
        return real == home or real.startswith(home.rstrip("/") + "/")

    def _own_path(self, path: str) -> str:
        """The absolute path for a write. NotOursError below a checkpoint that is a link."""
        absolute = self._path(path)
        first = path.partition("/")[0]
        linked = os.path.join(self._root, first)
        if not path or not os.path.islink(linked):
            return absolute
        if parse_attempt_name(first) is not None or not self._is_inside(os.path.realpath(linked)):
            raise NotOursError(f"{self.describe(first)} {own_files.A_LINK}")
        return absolute

    def _link_path(self, path: str) -> str:
        """The absolute path for a deletion: the last part may be a link to anywhere."""
        parent, _, name = safe_relative(path).rpartition("/")
        return os.path.join(self._path(parent), name)

    def _sizes(self, directory: str) -> dict[str, int]:
        return {entry.name: entry.bytes or 0 for entry in self.list_dir(directory) if not entry.is_dir}


def _version(item: os.DirEntry[str]) -> str:
    try:
        found = item.stat(follow_symlinks=False)
    except FileNotFoundError:
        return "gone"
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}"


def _linked_checkpoint(item: os.DirEntry[str]) -> Entry | None:
    """The entry of a checkpoint that somebody moved elsewhere and left a link to."""
    if parse_attempt_name(item.name) is None or not item.is_symlink():
        return None
    return Entry(item.name, None, is_dir=True) if item.is_dir() else None


def _entry(item: os.DirEntry[str]) -> Entry | None:
    """The entry of a directory, or None for what no checkpoint consists of: links, devices."""
    if item.is_dir(follow_symlinks=False):
        return Entry(item.name, None, is_dir=True)
    try:
        if item.is_file(follow_symlinks=False):
            return Entry(item.name, item.stat(follow_symlinks=False).st_size, is_dir=False)
    except FileNotFoundError:
        pass
    return None
