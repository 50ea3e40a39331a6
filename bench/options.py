"""The command line of the benchmark."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.modes.registry import MODES, choose
from bench.sizes import parse_state


@dataclass(frozen=True, slots=True)
class Options:
    """Every flag; see `--help`."""

    state: str
    nproc: int
    modes: tuple[str, ...]
    repeats: int
    dir: Path
    json: Path | None
    plot: Path | None
    device: str
    dp_replicate: int
    steps: int
    step_secs: float
    growth_saves: int
    growth_state: str
    timeout_secs: float
    seed: int
    load: Path | None


def parse(argv: Sequence[str]) -> Options:
    """Parse the command line. Exits with 2 and a sentence for a value that cannot work, like argparse."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        given.modes = choose(given.modes)
        for state in (given.state, given.growth_state):
            parse_state(state)
    except ValueError as error:
        parser.error(str(error))
    for name, least in (("nproc", 1), ("repeats", 1), ("steps", 2), ("growth_saves", 0), ("dp_replicate", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name} is {getattr(given, name)}, but must be at least {least}")
    if given.nproc % given.dp_replicate:
        parser.error(f"--dp_replicate {given.dp_replicate} does not divide --nproc {given.nproc}")
    if given.growth_saves == 1:
        parser.error("--growth_saves 1 shows no growth: give 2 or more, or 0 to leave that part out")
    if given.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -e '.[bench]'")
    return Options(**vars(given))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="save_latency",
        description="What a save costs a training loop: Holdfast beside its peers, interleaved in one run.",
    )
    parser.add_argument(
        "--state",
        default="gpt2",
        help="gpt2, gpt2-medium or another preset, parameters (20M), or bytes of model and optimizer (250MB)",
    )
    parser.add_argument("--nproc", type=int, default=1, help="ranks; started by torch's launcher")
    parser.add_argument(
        "--modes",
        nargs="+",
        default=list(MODES),
        metavar="MODE",
        help=f"of: {', '.join(MODES)} (all)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="samples of everything")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("runs/bench"),
        help="where to write checkpoints: on the disk to measure (default: %(default)s); a folder of its "
        "own is made in it and deleted at the end",
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--plot", type=Path, help="draw the picture into this .png or .svg")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument(
        "--dp_replicate", type=int, default=1, help="replicas of the model; 1 shards it over all ranks"
    )
    parser.add_argument("--steps", type=int, default=8, help="least training steps in a window")
    parser.add_argument(
        "--step_secs", type=float, default=0.5, help="the batch is chosen for steps of about this length"
    )
    parser.add_argument(
        "--growth_saves",
        type=int,
        default=100,
        help="saves of a small state per mode, to see whether memory grows; 0 leaves this out",
    )
    parser.add_argument("--growth_state", default="2M", help="that small state")
    parser.add_argument(
        "--timeout_secs", type=float, default=120.0, help="a save that takes longer counts as broken"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order, the weights and the tokens")
    parser.add_argument(
        "--load", type=Path, metavar="JSON", help="measure nothing: print and draw an earlier --json"
    )
    return parser
