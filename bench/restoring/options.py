"""The command line of the restore benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.restoring.records import Case
from bench.restoring.registry import ROWS
from bench.sizes import parse_state

_CASE = re.compile(r"([1-9]\d*):([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class Options:
    """Every flag; see `--help`."""

    state: str
    cases: tuple[Case, ...]
    rows: tuple[str, ...]
    repeats: int
    dir: Path
    json: Path | None
    plot: Path | None
    device: str
    seed: int
    load: Path | None


def parse(argv: Sequence[str]) -> Options:
    """Parse the command line. Exits with 2 and a sentence for a value that cannot work, like argparse."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        parse_state(given.state)
        given.cases = tuple(map(parse_case, given.cases))
    except ValueError as error:
        parser.error(str(error))
    unknown = [name for name in given.rows if name not in ROWS]
    if unknown:
        parser.error(f"--rows: there is no {', '.join(unknown)}; there are {', '.join(ROWS)}")
    given.rows = tuple(name for name in ROWS if name in given.rows)
    if given.repeats < 1:
        parser.error(f"--repeats is {given.repeats}, but must be at least 1")
    if given.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install -e '.[bench]'")
    return Options(**vars(given))


def parse_case(text: str) -> Case:
    """ "2:4" as a case. ValueError for anything else."""
    match = _CASE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"--cases {text!r} is not of the form SAVED:RESTORED, two numbers of ranks such as 2:4"
        )
    return Case(int(match[1]), int(match[2]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="restore",
        description="What a restore takes: Holdfast, its peers and the raw disk, interleaved in one run.",
    )
    parser.add_argument(
        "--state",
        default="gpt2",
        help="gpt2, gpt2-medium or another preset, parameters (20M), or bytes of model and optimizer (250MB)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["1:1", "2:4"],
        metavar="SAVED:RESTORED",
        help="ranks that save and ranks that restore (default: 1:1 2:4)",
    )
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), metavar="ROW", help=f"of: {', '.join(ROWS)} (all)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="samples of everything")
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path("runs/bench"),
        help="where the checkpoints lie: on the disk to measure (default: %(default)s); a folder of its own "
        "is made in it and deleted at the end",
    )
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--plot", type=Path, help="draw the picture into this .png or .svg")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the state is"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the order and the weights")
    parser.add_argument(
        "--load", type=Path, metavar="JSON", help="measure nothing: print and draw an earlier --json"
    )
    return parser
