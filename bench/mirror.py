"""`python bench/mirror.py`: what a slow mirror costs the saves in front of it.

The same saves with and without a mirror, block after block in one process. The mirror is a directory that
takes `--mb_per_sec`, so that it is busy from the first save to the last.

Exit status: 0 after a run, whatever the figures; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run by path: Python has put this folder first, where its modules would hide others of their names.
    sys.path[0] = str(ROOT)

import torch  # noqa: E402

from bench.document import write_document  # noqa: E402
from bench.program import add_common_flags, at_least  # noqa: E402
from engine import Checkpointer  # noqa: E402
from engine.mirror import uploader  # noqa: E402
from engine.mirror.uploader import at_most  # noqa: E402
from engine.storage.base import WriteStats  # noqa: E402
from engine.storage.local import LocalStorage  # noqa: E402
from engine.storage.source import Source, Window  # noqa: E402

VERSION = 1
"""Of the document that `--json` writes."""

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


@dataclass(slots=True)
class Report:
    """Seconds from the call of `save` to the commit, of every repeat's block: the median of its saves."""

    provenance: dict[str, Any]
    options: dict[str, Any]
    alone: list[float] = field(default_factory=list)
    mirrored: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median over the repeats, since both blocks of one share its conditions."""
        return median(theirs / own for own, theirs in zip(self.alone, self.mirrored, strict=True))

    def text(self) -> str:
        """Figures and verdict."""
        rows = (("without a mirror", self.alone), ("with the mirror", self.mirrored))
        lines = [
            f"{name:18} {median(secs):7.3f} s ({min(secs):.3f} to {max(secs):.3f})" for name, secs in rows
        ]
        mark = "holds " if self.ratio <= MOST else "MISSED"
        return "\n".join([*lines, f"{mark} {self.ratio:.3f} x, at most {MOST}"])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not options.mb_per_sec > 0:
        parser.error(f"--mb_per_sec is {options.mb_per_sec:g}, but must be above 0")
    report = measure(options)
    if options.json is not None:
        write_document(options.json, VERSION, {**asdict(report), "ratio": report.ratio})
    print(report.text(), flush=True)
    return 0


def measure(options: argparse.Namespace) -> Report:
    """Both blocks of every repeat, in an order of its own; the first two, which warm up, do not count."""
    from bench.provenance import collect

    given = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="mirror-", dir=options.dir.resolve()))
    report = Report(collect(folder, "cpu"), given)
    state = {"values": {"t": torch.rand(options.state_mb * 1_000_000 // 4)}}
    try:
        for repeat in range(options.repeats + 1):
            order = [False, True]
            random.Random(f"{options.seed}/{repeat}").shuffle(order)
            for mirrored in order:
                secs = _block(folder / "block", state, options, mirrored)
                if repeat:
                    (report.mirrored if mirrored else report.alone).append(median(secs))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report


def _block(folder: Path, state: dict[str, Any], options: argparse.Namespace, mirrored: bool) -> list[float]:
    """Seconds of each save but the first, which takes the arena's memory."""
    second = Slow(folder / "mirror", options.mb_per_sec * 1e6) if mirrored else None
    secs = []
    with _opens(second):
        checkpointer = Checkpointer(folder / "local", state, mirror="slow:" if mirrored else None)
        for step in range(1, options.saves + 2):
            begun = time.perf_counter()
            checkpointer.save(step).result()
            secs.append(time.perf_counter() - begun)
            checkpointer.wait()
        checkpointer.close(at_most(0.0))
    shutil.rmtree(folder)
    return secs[1:]


@contextmanager
def _opens(second: Slow | None) -> Iterator[None]:
    """`slow:` as a mirror's address means this directory."""
    real = uploader.open_storage
    if second is not None:
        uploader.open_storage = lambda address, options=None: second  # type: ignore[assignment]
    try:
        yield
    finally:
        uploader.open_storage = real


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mirror", description="What a slow mirror costs the saves in front of it."
    )
    parser.add_argument(
        "--state_mb", type=at_least(1), default=250, help="size of the state in MB (default: 250)"
    )
    parser.add_argument("--mb_per_sec", type=float, default=5.0, help="what the mirror takes (default: 5)")
    parser.add_argument(
        "--saves", type=at_least(1), default=5, help="saves of a block that count (default: 5)"
    )
    parser.add_argument("--repeats", type=at_least(1), default=7, help="pairs of blocks (default: 7)")
    add_common_flags(parser, dir_help="on the disk to measure")
    return parser


if __name__ == "__main__":
    sys.exit(main())
