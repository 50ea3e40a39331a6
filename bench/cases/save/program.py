"""`python bench/save_latency.py`: what a save costs a training loop, for Holdfast and its peers in one run.

Exit status: 0 after a run, whatever the figures; 1 when ranks failed; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases.modes.registry import NONE, SAVES
from bench.cases.save.report import SaveReport, read, rebuild
from bench.harness.launch import run_ranks, temporary_folder
from bench.harness.options import above_zero, add_model_flags, at_least, base_parser, given, state
from bench.harness.provenance import collect
from bench.harness.report import finish

if TYPE_CHECKING:
    import torch

    from engine.run.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    return finish(options, lambda: _measure(options, argv), read)


def _measure(options: argparse.Namespace, argv: Sequence[str]) -> SaveReport:
    with temporary_folder(options.dir, "save-latency") as folder:
        provenance = collect(folder)
        result = run_ranks(__name__, options.nproc, folder, argv)
    return rebuild({**provenance, "device": result["state"]["device"]}, given(options), result)


def rank(options: argparse.Namespace, world: World, device: torch.device, folder: Path) -> dict[str, Any]:
    """One rank's part. Collective; the result is complete on rank 0."""
    from bench.cases.save.session import SaveSession

    return SaveSession(options, world, device, folder).run()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Exits with 2 and a sentence for a value that cannot work."""
    parser = base_parser(
        "save_latency",
        "What a save costs a training loop: Holdfast beside its peers, interleaved in one run.",
        repeats=3,
    )
    add_model_flags(parser, "--modes", SAVES, NONE)
    parser.add_argument("--nproc", type=at_least(1), default=1, help="ranks, which torch's launcher starts")
    parser.add_argument(
        "--dp_replicate",
        type=at_least(1),
        default=1,
        help="replicas of the model; 1 shards it over all ranks",
    )
    parser.add_argument("--steps", type=at_least(2), default=8, help="least training steps in a window")
    parser.add_argument(
        "--step_secs", type=float, default=0.5, help="the batch is chosen for steps of about this length"
    )
    parser.add_argument(
        "--growth_saves",
        type=at_least(0),
        default=100,
        help="saves of a small state per mode, to see whether memory grows; 0 leaves this out",
    )
    parser.add_argument("--growth_state", type=state, default="2M", help="that small state")
    parser.add_argument(
        "--timeout_secs", type=above_zero, default=120.0, help="a save that takes longer counts as failed"
    )
    options = parser.parse_args(argv)
    options.modes = tuple(name for name in SAVES if name in options.modes)
    if options.nproc % options.dp_replicate:
        parser.error(f"--dp_replicate {options.dp_replicate} does not divide --nproc {options.nproc}")
    if options.growth_saves == 1:
        parser.error("--growth_saves 1 shows no growth: pass 2 or more, or 0 to leave that part out")
    return options
