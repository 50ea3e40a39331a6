"""Local storages that record what is done to them, or that lack what object stores lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.storage.base import Cleared
from engine.storage.local import LocalStorage


class RecordingStorage(LocalStorage):
    """Notes every call that changes something, in order, as "verb path"."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: list[str] = []

    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        self.calls.append(f"publish {path}")
        super().publish(path, data, exclusive=exclusive)

    def rename(self, src: str, dst: str) -> bool:
        self.calls.append(f"rename {src} {dst}")
        return super().rename(src, dst)

    def delete_file(self, path: str) -> None:
        self.calls.append(f"delete_file {path}")
        super().delete_file(path)

    def delete_tree(self, path: str) -> None:
        self.calls.append(f"delete_tree {path}")
        super().delete_tree(path)

    def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
        self.calls.append(f"clear_dir {path}")
        return super().clear_dir(path, ours)

    def sync_dir(self, path: str = "") -> None:
        self.calls.append(f"sync_dir {path}")
        super().sync_dir(path)


class StoreLike(LocalStorage):
    """Behaves like an object store in what the catalog cares about: it cannot rename."""

    is_local = False

    def rename(self, src: str, dst: str) -> bool:
        return False


class LastWriterWins(StoreLike):
    """A store without exclusive creation. `meanwhile` runs after each publish: the other writers."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.meanwhile: Callable[[], None] = lambda: None

    @property
    def supports_exclusive_create(self) -> bool:
        return False

    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        super().publish(path, data, exclusive=False)
        self.meanwhile()
