"""`python bench/restore.py`: what a restore takes, for Holdfast, its peers and the raw disk in one run.

For each case one set of ranks saves every row's checkpoint, and another one restores all of them.
Exit status: 0 after a run, whatever the figures; 1 when ranks broke down; 2 for a wrong flag.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run by path: Python has put this folder first, where its modules would hide others of their names.
    sys.path[0] = str(ROOT)

from bench.restoring.options import Options, parse  # noqa: E402
from bench.restoring.records import Case, Measured  # noqa: E402

if __name__ == "__mp_main__":
    # A process that a peer has spawned, which imports this module again: torch logs every request there.
    logging.disable(logging.WARNING)

PART = "HOLDFAST_BENCH_RESTORE"
"""Environment variable that tells a rank what to do, as JSON."""

_NOISY = ("torch.distributed.device_mesh", "torch_checkpointing", "torch.distributed.checkpoint")
_RESULT = "result.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    part = os.environ.get(PART)
    if part is not None:
        return _rank(json.loads(part))
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    from bench.restoring.report import read

    if options.load is not None:
        return _show(options, read(options.load))
    return _run(options, argv)


def _run(options: Options, argv: Sequence[str]) -> int:
    """Every case in a folder of its own, which is deleted whatever happens."""
    from bench.provenance import collect
    from bench.restoring.report import Report

    options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="restore-", dir=options.dir.resolve()))
    given = {name: value for name, value in asdict(options).items() if not isinstance(value, Path)}
    report = Report(collect(folder, options.device), given, [])
    try:
        for case in options.cases:
            place = folder / f"{case.saved}-{case.restored}"
            place.mkdir()
            for verb, count in (("save", case.saved), ("load", case.restored)):
                part = {"verb": verb, "case": asdict(case), "folder": str(place), "arguments": list(argv)}
                if _launch(part, count) != 0:
                    return 1
            document = json.loads((place / _RESULT).read_text(encoding="utf-8"))
            report.cases.append(Measured.from_json(document))
            shutil.rmtree(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _show(options, report)


def _launch(part: dict[str, Any], count: int) -> int:
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // count)),
        **os.environ,
        PART: json.dumps(part),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={count}", "-m", "bench.restore"]
    return subprocess.run(command, env=environment, check=False).returncode


def _rank(part: dict[str, Any]) -> int:
    """One rank: save, or measure; rank 0 leaves the result in the folder."""
    from bench.records import Failure
    from bench.restoring.session import Session
    from bench.sizes import parse_state
    from engine.run import setup
    from engine.run.parent import follow_launcher

    follow_launcher()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    options, case, folder = parse(part["arguments"]), Case(**part["case"]), Path(part["folder"])
    world = setup.World.from_environ()
    device = setup.choose_device(options.device, world)
    setup.join(world, cuda=device.type == "cuda")
    session = Session(parse_state(options.state), world, device, folder, options.seed)
    noted = folder / "failures.json"
    if part["verb"] == "save":
        failures = session.save(options.rows)
        if world.is_first:
            noted.write_text(json.dumps([asdict(failure) for failure in failures]), encoding="utf-8")
    else:
        failures = [Failure(**one) for one in json.loads(noted.read_text(encoding="utf-8"))]
        rows = [row for row in options.rows if row not in {failure.row for failure in failures}]
        measured = session.measure(case, rows, options.repeats)
        measured.failures[:0] = failures
        if world.is_first:
            (folder / _RESULT).write_text(json.dumps(measured.to_json()), encoding="utf-8")
    setup.leave()
    return 0


def _show(options: Options, report: Any) -> int:
    """Print the tables, write the JSON, draw the picture."""
    if options.json is not None:
        report.write(options.json)
    print(report.text(), flush=True)
    if options.plot is not None:
        from bench.restoring.plot import draw

        draw(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
