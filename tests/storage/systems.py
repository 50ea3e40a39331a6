"""Stand-ins for the operating system: disks that fail, write short, refuse direct I/O, or keep a record."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from engine.storage.system import System

SECTOR = 4096


class StrictDirect(System):
    """Direct I/O as the kernel checks it, on any file system: misaligned means EINVAL.

    `refuse_at` makes every direct write from that offset on fail, as some network mounts do.
    """

    def __init__(self, refuse_at: int | None = None) -> None:
        self.direct: set[int] = set()
        self.direct_bytes = 0
        self.buffered_bytes = 0
        self._refuse_at = refuse_at

    def set_direct(self, fd: int, on: bool) -> None:
        (self.direct.add if on else self.direct.discard)(fd)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        if fd not in self.direct:
            self.buffered_bytes += len(view)
            return super().pwrite(fd, view, offset)
        if offset % SECTOR or len(view) % SECTOR:
            raise OSError(errno.EINVAL, "misaligned direct write")
        if self._refuse_at is not None and offset >= self._refuse_at:
            raise OSError(errno.EINVAL, "direct I/O refused")
        written = super().pwrite(fd, view, offset)
        self.direct_bytes += written
        return written

    def close(self, fd: int) -> None:
        self.direct.discard(fd)
        super().close(fd)


class NoDirect(System):
    """A file system without O_DIRECT."""

    def set_direct(self, fd: int, on: bool) -> None:
        if on:
            raise OSError(errno.EINVAL, "no O_DIRECT here")


class ScriptedWrites(StrictDirect):
    """`script(call, size)` decides each write: None writes all, a number so many bytes, errors are raised."""

    def __init__(self, script: Callable[[int, int], int | OSError | None], *, direct: bool = True) -> None:
        super().__init__()
        self.calls = 0
        self._script = script
        self._allow_direct = direct

    def set_direct(self, fd: int, on: bool) -> None:
        if on and not self._allow_direct:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        super().set_direct(fd, on)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        verdict = self._script(self.calls, len(view))
        self.calls += 1
        if isinstance(verdict, OSError):
            raise verdict
        if verdict == 0:
            return 0
        return super().pwrite(fd, view, offset) if verdict is None else os.pwrite(fd, view[:verdict], offset)


class FailsAt(System):
    """The named call fails with that errno, from its n-th time on (from 0)."""

    def __init__(self, call: str, code: int, *, nth: int = 0, once: bool = False) -> None:
        def fail(*args: object, **kwargs: object) -> object:
            turn, self.seen = self.seen, self.seen + 1
            if turn == nth or (turn > nth and not once):
                raise OSError(code, os.strerror(code))
            return original(*args, **kwargs)

        self.seen = 0
        original = getattr(System, call).__get__(self)
        setattr(self, call, fail)


class Recording(System):
    """Keeps the order of what reaches the disk, files by their base names."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._names: dict[int, str] = {}

    def create(self, path: str, mode: int = 0o666) -> int:
        fd = super().create(path, mode)
        self._names[fd] = self._short(path)
        self.events.append(f"create {self._names[fd]}")
        return fd

    def reopen(self, path: str) -> int:
        fd = super().reopen(path)
        self._names[fd] = self._short(path)
        return fd

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        self.events.append(f"write {self._names[fd]}")
        return super().pwrite(fd, view, offset)

    def ftruncate(self, fd: int, file_bytes: int) -> None:
        self.events.append(f"truncate {self._names[fd]} {file_bytes}")
        super().ftruncate(fd, file_bytes)

    def fsync(self, fd: int) -> None:
        self.events.append(f"fsync {self._names[fd]}")
        super().fsync(fd)

    def fsync_dir(self, path: str) -> None:
        self.events.append(f"fsync {os.path.basename(path)}/")
        super().fsync_dir(path)

    def link(self, src: str, dst: str) -> None:
        self.events.append(f"link {self._short(src)} {self._short(dst)}")
        super().link(src, dst)

    def replace(self, src: str, dst: str) -> None:
        self.events.append(f"replace {self._short(src)} {self._short(dst)}")
        super().replace(src, dst)

    def unlink(self, path: str) -> None:
        self.events.append(f"unlink {self._short(path)}")
        super().unlink(path)

    def mkdir(self, path: str) -> None:
        self.events.append(f"mkdir {os.path.basename(path)}")
        super().mkdir(path)

    @staticmethod
    def _short(path: str) -> str:
        name = os.path.basename(path)
        return name.split(".")[0] + ".tmp" if name.endswith(".tmp") else name
