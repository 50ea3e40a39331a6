"""SIGTERM in every phase of a run, and workers that torchrun starts anew: the step reached is never lost."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.job import torchrun
from tests.e2e.harness import TINY, Run, flags, program
from tests.faults.signalled_train import IN_FLIGHT, PHASES

GIVEN = {"checkpoint_freq": 2, "keep_checkpoints": 2, "eval_freq": 3, "eval_batches": 1, "max_steps": 100_000}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "tiny"
    source = Path(os.__file__).parent / "json"
    program(
        "data.prepare", f"--source={source}", f"--out={out}", "--tokenizer=bytes", "--val_fraction=0.1"
    ).ok()
    return out


def values(run: Run, **more: object) -> dict[str, object]:
    return {**TINY, **GIVEN, "data": run.data, "checkpoint_dir": run.checkpoints, "log_dir": run.logs, **more}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_loses_no_step(
    phase: str, data: Path, tmp_path: Path, covered: Callable[[int], None]
) -> None:
    run = Run(tmp_path / "run", data)
    more: dict[str, object] = {}
    if phase == "restore":
        run.train(None, **{**GIVEN, "max_steps": 4})
        more = {"resume": "latest"}
    nth = {"step": 5, "eval": 2, "restore": 1}.get(phase, 3)
    command = [sys.executable, "-m", "tests.faults.signalled_train", phase, str(nth)]
    job = run.launch([*command, *flags(values(run, **more))])
    job.wait(90.0)
    said = job.output()
    assert "Traceback" not in said, said
    reached = max(run.losses())
    listing = run.listing()
    assert {checkpoint["status"] for checkpoint in listing} == {"committed"}, said
    assert max(checkpoint["step"] for checkpoint in listing) == reached, said
    if phase != "restore":
        assert re.search(rf"^signal 15: (.* has ended, )?saving step {reached} \(", said, re.MULTILINE), said
    program("engine.checkpoints", "verify", run.checkpoints).ok()
    run.train(None, **{**GIVEN, "resume": "latest", "max_steps": reached + 1})
    assert run.restored_step() == reached
    covered(1)


@pytest.mark.slow
@pytest.mark.parametrize("phase", IN_FLIGHT)
def test_a_signal_while_a_save_is_in_flight(
    phase: str, data: Path, tmp_path: Path, covered: Callable[[int], None]
) -> None:
    """It is finished; another one is taken if the time left allows it, and the console says which."""
    run = Run(tmp_path / "run", data)
    command = [sys.executable, "-m", "tests.faults.signalled_train", phase, "3"]
    job = run.launch([*command, *flags(values(run, eval_freq=0))])
    status = job.wait(90.0)
    said, reached, saved = job.output(), max(run.losses()), max(run.committed())
    assert "Traceback" not in said, said
    assert {checkpoint["status"] for checkpoint in run.listing()} == {"committed"}, said
    finishing = re.search(r"^signal 15: finishing the save of step (\d+)$", said, re.MULTILINE)
    assert finishing is not None, said
    in_flight = int(finishing[1])
    assert re.search(rf"^signal 15: the save of step {in_flight} has ended, ", said, re.MULTILINE), said
    assert reached > in_flight
    if phase == "flight":
        assert (status, saved) == (0, reached), said
        assert f"has ended, saving step {reached} (" in said
        assert f"stopped by signal 15 after step {reached}, saved" in said
    else:
        assert (status, saved) == (128 + 15, in_flight), said
        assert f"has ended, no time to save step {reached} (" in said
        assert f"stopped by signal 15 after step {reached}, not saved" in said
    run.train(None, **{**GIVEN, "resume": "latest", "max_steps": reached + 1})
    assert run.restored_step() == saved
    covered(1)


@pytest.mark.slow
def test_three_killed_workers_are_three_restarts(
    data: Path, tmp_path: Path, covered: Callable[[int], None]
) -> None:
    """Through torchrun, with no flag changed: each time from the newest whole checkpoint."""
    run = Run(tmp_path / "run", data)
    launcher, *args = torchrun(2, "--max_restarts=3", "-m", "engine.train", *flags(values(run)))
    job = run.launch([launcher, *args])
    try:
        for restart in range(3):
            saved = len(run.committed())
            job.wait_until(lambda: len(run.events("restored")) == restart, 90.0)  # noqa: B023
            job.wait_until(lambda: len(run.committed()) > saved, 90.0)  # noqa: B023
            newest = max(run.committed())
            os.kill(max(pid for pid in job.pids() if pid != job.process.pid), signal.SIGKILL)
            job.wait_until(lambda: len(run.events("restored")) == restart + 1, 90.0)  # noqa: B023
            assert run.restored_step() >= newest, "it went back behind a reported commit"
    finally:
        job.kill()
    covered(3)
