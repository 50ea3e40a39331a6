"""`python bench/save_latency.py`: what a save costs a training loop, for Holdfast and its peers in one run.

Starts its ranks through torch's launcher, also a single one: torch's process-based save needs a process
group. Exit status: 0 after a run, whatever the figures; 1 when ranks broke down; 2 for a wrong flag.
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

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    # Run by path: Python has put this folder first, where its modules would hide others of their names.
    sys.path[0] = str(ROOT)

from bench.options import Options, parse  # noqa: E402

if __name__ == "__mp_main__":
    # A process that a peer has spawned, which imports this module again: torch logs every request there.
    logging.disable(logging.WARNING)

FOLDER = "HOLDFAST_BENCH_FOLDER"
"""Environment variable that tells a rank where to write."""
ARGUMENTS = "HOLDFAST_BENCH_ARGUMENTS"
"""The rank's command line as JSON: torchrun would take some of our flags for its own."""

_NOISY = ("torch.distributed.device_mesh", "torch_checkpointing")
"""Loggers that warn about every single save of sharded tensors."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    rank_arguments = os.environ.get(ARGUMENTS)
    if rank_arguments is not None:
        return _rank(parse(json.loads(rank_arguments)), Path(os.environ[FOLDER]))
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.load is not None:
        from bench.report import read

        return _show(options, read(options.load))
    return _launch(options, argv)


def _launch(options: Options, argv: Sequence[str]) -> int:
    """Start the ranks in a folder of their own, and delete it whatever happens."""
    options.dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="save-latency-", dir=options.dir.resolve()))
    threads = max(1, len(os.sched_getaffinity(0)) // options.nproc)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        FOLDER: str(folder),
        ARGUMENTS: json.dumps(list(argv)),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={options.nproc}", "-m", "bench.save_latency"]
    try:
        return int(subprocess.run(command, env=environment, check=False).returncode != 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rank(options: Options, folder: Path) -> int:
    """One rank: measure; rank 0 also reports."""
    import torch

    from bench.report import Report
    from bench.session import Session
    from engine.run import setup
    from engine.run.parent import follow_launcher

    follow_launcher()
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    world = setup.World.from_environ()
    device = setup.choose_device(options.device, world)
    setup.join(world, cuda=device.type == "cuda")
    provenance = _provenance(folder, device) if world.is_first else {}
    setup.seed_everything(options.seed, world, deterministic=False, device=device)
    session = Session(options, world, device, folder)
    measured = session.run()
    if world.is_first:
        given = {name: value for name, value in asdict(options).items() if not isinstance(value, Path)}
        state = {
            "name": options.state,
            "ranks": world.world_size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "cuda": device.type == "cuda",
            **session.state,
        }
        _show(options, Report(provenance, given, state, session.facts, measured))
    setup.leave()
    return 0


def _provenance(folder: Path, device: object) -> dict[str, object]:
    from bench.provenance import collect

    return collect(folder, str(device))


def _show(options: Options, report: object) -> int:
    """Print the tables, write the JSON, draw the picture."""
    from bench.report import Report

    assert isinstance(report, Report)
    if options.json is not None:
        report.write(options.json)
    print(report.text(), flush=True)
    if options.plot is not None:
        from bench.plot import draw

        draw(report, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
