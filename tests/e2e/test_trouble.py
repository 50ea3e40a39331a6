"""Workers that die and are restarted, saves that keep failing, and what a resume says it will read."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from demo.job import torchrun
from tests.e2e.harness import TINY, Run, flags, program


def command(run: Run, nproc: int, *launcher: str, **given: Any) -> list[str]:
    values = {**TINY, "data": run.data, "checkpoint_dir": run.checkpoints, "log_dir": run.logs, **given}
    program, *args = torchrun(nproc, *launcher, "-m", "engine.train", *flags(values))
    return [program, *args]


def test_a_worker_that_torchrun_restarts_resumes_by_itself(new_run: Callable[[str], Run]) -> None:
    """No --resume among the flags, and a directory with checkpoints: only the restart tells."""
    run = new_run("restarted")
    given = {"dropout": 0.1, "checkpoint_freq": 3, "max_steps": 40}
    job = run.launch(command(run, 2, "--max_restarts=1", **given))
    job.wait_until(lambda: len(run.committed()) >= 1, 60.0)
    worker = max(pid for pid in job.pids() if pid != job.process.pid)
    os.kill(worker, signal.SIGKILL)
    job.finish(120.0)
    assert len(run.events("restored")) == 1
    assert run.restored_step() in run.committed()
    assert run.losses() == new_run("whole").train(2, **given).losses()


def limited(file_kib: int, command_line: list[str]) -> list[str]:
    """The command with a limit on the size of each file: the metrics fit, the shards do not."""
    return ["bash", "-c", f'ulimit -f {file_kib}; exec "$@"', "bash", *command_line]


def test_training_survives_failed_saves_until_there_are_too_many(new_run: Callable[[str], Run]) -> None:
    run = new_run("full")
    job = run.launch(limited(2000, command(run, 2, checkpoint_freq=1, max_steps=50)))
    assert job.wait(90.0) == 1
    failed = run.events("save_failed")
    assert [event["step"] for event in failed] == [1, 2, 3]
    assert all("ulimit" in event["cause"] for event in failed)
    assert len(run.events("step")) >= 3
    assert run.committed() == []
    assert job.output().count("3 saves in a row failed") == 1, "rank 0 speaks for all"
    assert "engine/train/" not in job.output(), "no traceback of ours"


def test_zero_stops_at_the_first(new_run: Callable[[str], Run]) -> None:
    run = new_run("full")
    values = {**TINY, "data": run.data, "checkpoint_dir": run.checkpoints, "log_dir": run.logs}
    args = [*flags({**values, "checkpoint_freq": 1, "max_steps": 50, "max_save_failures": 0})]
    job = run.launch(limited(2000, [sys.executable, "-m", "engine.train", *args]))
    assert job.wait(90.0) == 2
    assert [event["step"] for event in run.events("save_failed")] == [1]
    assert "1 save in a row failed" in job.output()


@pytest.mark.parametrize(("ranks", "replicas"), [(1, 1), (3, 1), (2, 2)])
def test_the_dry_run_foretells_the_bytes(
    undisturbed_2: Run, tmp_path: Path, ranks: int, replicas: int
) -> None:
    run = undisturbed_2.copy_to(tmp_path / "again")
    args = ("--from=step:3", f"--reshard={ranks}", f"--dp_replicate={replicas}")
    shown = program("engine.resume", f"--checkpoint_dir={run.checkpoints}", "--dry_run", *args).ok().stdout
    (foretold,) = re.findall(r"^rank 0 reads ([0-9,]+) bytes", shown, re.MULTILINE)
    run.resume(*args, max_steps=4)
    assert run.events("restored")[-1]["bytes"] == int(foretold.replace(",", ""))
