"""`python bench/listing.py`: what it costs to list a directory of checkpoints, beyond starting Python.

The bar: a list of 20 local checkpoints takes at most 0.3 s more than a bare interpreter.
"""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness.launch import ROOT
from bench.harness.passes import Benchmark, Passes, Secs, count
from bench.harness.report import Verdict, at_most

MOST_MORE_SECS = 0.3


@contextmanager
def passes(options: Namespace, folder: Path) -> Iterator[Passes]:
    """The whole program that lists, and an interpreter that does nothing."""
    import torch
    from torch import nn

    from engine import Checkpointer

    state = {"model": nn.ParameterList(nn.Parameter(torch.zeros(4, 4)) for _ in range(options.tensors))}
    with Checkpointer(folder, state, retention=None) as checkpointer:
        for step in range(1, options.checkpoints + 1):
            checkpointer.save(step).result(60)

    def run(*arguments: str, lines: int) -> float:
        begun = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        secs = time.perf_counter() - begun
        assert done.stdout.count(b"committed") == lines, "the list is not complete"
        return secs

    lister = ("-m", "engine.checkpoints", "list", str(folder))
    yield {
        "list_secs": lambda _: run(*lister, lines=options.checkpoints),
        "bare_secs": lambda _: run("-c", "pass", lines=0),
    }


def verdicts(options: Mapping[str, Any], secs: Secs) -> list[Verdict]:
    """The difference of the medians against its bar."""
    more = median(secs["list_secs"]) - median(secs["bare_secs"])
    return [at_most("list, beyond a bare interpreter", more, MOST_MORE_SECS, "s")]


LISTING = Benchmark(
    name="listing",
    description="What listing checkpoints costs beyond starting Python.",
    repeats=9,
    flags={
        "checkpoints": count(1, 20, "how many"),
        "tensors": count(1, 592, "in each; GPT-2 124M with AdamW has 592"),
    },
    title="{checkpoints} checkpoints, each {tensors} tensors",
    passes=passes,
    verdicts=verdicts,
)
main = LISTING.main
