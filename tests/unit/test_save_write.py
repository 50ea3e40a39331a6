"""One rank's shards are written while the copy into the staging buffer runs, at a distance."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.format.layout import plan_files
from engine.save import write
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.staging_buffer import StagingBuffer
from engine.storage import shard_writer
from engine.storage.local import LocalStorage
from tests.support.boxes import whole
from tests.support.controlled import DEADLINE_SECS


class Noting(StagedSnapshot):
    """Notes up to where the writer waits."""

    def __init__(self, staging: StagingBuffer) -> None:
        super().__init__(staging)
        self.asked: list[int] = []

    def wait_until(self, end_bytes: int) -> None:
        self.asked.append(end_bytes)
        super().wait_until(end_bytes)


def test_writing_begins_with_half_of_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier it would hold up the copy, for which training waits; later the disk would wait for the copy."""
    monkeypatch.setattr(shard_writer, "WINDOW_BYTES", 8192)
    staging = StagingBuffer(plan_files(0, [whole("a", 20_000)]), pin=False)
    staging.wait_ready()
    half, staged = staging.file_bytes // 2, Noting(staging)
    written = threading.Thread(
        target=write.write_rank,
        args=(LocalStorage(tmp_path), "step-00000001-00000000", staged.files()),
        kwargs={"rank": 0, "world_size": 1, "local": {}, "secs": {}},
    )
    written.start()
    staged.advance(staging.file_bytes)
    written.join(DEADLINE_SECS)
    assert not written.is_alive()
    ends = [min(begin + 8192, staging.file_bytes) for begin in range(0, staging.file_bytes, 8192)]
    assert sorted(staged.asked) == sorted([*(max(end, half) for end in ends), staging.file_bytes])
