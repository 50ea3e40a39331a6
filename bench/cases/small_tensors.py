"""`python bench/small_tensors.py`: what `save` costs where the state is many small tensors.

Copying hardly matters there; what the engine does for each tensor does. The bars: `save` returns within
twice the time of the plain copy, plus 10 ms; and to see that nothing has changed takes at most 1 us a tensor.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench.harness.passes import Benchmark, Passes, Secs, count
from bench.harness.report import Verdict, at_most

MOST_TIMES_COPY = 2.0
MOST_MORE_SECS = 0.010
MOST_LOOK_SECS = 1e-6
"""Per tensor, for the pass that finds nothing changed."""


@contextmanager
def passes(options: Namespace, folder: Path) -> Iterator[Passes]:
    """`save`, the plain copy of the same bytes, and looking for changes."""
    import torch
    from torch import nn

    from bench.harness.floors import Floors
    from engine import Checkpointer
    from engine.state.capture import StateCapture

    parameters = [nn.Parameter(torch.randn(options.bytes // 4)) for _ in range(options.tensors)]
    state = {"model": nn.ParameterList(parameters)}
    floors = Floors(parameters, 0, 1, folder)
    capture = StateCapture(state, (), 0)
    capture.capture()
    with Checkpointer(folder, state) as checkpointer:

        def save(turn: int) -> float:
            begun = time.perf_counter()
            handle = checkpointer.save(turn)
            secs = time.perf_counter() - begun
            handle.result(60)
            return secs

        def look(_: int) -> float:
            begun = time.perf_counter()
            capture.capture()
            return time.perf_counter() - begun

        yield {"save_secs": save, "copy_secs": lambda turn: floors.copy(turn).secs, "look_secs": look}


def verdicts(options: Mapping[str, Any], secs: Secs) -> list[Verdict]:
    """`save` against the copy, and the look against its bar."""
    save, copy = median(secs["save_secs"]), median(secs["copy_secs"])
    look = median(secs["look_secs"]) / options["tensors"]
    limit = MOST_TIMES_COPY * copy + MOST_MORE_SECS
    note = f"{MOST_TIMES_COPY:g} x the copy + {MOST_MORE_SECS * 1e3:g} ms"
    return [
        at_most("save", save * 1e3, limit * 1e3, "ms", note),
        at_most("identity, a tensor", look * 1e6, MOST_LOOK_SECS * 1e6, "us"),
    ]


SMALL_TENSORS = Benchmark(
    name="small_tensors",
    description="What `save` costs where the state is many small tensors.",
    repeats=15,
    flags={"tensors": count(1, 10_000, "how many"), "bytes": count(4, 4096, "size of each, a multiple of 4")},
    title="{tensors:,} tensors of {bytes:,} bytes",
    passes=passes,
    verdicts=verdicts,
    untimed=2,  # the first saves allocate the staging buffer and plan
)
main = SMALL_TENSORS.main
