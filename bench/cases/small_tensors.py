"""`python bench/small_tensors.py`: what `save` costs where the state is many small tensors.

Copying hardly matters there; what the engine does for each tensor does. The bars: `save` returns within
twice the time of the plain copy, plus 10 ms; and to see that nothing has changed takes at most 1 us a tensor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bench.harness.launch import temporary_folder
from bench.harness.options import add_dir_flag, at_least, base_parser, given
from bench.harness.passes import PassesReport, run_passes
from bench.harness.provenance import collect
from bench.harness.report import Verdict, at_most, finish

MOST_TIMES_COPY = 2.0
MOST_MORE_SECS = 0.010
MOST_LOOK_SECS = 1e-6
"""Per tensor, for the pass that finds nothing changed."""


@dataclass
class SmallTensorsReport(PassesReport):
    """Seconds of `save`, of the plain copy of the same bytes, and of looking for changes."""

    @property
    def limit_secs(self) -> float:
        """What `save` may take."""
        return MOST_TIMES_COPY * median(self.secs["copy_secs"]) + MOST_MORE_SECS

    def title(self) -> str:
        return "{tensors:,} tensors of {bytes:,} bytes".format(**self.options)

    def verdicts(self) -> list[Verdict]:
        save, look = median(self.secs["save_secs"]), median(self.secs["look_secs"]) / self.options["tensors"]
        note = f"{MOST_TIMES_COPY:g} x the copy + {MOST_MORE_SECS * 1e3:g} ms"
        return [
            at_most("save", save * 1e3, self.limit_secs * 1e3, "ms", note),
            at_most("identity, a tensor", look * 1e6, MOST_LOOK_SECS * 1e6, "us"),
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    options = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    return finish(options, lambda: measure(options))


def measure(options: argparse.Namespace) -> SmallTensorsReport:
    """Save, copy and look in turn. The first two saves allocate the staging buffer and plan."""
    import torch
    from torch import nn

    from bench.harness.floors import Floors
    from engine import Checkpointer
    from engine.state.capture import StateCapture

    options.bytes = options.bytes // 4 * 4
    parameters = [nn.Parameter(torch.randn(options.bytes // 4)) for _ in range(options.tensors)]
    state = {"model": nn.ParameterList(parameters)}
    with temporary_folder(options.dir, "small-tensors") as folder:
        floors = Floors(parameters, 0, 1, folder)
        capture = StateCapture(state, (), 0)
        capture.capture()
        with Checkpointer(folder, state) as checkpointer:

            def save(number: int) -> float:
                begun = time.perf_counter()
                handle = checkpointer.save(number)
                secs = time.perf_counter() - begun
                handle.result(60)
                return secs

            def look(_: int) -> float:
                begun = time.perf_counter()
                capture.capture()
                return time.perf_counter() - begun

            provenance = collect(folder)
            secs = run_passes(
                {"save_secs": save, "copy_secs": lambda number: floors.copy(number).secs, "look_secs": look},
                repeats=options.repeats,
                seed=options.seed,
                untimed=2,
            )
    return SmallTensorsReport(provenance, given(options), {}, secs)


def _parser() -> argparse.ArgumentParser:
    parser = base_parser(
        "small_tensors", "What `save` costs where the state is many small tensors.", repeats=15
    )
    parser.add_argument("--tensors", type=at_least(1), default=10_000, help="how many (default: %(default)s)")
    parser.add_argument("--bytes", type=at_least(4), default=4096, help="size of each (default: %(default)s)")
    add_dir_flag(parser)
    return parser
