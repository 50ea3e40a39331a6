"""Starts the ranks of a benchmark through torch's launcher and returns what rank 0 has measured.

Even a single rank is started that way: torch's process-based save needs a process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

PART = "HOLDFAST_BENCH_PART"
"""The environment variable with a rank's orders as JSON: torchrun would take some flags for its own."""
RESULT = "result.json"


class RanksFailed(Exception):
    """A rank ended with an error, which it has printed."""


@contextlib.contextmanager
def temporary_folder(directory: Path, benchmark: str) -> Iterator[Path]:
    """A folder in `directory`, which is created if necessary; the folder is deleted at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f"{benchmark}-", dir=directory.resolve(), ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)


def run_ranks(module: str, ranks: int, folder: Path, argv: Sequence[str], **task: Any) -> Any:
    """Run the function `rank` of a module on every rank; returns rank 0's result, through JSON.

    Args:
        argv: the benchmark's command line; each rank parses it again.
        task: further arguments of `rank`, through JSON.

    Raises:
        RanksFailed: a rank ended with an error.
    """
    part = {"module": module, "folder": str(folder), "argv": list(argv), "task": task}
    environment = {
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // ranks)),
        **os.environ,
        PART: json.dumps(part),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", "bench.harness.rank"]
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise RanksFailed
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))
