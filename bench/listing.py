"""`python bench/listing.py`: what listing a directory of checkpoints costs, beyond starting Python.

The bar: a list of 20 local checkpoints takes at most 0.3 s more than a bare interpreter. Both are timed in
turn, in an order that is new in each repeat.

Exit status: 0 after a run, whatever the figures; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run by path: Python has put this folder first, where its modules would hide others of their names.
    sys.path[0] = str(ROOT)

from bench.document import write_document  # noqa: E402
from bench.program import add_common_flags, at_least, verdict  # noqa: E402

VERSION = 1
"""Of the document that `--json` writes."""

MOST_MORE_SECS = 0.3


@dataclass(slots=True)
class Result:
    """Seconds of each run: of the whole program that lists, and of an interpreter that does nothing.

    `listed`: how many checkpoints the program had lines for.
    """

    checkpoints: int
    tensors: int
    provenance: dict[str, Any]
    listed: int = 0
    list_secs: list[float] = field(default_factory=list)
    bare_secs: list[float] = field(default_factory=list)

    @property
    def more_secs(self) -> float:
        """What listing takes beyond the bare interpreter: the difference of the medians."""
        return median(self.list_secs) - median(self.bare_secs)

    def text(self) -> str:
        """The figures against the bar."""
        repeats = len(self.list_secs)
        outcome = verdict(self.more_secs, MOST_MORE_SECS)
        return "\n".join(
            [
                f"{self.checkpoints} checkpoints, each {self.tensors} tensors; medians of {repeats}:",
                f"  bare interpreter {median(self.bare_secs) * 1e3:6.0f} ms",
                f"  list             {median(self.list_secs) * 1e3:6.0f} ms; "
                f"{self.more_secs * 1e3:.0f} ms more, at most {MOST_MORE_SECS * 1e3:g} ms: {outcome}",
            ]
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    result = measure(options)
    if options.json is not None:
        write_document(options.json, VERSION, asdict(result))
    print(result.text(), flush=True)
    return 0


def measure(options: argparse.Namespace) -> Result:
    """Save the checkpoints, then list them and start bare interpreters."""
    from bench.provenance import collect

    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="listing-", dir=options.dir) as folder:
        _save(folder, options.checkpoints, options.tensors)
        result = Result(options.checkpoints, options.tensors, collect(Path(folder), "cpu"))
        programs = {
            "list": [sys.executable, "-m", "engine.checkpoints", "list", folder],
            "bare": [sys.executable, "-c", "pass"],
        }
        for number in range(options.repeats):
            for what in random.Random(f"{options.seed}/{number}").sample(sorted(programs), len(programs)):
                begin = time.perf_counter()
                done = subprocess.run(programs[what], cwd=ROOT, check=True, capture_output=True)
                getattr(result, f"{what}_secs").append(time.perf_counter() - begin)
                if what == "list":
                    result.listed = done.stdout.count(b"committed")
    return result


def _save(folder: str, checkpoints: int, tensors: int) -> None:
    import torch
    from torch import nn

    from engine import Checkpointer

    state = {"model": nn.ParameterList(nn.Parameter(torch.zeros(4, 4)) for _ in range(tensors))}
    with Checkpointer(folder, state, retention=None) as checkpointer:
        for step in range(1, checkpoints + 1):
            checkpointer.save(step).result(60)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="listing", description="What listing checkpoints costs beyond starting Python."
    )
    parser.add_argument("--checkpoints", type=at_least(1), default=20, help="how many (default: %(default)s)")
    parser.add_argument(
        "--tensors",
        type=at_least(1),
        default=592,
        help="in each (default: %(default)s, GPT-2 124M with AdamW)",
    )
    parser.add_argument(
        "--repeats", type=at_least(1), default=9, help="runs that are timed (default: %(default)s)"
    )
    add_common_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
