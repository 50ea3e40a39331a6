"""The fault layer: a disk and a storage that count what is done to them and fail the k-th time.

Two levels. `FaultSystem` sits below `LocalStorage`, in place of the system calls that write. `FaultStorage`
sits around any storage, in place of everything that the engine asks of one, reads and listings included.
Both ask the same `Trigger`, so that one run can be swept over every k.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

from engine.errors import StorageDeniedError, StorageError, StorageFullError, StorageUnavailableError
from engine.storage.base import Cleared, Entry, Reader, Storage, WriteStats
from engine.storage.os_failures import storage_error
from engine.storage.source import Source
from engine.storage.system import System

Act = Callable[[str, Callable[[], Any]], Any]
"""What the k-th operation does instead: gets its name and the operation itself, which it may call."""


class Trigger:
    """Counts operations. Armed, it hands the k-th (from 0) to `act`; `count` tells how many there were."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: tuple[int, Act, bool] | None = None
        self.count = 0
        self.fired: list[str] = []
        self.names: list[str] = []

    def arm(self, k: int, act: Act, *, sticky: bool = False) -> None:
        """Count from 0 again; the k-th operation is `act`'s, and every later one as well if `sticky`."""
        with self._lock:
            self._armed, self.count, self.fired, self.names = (k, act, sticky), 0, [], []

    def disarm(self) -> None:
        """Operations work again."""
        with self._lock:
            self._armed = None

    def turn(self, name: str, real: Callable[[], Any]) -> Any:
        """One operation."""
        with self._lock:
            number, self.count = self.count, self.count + 1
            self.names.append(name)
            armed = self._armed
            hit = armed is not None and (number == armed[0] or (armed[2] and number > armed[0]))
            if hit:
                self.fired.append(name)
        if armed is not None and hit:
            return armed[1](name, real)
        return real()


SYSTEM_CALLS = (
    "create",
    "reopen",
    "close",
    "pwrite",
    "set_direct",
    "fallocate",
    "ftruncate",
    "fsync",
    "fsync_dir",
    "sync_range",
    "drop_cache",
    "chmod",
    "link",
    "replace",
    "rename_new",
    "unlink",
    "mkdir",
    "rmdir",
)


class FaultSystem(System):
    """A disk whose calls go through a trigger. One writing thread: the order of calls is always the same."""

    write_threads = 1

    def __init__(self, trigger: Trigger) -> None:
        for name in SYSTEM_CALLS:
            setattr(self, name, self._through(trigger, name, getattr(super(), name)))

    def remove_tree(self, path: str) -> None:
        """As `shutil.rmtree` does it, but every call in it is a point of its own."""
        for item in sorted(os.scandir(path), key=lambda item: item.name):
            if item.is_dir(follow_symlinks=False):
                self.remove_tree(item.path)
            else:
                self.unlink(item.path)
        self.rmdir(path)

    @staticmethod
    def _through(trigger: Trigger, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return trigger.turn(name, _Call(real, args, kwargs))

        return call


class _Call:
    """One call with its arguments, which faults may look at."""

    def __init__(self, real: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.real, self.args, self.kwargs = real, args, kwargs

    def __call__(self) -> Any:
        return self.real(*self.args, **self.kwargs)


def fails_with(code: int) -> Act:
    """The call fails with that errno. A failing close has closed all the same, as on Linux."""

    def act(name: str, real: Callable[[], Any]) -> Any:
        if name == "close":
            real()
        raise OSError(code, os.strerror(code))

    return act


def interrupted(name: str, real: Callable[[], Any]) -> Any:
    """EINTR, where Python leaves it to the caller."""
    if name == "pwrite":
        raise InterruptedError(errno.EINTR, "interrupted")
    return real()


def short(name: str, real: Callable[[], Any]) -> Any:
    """A write takes only a part: an odd number of bytes."""
    if name != "pwrite":
        return real()
    assert isinstance(real, _Call)
    fd, view, offset = real.args
    return real.real(fd, view[: max(1, len(view) // 3)], offset)


def lost(name: str, real: Callable[[], Any]) -> Any:
    """Success is reported, and nothing was done."""
    if name in ("create", "close"):  # without a descriptor nobody can pretend
        return real()
    assert isinstance(real, _Call)
    return len(real.args[1]) if name == "pwrite" else None


SYSTEM_FAULTS: dict[str, Act] = {
    "ENOSPC": fails_with(errno.ENOSPC),
    "EDQUOT": fails_with(errno.EDQUOT),
    "EIO": fails_with(errno.EIO),
    "EROFS": fails_with(errno.EROFS),
    "ESTALE": fails_with(errno.ESTALE),
    "EINTR": interrupted,
    "short write": short,
}


def refuses(error: Callable[[], Exception]) -> Act:
    """The operation is not done, and fails."""

    def act(name: str, real: Callable[[], Any]) -> Any:
        raise error()

    return act


def answer_lost(name: str, real: Callable[[], Any]) -> Any:
    """The operation is done, and reported as failed: the connection broke before the answer."""
    result = real()
    if isinstance(result, Reader):
        result.close()
    raise StorageUnavailableError(f"injected: connection reset after {name}")


READS = frozenset(
    {"list_dir", "list_tree", "size", "exists", "read_bytes", "open_reader", "read_into", "free_bytes"}
    | {"versions", "last_change"}
)


def swallowed(name: str, real: Callable[[], Any]) -> Any:
    """Success is reported, and nothing was done. Reads have nothing to swallow."""
    if name in READS:
        return real()
    if name == "write_shard":
        stats = real()
        assert isinstance(real, _Call)
        real.args[-1]()  # the file vanishes again
        return stats
    if name == "clear_dir":
        return Cleared(0, (), gone=True)
    return True if name == "rename" else None


STORAGE_FAULTS: dict[str, Act] = {
    "503": refuses(lambda: StorageUnavailableError("injected: 503 Slow Down")),
    "500": refuses(lambda: StorageUnavailableError("injected: 500 Internal Error")),
    "reset": refuses(
        lambda: storage_error(ConnectionResetError(errno.ECONNRESET, "reset"), "use", "injected")
    ),
    "full": refuses(lambda: StorageFullError("injected: no space")),
    "denied": refuses(lambda: StorageDeniedError("injected: read-only")),
    "EIO": refuses(lambda: StorageError("injected: input/output error")),
    "answer lost": answer_lost,
}


class _FaultReader(Reader):
    def __init__(self, inner: Reader, turn: Callable[..., Any]) -> None:
        self._inner, self._turn = inner, turn

    @property
    def file_bytes(self) -> int:
        return self._inner.file_bytes

    def read_into(self, offset: int, view: memoryview) -> None:
        self._turn("read_into", self._inner.read_into, offset, view)

    def close(self) -> None:
        self._inner.close()


class FaultStorage(Storage):
    """Passes everything on to another storage, through a trigger."""

    def __init__(self, inner: Storage, trigger: Trigger) -> None:
        self.inner, self._trigger = inner, trigger
        self.uri, self.is_local, self.durability = inner.uri, inner.is_local, inner.durability

    def _turn(self, name: str, real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._trigger.turn(name, _Call(real, args, kwargs))

    @property
    def supports_exclusive_create(self) -> bool:
        return self.inner.supports_exclusive_create

    def list_dir(self, path: str = "") -> list[Entry]:
        return self._turn("list_dir", self.inner.list_dir, path)  # type: ignore[no-any-return]

    def list_tree(self) -> dict[str, dict[str, int]]:
        return self._turn("list_tree", self.inner.list_tree)  # type: ignore[no-any-return]

    def size(self, path: str) -> int:
        return self._turn("size", self.inner.size, path)  # type: ignore[no-any-return]

    def exists(self, path: str) -> bool:
        return self._turn("exists", self.inner.exists, path)  # type: ignore[no-any-return]

    def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
        return self._turn("read_bytes", self.inner.read_bytes, path, max_bytes=max_bytes)  # type: ignore[no-any-return]

    def open_reader(self, path: str) -> Reader:
        return _FaultReader(self._turn("open_reader", self.inner.open_reader, path), self._turn)

    def write_file(self, path: str, data: bytes) -> None:
        self._turn("write_file", self.inner.write_file, path, data)

    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        self._turn("publish", self.inner.publish, path, data, exclusive=exclusive)

    def write_shard(self, path: str, source: Source) -> WriteStats:
        def write(vanish: Callable[[], None]) -> WriteStats:
            return self.inner.write_shard(path, source)

        return self._turn("write_shard", write, lambda: self.inner.delete_file(path))  # type: ignore[no-any-return]

    def make_dir(self, path: str = "") -> None:
        self._turn("make_dir", self.inner.make_dir, path)

    def sync_dir(self, path: str = "") -> None:
        self._turn("sync_dir", self.inner.sync_dir, path)

    def rename(self, src: str, dst: str) -> bool:
        return self._turn("rename", self.inner.rename, src, dst)  # type: ignore[no-any-return]

    def delete_file(self, path: str) -> None:
        self._turn("delete_file", self.inner.delete_file, path)

    def delete_tree(self, path: str) -> None:
        self._turn("delete_tree", self.inner.delete_tree, path)

    def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
        return self._turn("clear_dir", self.inner.clear_dir, path, ours)  # type: ignore[no-any-return]

    def versions(self, path: str) -> dict[str, str]:
        return self._turn("versions", self.inner.versions, path)  # type: ignore[no-any-return]

    def last_change(self, path: str) -> float | None:
        return self._turn("last_change", self.inner.last_change, path)  # type: ignore[no-any-return]

    def link_target(self, path: str) -> str | None:
        return self.inner.link_target(path)

    def why_not_ours(self, path: str) -> str:
        return self.inner.why_not_ours(path)

    def free_bytes(self) -> int | None:
        return self._turn("free_bytes", self.inner.free_bytes)  # type: ignore[no-any-return]
