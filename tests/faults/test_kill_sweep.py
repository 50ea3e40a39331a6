"""SIGKILL before every system call of a save, a commit and a clean-up; then resume in the same directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]


def sweep(kind: str, rank: int, root: Path, module: str = "kill_sweep") -> int:
    """Run the sweep in a process of its own; how many points it went through."""
    ran = subprocess.run(
        [sys.executable, "-m", f"tests.faults.{module}", kind, str(rank), str(root)],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_whole_job_dies_before_every_call_of_a_save(
    rank: int, root: Path, covered: Callable[[int], None]
) -> None:
    points = sweep("job", rank, root)
    assert points >= (24 if rank == 0 else 14)
    covered(points)


def test_a_rank_or_the_coordinator_dies_around_the_receipts(
    root: Path, covered: Callable[[int], None]
) -> None:
    """Before it, with its files durable, after it; rank 0 with all receipts in and no manifest, and after."""
    points = sweep("moment", 0, root)
    assert points == 6
    covered(points)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_dies_before_every_call_of_a_save(
    victim: int, root: Path, covered: Callable[[int], None]
) -> None:
    """The other one hears of it, by name, before its deadline; the next job resumes."""
    points = sweep("rank", victim, root)
    assert points >= 10
    covered(points)
