"""A power cut: record what a job asked of the disk, then make every state that POSIX allows it to leave.

POSIX promises of a file's bytes only what was fsynced, and of a name only what its directory's fsync covered.
Until then any part may be there, in any order: a write whole, torn or not at all, a name old or new. A file's
bytes and its names are independent of each other.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.storage.system import System

SECTOR = 512


@dataclass
class Op:
    """One call. `kind`: write, truncate, fsync (of inode); name, unname, fsync_dir (of directory)."""

    kind: str
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    directory: str = ""
    name: str = ""


def _as_one_act(method: Callable[..., Any]) -> Callable[..., Any]:
    """The call and its entry belong together: ranks are threads here, and share one journal."""

    @functools.wraps(method)
    def call(self: Journal, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return call


@dataclass
class Journal(System):
    """A disk that keeps a journal. Paths are relative to `root`; inodes are numbers of our own."""

    root: str
    ops: list[Op] = field(default_factory=list)
    _open: dict[int, int] = field(default_factory=dict)
    _inodes: dict[str, int] = field(default_factory=dict)
    _next: int = 1
    lock: threading.RLock = field(default_factory=threading.RLock)

    write_threads = 1

    def _at(self, path: str) -> tuple[str, str]:
        directory, name = os.path.split(os.path.relpath(path, self.root))
        return directory or ".", name

    def _name(self, path: str, inode: int) -> None:
        directory, name = self._at(path)
        self._inodes[path] = inode
        self.ops.append(Op("name", inode=inode, directory=directory, name=name))

    def _unname(self, path: str) -> None:
        directory, name = self._at(path)
        self._inodes.pop(path, None)
        self.ops.append(Op("unname", directory=directory, name=name))

    @_as_one_act
    def create(self, path: str, mode: int = 0o666) -> int:
        fd = super().create(path, mode)
        self._open[fd], self._next = self._next, self._next + 1
        self._name(path, self._open[fd])
        return fd

    @_as_one_act
    def reopen(self, path: str) -> int:
        fd = super().reopen(path)
        self._open[fd] = self._inodes[path]
        return fd

    @_as_one_act
    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        written = super().pwrite(fd, view, offset)
        self.ops.append(Op("write", inode=self._open[fd], offset=offset, data=bytes(view[:written])))
        return written

    @_as_one_act
    def fallocate(self, fd: int, file_bytes: int) -> None:
        super().fallocate(fd, file_bytes)
        self.ops.append(Op("extend", inode=self._open[fd], offset=file_bytes))

    @_as_one_act
    def ftruncate(self, fd: int, file_bytes: int) -> None:
        super().ftruncate(fd, file_bytes)
        self.ops.append(Op("truncate", inode=self._open[fd], offset=file_bytes))

    @_as_one_act
    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self.ops.append(Op("fsync", inode=self._open[fd]))

    @_as_one_act
    def close(self, fd: int) -> None:
        self._open.pop(fd, None)
        super().close(fd)

    @_as_one_act
    def fsync_dir(self, path: str) -> None:
        super().fsync_dir(path)
        relative = os.path.relpath(path, self.root)
        self.ops.append(Op("fsync_dir", directory=relative))

    @_as_one_act
    def link(self, src: str, dst: str) -> None:
        super().link(src, dst)
        self._name(dst, self._inodes[src])

    @_as_one_act
    def replace(self, src: str, dst: str) -> None:
        super().replace(src, dst)
        inode = self._inodes.get(src, 0)
        self._name(dst, inode)
        self._unname(src)

    @_as_one_act
    def rename_new(self, src: str, dst: str) -> None:
        super().rename_new(src, dst)
        self._name(dst, self._inodes[src])
        self._unname(src)

    @_as_one_act
    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        super().unlink(path, dir_fd=dir_fd)
        self._unname(_absolute(path, dir_fd))

    @_as_one_act
    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        super().rmdir(path, dir_fd=dir_fd)
        self._unname(_absolute(path, dir_fd))

    def remove_tree(self, path: str) -> None:
        """As `shutil.rmtree` does it: entry by entry, with nothing synced."""
        for item in sorted(os.scandir(path), key=lambda item: item.name):
            if item.is_dir(follow_symlinks=False):
                self.remove_tree(item.path)
            else:
                self.unlink(item.path)
        with self.lock:
            os.rmdir(path)
            self._unname(path)

    @_as_one_act
    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self._name(path, -1)


def _absolute(path: str, dir_fd: int | None) -> str:
    return path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)


Directory = dict[str, int]


def states(ops: list[Op], seed: int = 0) -> Iterator[tuple[dict[str, Directory], dict[int, bytes]]]:
    """The disk states after a crash that follows the last op: ({directory: {name: inode}}, {inode: bytes}).

    Names: each directory has its synced names plus any subset of the changes since; of more than six
    changes any prefix and any single one.
    Bytes: each unsynced file is one of: nothing of it, all of it, zeros of its size, torn at a sector, its
    sectors in random choice. Both are enumerated for the directories and files that changed since their
    last sync; what is synced has one state only.
    """
    names, pending_names = _names(ops)
    stable, pending_bytes = _bytes(ops)
    per_directory = {
        directory: _name_states(names.get(directory, {}), changes)
        for directory, changes in pending_names.items()
    }
    per_file = {
        inode: _byte_states(stable.get(inode, b""), changes, random.Random(f"{seed} {inode} {len(ops)}"))
        for inode, changes in pending_bytes.items()
    }
    for directories in itertools.product(*per_directory.values()):
        tree = {**names, **dict(zip(per_directory, directories, strict=True))}
        seen = {inode for directory in tree.values() for inode in directory.values()}
        # Bytes of a file that has no name in this state make no difference.
        visible = [inode for inode in per_file if inode in seen]
        for contents in itertools.product(*(per_file[inode] for inode in visible)):
            yield tree, {**stable, **dict(zip(visible, contents, strict=True))}


def _names(ops: list[Op]) -> tuple[dict[str, Directory], dict[str, list[Op]]]:
    synced: dict[str, Directory] = {}
    pending: dict[str, list[Op]] = {}
    for op in ops:
        if op.kind in ("name", "unname"):
            pending.setdefault(op.directory, []).append(op)
        elif op.kind == "fsync_dir":
            changes = pending.pop(op.directory, [])
            synced[op.directory] = _apply(synced.get(op.directory, {}), changes)
            for change in changes:
                if change.kind == "unname":  # of a directory: nobody sees its inside any more
                    gone = change.name if op.directory == "." else f"{op.directory}/{change.name}"
                    pending.pop(gone, None)
                    synced.pop(gone, None)
    return synced, pending


def _apply(names: Directory, changes: list[Op]) -> Directory:
    changed = dict(names)
    for op in changes:
        if op.kind == "name":
            changed[op.name] = op.inode
        else:
            changed.pop(op.name, None)
    return changed


def _name_states(synced: Directory, changes: list[Op]) -> list[Directory]:
    if len(changes) <= 6:
        chosen = [list(some) for n in range(len(changes) + 1) for some in itertools.combinations(changes, n)]
    else:
        chosen = [changes[:count] for count in range(len(changes) + 1)] + [[op] for op in changes]
    found = [_apply(synced, some) for some in chosen]
    return [state for at, state in enumerate(found) if state not in found[:at]]


def _bytes(ops: list[Op]) -> tuple[dict[int, bytes], dict[int, list[Op]]]:
    stable: dict[int, bytes] = {}
    pending: dict[int, list[Op]] = {}
    for op in ops:
        if op.kind in ("write", "extend", "truncate"):
            pending.setdefault(op.inode, []).append(op)
        elif op.kind == "fsync":
            stable[op.inode] = _written(stable.get(op.inode, b""), pending.pop(op.inode, []))
    return stable, pending


def _written(before: bytes, changes: list[Op]) -> bytes:
    data = bytearray(before)
    for op in changes:
        if op.kind == "write":
            data.extend(bytes(max(0, op.offset + len(op.data) - len(data))))
            data[op.offset : op.offset + len(op.data)] = op.data
        elif op.kind == "extend":
            data.extend(bytes(max(0, op.offset - len(data))))
        else:
            del data[op.offset :]
            data.extend(bytes(op.offset - len(data)))
    return bytes(data)


def _byte_states(before: bytes, changes: list[Op], dice: random.Random) -> list[bytes]:
    whole = _written(before, changes)
    torn_at = len(whole) // 2 // SECTOR * SECTOR
    sectors = range(0, len(whole), SECTOR)
    mixed = b"".join(
        whole[at : at + SECTOR] if dice.random() < 0.5 else bytes(len(whole[at : at + SECTOR]))
        for at in sectors
    )
    found = [before, whole, bytes(len(whole)), whole[:torn_at], mixed]
    return [state for at, state in enumerate(found) if state not in found[:at]]


def make(root: Path, tree: dict[str, Directory], contents: dict[int, bytes]) -> None:
    """Write one state to a real directory. Directories that have no name in it are not there."""
    root.mkdir()

    def fill(directory: str, at: Path) -> None:
        for name, inode in tree.get(directory, {}).items():
            if inode == -1:
                (at / name).mkdir()
                fill(name if directory == "." else f"{directory}/{name}", at / name)
            else:
                (at / name).write_bytes(contents.get(inode, b""))

    fill(".", root)
