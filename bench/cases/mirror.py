"""`python bench/mirror.py`: what a slow mirror costs the saves in front of it.

The same saves with and without a mirror, block after block in one process. The mirror is a directory that
takes `--mb_per_sec`, so that it is busy from the first save to the last.
"""

from __future__ import annotations

import shutil
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from bench.harness.options import above_zero
from bench.harness.passes import Benchmark, Passes, Secs, count
from bench.harness.records import paired_ratio
from bench.harness.report import Verdict, at_most
from engine import Checkpointer
from engine.mirror import uploader
from engine.storage.base import WriteStats
from engine.storage.local import LocalStorage
from engine.storage.source import Source, Window

MOST = 1.05
"""Seconds with the mirror over seconds without it, at most."""


class Slow(LocalStorage):
    """A directory at the end of a slow line: every byte of a shard waits for its turn."""

    def __init__(self, root: Path, bytes_per_sec: float, wait: Callable[[float], None] = time.sleep) -> None:
        super().__init__(root)
        self._bytes_per_sec, self._wait = bytes_per_sec, wait
        self._line = threading.Lock()

    def write_shard(self, path: str, source: Source) -> WriteStats:
        return super().write_shard(path, _Paced(source, self._take_turn))

    def _take_turn(self, count: int) -> None:
        with self._line:  # files that are written side by side share it
            self._wait(count / self._bytes_per_sec)


class _Paced:
    """A source whose windows wait for their turn on the line."""

    def __init__(self, inner: Source, take_turn: Callable[[int], None]) -> None:
        self._inner, self._take_turn = inner, take_turn

    @property
    def file_bytes(self) -> int:
        return self._inner.file_bytes

    def windows(self, window_bytes: int) -> Generator[Window]:
        for window in self._inner.windows(window_bytes):
            self._take_turn(window.end - window.begin)
            yield window


@contextmanager
def passes(options: Namespace, folder: Path) -> Iterator[Passes]:
    """A block of saves without the mirror, and one with it; the median of each."""
    state = {"values": {"t": torch.rand(options.state_mb * 1_000_000 // 4)}}

    def block(mirror: Slow | None) -> float:
        secs = []
        # The uploader opens this directory, whatever the mirror's address says.
        with patch.object(uploader, "open_storage", lambda *_: mirror):
            checkpointer = Checkpointer(folder / "local", state, mirror="slow:" if mirror else None)
            for step in range(1, options.saves + 2):
                begun = time.perf_counter()
                checkpointer.save(step).result()
                secs.append(time.perf_counter() - begun)
                checkpointer.wait()
            checkpointer.close(uploader.at_most(0.0))
        for name in ("local", "mirror"):
            shutil.rmtree(folder / name, ignore_errors=True)
        return median(secs[1:])  # the first save allocates the staging buffer

    yield {
        "alone": lambda _: block(None),
        "mirrored": lambda _: block(Slow(folder / "mirror", options.mb_per_sec * 1e6)),
    }


def verdicts(options: Mapping[str, Any], secs: Secs) -> list[Verdict]:
    """How many times as long a save takes with the mirror."""
    return [at_most("with the mirror / without", paired_ratio(secs["mirrored"], secs["alone"]), MOST)]


MIRROR = Benchmark(
    name="mirror",
    description="What a slow mirror costs the saves in front of it.",
    repeats=7,
    flags={
        "state_mb": count(1, 250, "size of the state in MB"),
        "mb_per_sec": (above_zero, 5.0, "what the mirror takes"),
        "saves": count(1, 5, "saves of a block that count"),
    },
    title="Seconds from `save` to the commit, alone and in front of a mirror of {mb_per_sec:g} MB/s",
    passes=passes,
    verdicts=verdicts,
    untimed=1,
)
main = MIRROR.main
