"""`python bench/listing.py`: what it costs to list a directory of checkpoints, beyond starting Python.

The bar: a list of 20 local checkpoints takes at most 0.3 s more than a bare interpreter.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.harness.launch import ROOT, temporary_folder
from bench.harness.options import add_dir_flag, at_least, base_parser, given
from bench.harness.passes import PassesReport, run_passes
from bench.harness.provenance import collect
from bench.harness.report import Verdict, at_most, finish

MOST_MORE_SECS = 0.3


@dataclass
class ListingReport(PassesReport):
    """Seconds of the whole program that lists, and of an interpreter that does nothing."""

    @property
    def more_secs(self) -> float:
        """What listing takes beyond the bare interpreter: the difference of the medians."""
        return median(self.secs["list_secs"]) - median(self.secs["bare_secs"])

    def title(self) -> str:
        return "{checkpoints} checkpoints, each {tensors} tensors".format(**self.options)

    def verdicts(self) -> list[Verdict]:
        return [at_most("list, beyond a bare interpreter", self.more_secs, MOST_MORE_SECS, "s")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return finish(options, lambda: measure(options))


def measure(options: argparse.Namespace) -> ListingReport:
    """Save the checkpoints, then list them and start bare interpreters."""
    with temporary_folder(options.dir, "listing") as folder:
        _save(folder, options.checkpoints, options.tensors)
        report = ListingReport(collect(folder), given(options), {}, {})

        def run(*arguments: str) -> float:
            begun = time.perf_counter()
            done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            secs = time.perf_counter() - begun
            if "list" in arguments:
                report.facts["listed"] = done.stdout.count(b"committed")
            return secs

        report.secs = run_passes(
            {
                "list_secs": lambda _: run("-m", "engine.checkpoints", "list", str(folder)),
                "bare_secs": lambda _: run("-c", "pass"),
            },
            repeats=options.repeats,
            seed=options.seed,
        )
    return report


def _save(folder: Path, checkpoints: int, tensors: int) -> None:
    import torch
    from torch import nn

    from engine import Checkpointer

    state = {"model": nn.ParameterList(nn.Parameter(torch.zeros(4, 4)) for _ in range(tensors))}
    with Checkpointer(folder, state, retention=None) as checkpointer:
        for step in range(1, checkpoints + 1):
            checkpointer.save(step).result(60)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser("listing", "What listing checkpoints costs beyond starting Python.", repeats=9)
    parser.add_argument("--checkpoints", type=at_least(1), default=20, help="how many (default: %(default)s)")
    parser.add_argument(
        "--tensors",
        type=at_least(1),
        default=592,
        help="in each (default: %(default)s, as GPT-2 124M with AdamW)",
    )
    add_dir_flag(parser)
    return parser
