"""`python bench/restore.py`: what a restore takes, for Holdfast, its peers and the raw disk in one run.

For each case, one set of ranks saves every row's checkpoint, and another one restores all of them.
Exit status: 0 after a run, whatever the figures; 1 when ranks failed; 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases.modes.registry import LOADS
from bench.cases.restore.records import Case, Measured
from bench.cases.restore.report import RestoreReport, read
from bench.harness.launch import run_ranks, temporary_folder
from bench.harness.options import add_model_flags, base_parser, given
from bench.harness.provenance import collect
from bench.harness.records import Failure
from bench.harness.report import finish

if TYPE_CHECKING:
    import torch

    from engine.run.world import World

_CASE = re.compile(r"([1-9]\d*):([1-9]\d*)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    return finish(options, lambda: _measure(options, argv), read)


def _measure(options: argparse.Namespace, argv: Sequence[str]) -> RestoreReport:
    recorded = {**given(options), "cases": [asdict(case) for case in options.cases]}
    with temporary_folder(options.dir, "restore") as folder:
        report = RestoreReport(collect(folder), recorded, [])
        for case in options.cases:
            place = folder / f"{case.saved}-{case.restored}"
            place.mkdir()
            failures = run_ranks(__name__, case.saved, place, argv, case=None, failures=[])
            result = run_ranks(__name__, case.restored, place, argv, case=asdict(case), failures=failures)
            report.cases.append(Measured.from_json(result))
            shutil.rmtree(place)
    report.provenance["device"] = report.cases[0].device
    return report


def rank(
    options: argparse.Namespace,
    world: World,
    device: torch.device,
    folder: Path,
    *,
    case: dict[str, Any] | None,
    failures: list[dict[str, str]],
) -> Any:
    """One rank's part: save, or restore the checkpoints of a case. `failures`: of the rows while saving."""
    from bench.cases.restore.session import RestoreSession
    from bench.harness.sizes import parse_state

    session = RestoreSession(parse_state(options.state), world, device, folder, options.seed)
    if case is None:
        return [asdict(failure) for failure in session.save(options.rows)]
    failed = [Failure(**failure) for failure in failures]
    rows = [row for row in options.rows if row not in {failure.row for failure in failed}]
    measured = session.measure(Case(**case), rows, options.repeats)
    measured.failures[:0] = failed
    return asdict(measured)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line. Exits with 2 and a sentence for a value that cannot work."""
    parser = base_parser(
        "restore",
        "What a restore takes: Holdfast, its peers and the raw disk, interleaved in one run.",
        repeats=5,
    )
    add_model_flags(parser, "--rows", LOADS)
    parser.add_argument(
        "--cases",
        nargs="+",
        type=parse_case,
        default=[Case(1, 1), Case(2, 4)],
        metavar="SAVED:RESTORED",
        help="ranks that save and ranks that restore (default: 1:1 2:4)",
    )
    options = parser.parse_args(argv)
    options.cases = tuple(options.cases)
    options.rows = tuple(name for name in LOADS if name in options.rows)
    return options


def parse_case(text: str) -> Case:
    """An argparse type: "2:4" as a case."""
    match = _CASE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form SAVED:RESTORED, two numbers of ranks such as 2:4"
        )
    return Case(int(match[1]), int(match[2]))
