"""One rank's shards follow the copy into the arena, but not at its heels."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.format.layout import plan_files
from engine.save import write
from engine.save.filling import Filling
from engine.save.staged import staged_files
from engine.save.staging_buffer import Arena
from engine.storage import shard_writer
from engine.storage.local import LocalStorage
from tests.support.boxes import whole
from tests.support.controlled import DEADLINE_SECS


class Noting(Filling):
    """Notes up to where the writer waits."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    def wait_until(self, end_bytes: int) -> None:
        self.asked.append(end_bytes)
        super().wait_until(end_bytes)


def test_writing_begins_with_half_of_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier it would hold up the copy, for which training waits; later the disk would wait for the copy."""
    monkeypatch.setattr(shard_writer, "WINDOW_BYTES", 8192)
    arena = Arena(plan_files(0, [whole("a", 20_000)]), pin=False)
    arena.wait_ready()
    half, filling = arena.file_bytes // 2, Noting()
    written = threading.Thread(
        target=write.write_rank,
        args=(LocalStorage(tmp_path), "step-00000001-00000000", staged_files(arena, filling)),
        kwargs={"rank": 0, "world_size": 1, "local": {}, "secs": {}},
    )
    written.start()
    filling.advance(arena.file_bytes)
    written.join(DEADLINE_SECS)
    assert not written.is_alive()
    ends = [min(begin + 8192, arena.file_bytes) for begin in range(0, arena.file_bytes, 8192)]
    assert sorted(filling.asked) == sorted([*(max(end, half) for end in ends), arena.file_bytes])
