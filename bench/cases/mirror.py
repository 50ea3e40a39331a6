"""`python bench/mirror.py`: what a slow mirror costs the saves in front of it.

The same saves with and without a mirror, block after block in one process. The mirror is a directory that
takes `--mb_per_sec`, so that it is busy from the first save to the last.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from bench.harness.launch import temporary_folder
from bench.harness.options import above_zero, add_dir_flag, at_least, base_parser, given
from bench.harness.passes import PassesReport, run_passes
from bench.harness.provenance import collect
from bench.harness.records import paired_ratio
from bench.harness.report import Verdict, at_most, finish
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


@dataclass
class MirrorReport(PassesReport):
    """Seconds from the call of `save` to the commit; a sample is the median of one block of saves."""

    @property
    def ratio(self) -> float:
        """How many times as long a save takes with the mirror."""
        return paired_ratio(self.secs["mirrored"], self.secs["alone"])

    def title(self) -> str:
        return "Saves alone, and in front of a mirror of {mb_per_sec:g} MB/s".format(**self.options)

    def verdicts(self) -> list[Verdict]:
        return [at_most("with the mirror / without", self.ratio, MOST)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return finish(options, lambda: measure(options))


def measure(options: argparse.Namespace) -> MirrorReport:
    """Both blocks of every repeat; the first repeat warms up and does not count."""
    state = {"values": {"t": torch.rand(options.state_mb * 1_000_000 // 4)}}
    with temporary_folder(options.dir, "mirror") as folder:

        def block(mirrored: bool) -> float:
            second = Slow(folder / "mirror", options.mb_per_sec * 1e6) if mirrored else None
            return median(_block(folder, state, options.saves, second))

        secs = run_passes(
            {"alone": lambda _: block(False), "mirrored": lambda _: block(True)},
            repeats=options.repeats,
            seed=options.seed,
            untimed=1,
        )
        report = MirrorReport(collect(folder), given(options), {}, secs)
    report.facts["ratio"] = report.ratio
    return report


def _block(folder: Path, state: dict[str, Any], saves: int, second: Slow | None) -> list[float]:
    """Seconds of each save but the first, which allocates the staging buffer."""
    secs = []
    # The uploader opens this directory, whatever the mirror's address says.
    with patch.object(uploader, "open_storage", lambda *_: second):
        mirror = "slow:" if second else None
        checkpointer = Checkpointer(folder / "local", state, mirror=mirror)
        for step in range(1, saves + 2):
            begun = time.perf_counter()
            checkpointer.save(step).result()
            secs.append(time.perf_counter() - begun)
            checkpointer.wait()
        checkpointer.close(uploader.at_most(0.0))
    for name in ("local", "mirror"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return secs[1:]


def _parser() -> argparse.ArgumentParser:
    parser = base_parser("mirror", "What a slow mirror costs the saves in front of it.", repeats=7)
    parser.add_argument(
        "--state_mb", type=at_least(1), default=250, help="size of the state in MB (default: %(default)s)"
    )
    parser.add_argument(
        "--mb_per_sec", type=above_zero, default=5.0, help="what the mirror takes (default: %(default)s)"
    )
    parser.add_argument(
        "--saves", type=at_least(1), default=5, help="saves of a block that count (default: %(default)s)"
    )
    add_dir_flag(parser)
    return parser
