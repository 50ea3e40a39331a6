"""The process of one row: moves shards, and measures the seconds and the memory of each."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

from bench.cases.remote.rows import ROWS
from bench.harness.resources import status_bytes

WARM_UP_BYTES = 20 << 20


class Worker:
    """A row with its buffer. `given`: a stretch of bytes that every uploaded shard repeats."""

    def __init__(
        self, number: int, uri: str, options: dict[str, str], shard_bytes: int, given: bytes
    ) -> None:
        self._row, self._given = ROWS[number], given
        self._move = self._row.make(uri, options)
        self._buffer = memoryview(mmap.mmap(-1, shard_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        content = given if self._row.verb == "upload" else bytes(len(given))
        for begin in range(0, shard_bytes, len(content)):
            piece = self._buffer[begin : begin + len(content)]
            piece[:] = content[: len(piece)]
        self._move("warm-up", self._buffer[:WARM_UP_BYTES])  # modules, connections
        self._before_bytes = status_bytes("VmRSS")

    def move(self, name: str) -> tuple[float, int]:
        """Move the shard of that name; returns seconds, and the most memory beyond the warm-up's."""
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        begun = time.perf_counter()
        result = self._move(name, self._buffer)
        secs = time.perf_counter() - begun
        del result
        above_bytes = status_bytes("VmHWM") - self._before_bytes
        checked = self._row.verb == "download" and not self._row.peer
        if checked and self._buffer[: len(self._given)] != self._given:
            raise ValueError(f"{name} came back changed")
        return secs, above_bytes


_worker: Worker | None = None
"""This process's own."""


def start(number: int, uri: str, options: dict[str, str], shard_bytes: int, given: bytes) -> None:
    """Prepare this process for a row."""
    global _worker
    _worker = Worker(number, uri, options, shard_bytes, given)


def move(name: str) -> tuple[float, int]:
    """`Worker.move` of this process's row."""
    assert _worker is not None
    return _worker.move(name)
