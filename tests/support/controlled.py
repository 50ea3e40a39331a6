"""A local storage that the test holds up, breaks, and counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from os import PathLike

import pytest

from engine.storage.base import WriteStats
from engine.storage.local import LocalStorage
from engine.storage.source import Source
from engine.storage.system import System
from tests.support.sources import Hooked

DEADLINE_SECS = 60.0
"""For what must happen; a test that reaches it has failed."""


class ControlledStorage(LocalStorage):
    """Writes shards only while `gate` is open, raises `broken` in the middle of one, counts what it does.

    Attributes:
        gate: cleared, every shard waits before its first byte.
        writing: set as soon as a shard is being written.
        broken: called with the path of each shard after half of it went out; may raise.
        written: bytes by file name, of shards and of small files.
        calls: how often each method was called.
    """

    def __init__(self, root: str | PathLike[str], *, system: System | None = None) -> None:
        super().__init__(root, system=system)
        self.gate = threading.Event()
        self.gate.set()
        self.writing = threading.Event()
        self.broken: Callable[[str], None] = lambda path: None
        self.written: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def write_shard(self, path: str, source: Source) -> WriteStats:
        self.calls["write_shard"] += 1
        self.writing.set()
        assert self.gate.wait(DEADLINE_SECS), "the test never opened the gate"

        stats = super().write_shard(path, Hooked(source, lambda begin, end: self.broken(path)))
        self.written[path.rpartition("/")[2]] += stats.bytes
        return stats

    def write_file(self, path: str, data: bytes) -> None:
        self.calls["write_file"] += 1
        super().write_file(path, data)
        self.written[path.rpartition("/")[2]] += len(data)

    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        self.calls["publish"] += 1
        super().publish(path, data, exclusive=exclusive)
        self.written[path.rpartition("/")[2]] += len(data)


def use(monkeypatch: pytest.MonkeyPatch, storage: LocalStorage) -> None:
    """Have every Checkpointer that is made from now on write to this storage."""
    monkeypatch.setattr("engine.checkpointer.open_storage", lambda directory, options=None: storage)
