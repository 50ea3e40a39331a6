"""SIGKILL at random moments while saving every step; and who may write to a directory at all."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from demo.job import Job
from engine.storage.uris import is_uri
from tests.e2e.harness import Run, program

FOREVER = {"max_steps": 100_000, "checkpoint_freq": 1, "keep_checkpoints": 3, "resume": "latest"}


def kill_everything(job: Job) -> None:
    job.kill()


def kill_torchrun_alone(job: Job) -> None:
    """The workers live in sessions of their own and have to notice by themselves."""
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    deadline = time.monotonic() + 10.0
    while job.pids():
        assert time.monotonic() < deadline, f"still running: {job.pids()}"
        time.sleep(0.02)


def assert_every_listed_checkpoint_is_whole(run: Run) -> list[int]:
    """`verify` everything that is listed as committed; the steps, oldest first."""
    listed = run.listing()
    assert {c["status"] for c in listed} <= {"committed", "partial"}
    whole = [c for c in listed if c["status"] == "committed"]
    if not is_uri(run.checkpoints):
        for checkpoint in whole:
            assert (Path(checkpoint["path"]) / "manifest.json").exists()
    newest = max(whole, key=lambda c: c["created"])
    program("engine.checkpoints", "verify", newest["path"], env=run.env).ok()
    return [c["step"] for c in whole]


def go_on_after_kills(run: Run, kill: Callable[[Job], None], times: int) -> None:
    """Kill a run so many times while it saves every step, and carry it on: nothing committed is lost."""
    dice = random.Random(kill.__name__)
    for attempt in range(times):
        done = len(run.events("step"))
        restored = len(run.events("restored"))
        committed_before = run.committed()
        job = run.start(2, **FOREVER)
        # Some rounds die in the first saves after the restart, others well under way.
        # The first one has to commit something: a directory of partial attempts alone is an error to resume.
        wanted = done + dice.randint(1, 3)
        job.wait_until(lambda: len(run.events("step")) >= wanted and bool(run.committed()), 60.0)  # noqa: B023
        time.sleep(dice.uniform(0.0, 0.4))
        kill(job)

        if attempt:
            assert len(run.events("restored")) == restored + 1
            assert run.restored_step() >= max(committed_before), "it went back behind a reported commit"
        reported = run.committed()
        assert reported, "no commit was reported before the kill: the test shows nothing"
        assert max(assert_every_listed_checkpoint_is_whole(run)) >= max(reported)

    run.train(2, **{**FOREVER, "max_steps": max(run.committed()) + 2})
    assert run.restored_step() >= max(reported)


@pytest.mark.parametrize("kill", [kill_everything, pytest.param(kill_torchrun_alone, marks=pytest.mark.slow)])
@pytest.mark.timeout(300)
def test_five_kills_at_random_moments_lose_nothing_that_was_committed(
    kill: Callable[[Job], None], new_run: Callable[[str], Run]
) -> None:
    run = new_run("killed")
    go_on_after_kills(run, kill, times=5)
    assert {c["status"] for c in run.listing()} == {"committed"}, "abandoned attempts are cleared away"


def test_a_second_run_is_refused_and_told_who_holds_the_directory(new_run: Callable[[str], Run]) -> None:
    run = new_run("held")
    first = run.start(None, **FOREVER)
    first.wait_until(lambda: len(run.committed()) >= 1, 60.0)
    try:
        second = Run(run.folder / "second", run.data, checkpoints=run.checkpoints)
        job = second.start(None, **FOREVER)
        status = job.wait(60.0)
        said = job.output()
    finally:
        first.kill()
    assert status == 2, said
    assert socket.gethostname() in said
    assert str(first.process.pid) in said
    assert "heartbeat" in said
    assert "Traceback" not in said

    # The holder is dead now, on this very machine: nobody has to wait for its heartbeat to grow old.
    began = time.monotonic()
    run.train(None, **{**FOREVER, "max_steps": max(run.committed()) + 3})
    assert time.monotonic() - began < 30.0
    assert run.restored_step() >= 1


def test_a_directory_that_holds_checkpoints_is_not_overwritten_by_accident(
    undisturbed_1: Run, tmp_path: Path
) -> None:
    run = undisturbed_1.copy_to(tmp_path / "again")
    job = run.start(None, max_steps=1)
    assert job.wait(60.0) == 2
    assert "--resume" in job.tail()
    assert "--new_run" in job.tail()

    run.train(None, max_steps=1, new_run=True)
    assert run.with_role("latest")["step"] == 1


def test_metrics_go_on_after_a_torn_last_line(undisturbed_1: Run, tmp_path: Path) -> None:
    run = undisturbed_1.copy_to(tmp_path / "torn")
    metrics = run.logs / "metrics.jsonl"
    whole = metrics.read_bytes()
    metrics.write_bytes(whole + b'{"event":"step","step":13,"lo')
    run.train(None, resume="latest", max_steps=13)
    written = metrics.read_bytes()
    assert written.startswith(whole)
    assert json.loads(written[len(whole) :].splitlines()[0])["event"] == "restored"
    assert run.events("step")[-1]["step"] == 13
