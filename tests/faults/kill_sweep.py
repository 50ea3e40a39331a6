"""Programs of test_kill_sweep.py: processes that kill themselves at a numbered system call or a named moment.

    python -m tests.faults.kill_sweep job|rank|moment WHICH ROOT      prints how many points there were

This runs in a process of its own, see `processes`.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.ranks.coordination import Channel
from tests.faults.invariants import committed_steps, leftovers
from tests.faults.layer import Trigger
from tests.faults.processes import Process, Tell, dies, free_port, impatient, one_rank, outcome_of
from tests.faults.world import job

SHORT_SECS = 0.5


def kill_job(rank: int, root: Path) -> int:
    """The whole job dies before the k-th call of `rank`, for every k; each time the next one resumes."""
    reported = 0
    for k in range(200):

        def life(tell: Tell, hear: object, k: int = k) -> None:
            with job(root, 2) as world:
                restored = world.restore()[0]
                if isinstance(restored, BaseException):
                    raise restored
                step = 0 if restored is None else restored.step  # type: ignore[union-attr]
                tell("restored", step)
                assert {r.shows() for r in world.ranks} == {step if restored else -1}
                for number in (1, 2):
                    outcome = world.save(step + number)[0]
                    assert not isinstance(outcome, BaseException), outcome
                    tell("committed", outcome.step)
                    world.settle()
                    tell("leftovers", leftovers(root))
                world.ranks[rank].disk.arm(k, dies())
                outcome = world.save(step + 3)[0]
                tell("committed", outcome.step)  # type: ignore[union-attr]
                world.settle()
                tell("survived", world.ranks[rank].disk.count)

        process = Process(life)
        status = process.end()
        told = process.told
        assert told[0][0] == "restored", told
        assert told[0][1] >= reported, f"I1: call {k}: went back from {reported} to {told[0][1]}"
        assert [entry[1] for entry in told if entry[0] == "leftovers"] == [[], []], f"I6, call {k}: {told}"
        reported = max(value for what, value in told if what == "committed")
        listed = committed_steps(root)
        assert reported in listed, f"I1: call {k}: {reported} was reported"
        if told[-1][0] == "survived":
            break
        assert status == signal.SIGKILL
    return k


Arm = Callable[[Trigger, pytest.MonkeyPatch], None]


def pair(root: Path, step: int, victim: int, arm: Arm) -> list[Process]:
    """Two ranks: they restore, save `step`, then `step + 1`, in which `arm` has the victim die."""
    port = free_port()

    def start(rank: int) -> Process:
        def life(tell: Tell, hear: object) -> None:
            with one_rank(rank, 2, port, root, f"run-{step}") as (ckpt, state, disk, patch):
                record = ckpt.restore()
                tell("restored", record.step if record else 0)
                tell("first", outcome_of(ckpt, state, step))
                impatient(ckpt, patch, SHORT_SECS)
                patch.setattr("engine.save.job.OUTCOME_GRACE_SECS", 60.0)
                if rank == victim:
                    arm(disk, patch)
                tell("second", outcome_of(ckpt, state, step + 1))
            os._exit(0)

        return Process(life)

    return [start(0), start(1)]


def survived(processes: list[Process], victim: int, root: Path, reported: int, where: str) -> tuple[Any, Any]:
    """What each rank says of the second save, None for one that died; I1 and I4 are checked."""
    statuses = [process.end() for process in processes]
    survivor = processes[1 - victim]
    assert survivor.told[0][0] == "restored", f"{where}: {survivor.told}"
    assert survivor.told[0][1] >= reported, f"I1, {where}: {survivor.told}"
    said = [dict(process.told).get("second") for process in processes]
    assert said[1 - victim] is not None, f"I3, {where}: {survivor.told}, {statuses}"
    if said[1 - victim][0] == "failed":
        assert f"rank {victim}" in said[1 - victim][1] or "rank 0" in said[1 - victim][1], (
            f"I4, {where}: {said}"
        )
    said_twice = [value for process in processes for what, value in process.told if what != "restored"]
    steps = [step for outcome, step in said_twice if outcome == "committed"]
    listed = committed_steps(root)
    assert max(steps) in listed, f"I1, {where}: {steps}, listed {listed}"
    return said[0], said[1]


def kill_rank(victim: int, root: Path) -> int:
    """One process of two dies before its k-th call, for every k."""
    reported = 0
    for k in range(200):
        step = 2 * k + 1
        processes = pair(root, step, victim, lambda disk, patch, k=k: disk.arm(k, dies()))  # type: ignore[misc]
        said = survived(processes, victim, root, reported, f"call {k}")
        reported = max(committed_steps(root))
        if said[victim] is not None:
            break
    return k


def _dies_before(target: str) -> Arm:
    def arm(disk: Trigger, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(target, lambda *args, **given: os.kill(os.getpid(), signal.SIGKILL))

    return arm


def _dies_after(target: str, real: Callable[..., Any]) -> Arm:
    def arm(disk: Trigger, patch: pytest.MonkeyPatch) -> None:
        @functools.wraps(real)
        def last(*args: Any, **given: Any) -> None:
            real(*args, **given)
            os.kill(os.getpid(), signal.SIGKILL)

        patch.setattr(target, last)

    return arm


def _dies_after_its_receipt(disk: Trigger, patch: pytest.MonkeyPatch) -> None:
    gather = Channel.gather

    def last(self: Channel, key: str, payload: bytes, timeout_secs: float) -> Any:
        result = gather(self, key, payload, timeout_secs)
        if key.endswith("/receipt"):
            self._check(f"{key}/{self.rank}")  # the store has it
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    patch.setattr(Channel, "gather", last)


def moments() -> dict[str, tuple[int, Arm, bool]]:
    """Name -> (who dies, how, whether the save is committed all the same)."""
    from engine.save.commit import commit
    from engine.save.write import write_rank

    return {
        "before it writes": (1, _dies_before("engine.save.job.write_rank"), False),
        "with its files durable, before its receipt": (
            1,
            _dies_after("engine.save.job.write_rank", write_rank),
            False,
        ),
        "after its receipt": (1, _dies_after_its_receipt, True),
        "coordinator, before it has written itself": (0, _dies_before("engine.save.job.write_rank"), False),
        "coordinator, all receipts in, before the manifest": (
            0,
            _dies_before("engine.save.run_directory.commit"),
            False,
        ),
        "coordinator, manifest there, nobody told": (
            0,
            _dies_after("engine.save.run_directory.commit", commit),
            True,
        ),
    }


def kill_at_moments(_: int, root: Path) -> int:
    """One process of two dies at each named moment; what is committed, and what the other one hears."""
    reported = 0
    for number, (name, (victim, arm, commits)) in enumerate(moments().items()):
        step = 2 * number + 1
        said = survived(pair(root, step, victim, arm), victim, root, reported, name)
        assert said[victim] is None, f"{name}: nobody died"
        listed = committed_steps(root)
        assert (step + 1 in listed) is commits, f"{name}: {listed}"
        heard = said[1 - victim]
        if victim == 1:
            assert heard[0] == ("committed" if commits else "failed"), f"{name}: {heard}"
        else:
            assert heard[0] == "failed", f"{name}: {heard}"
            assert "lost its connection to rank 0" in heard[1], f"I4, {name}: {heard}"
        reported = max(listed)
    return len(moments())


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sweep = {"job": kill_job, "rank": kill_rank, "moment": kill_at_moments}[sys.argv[1]]
    print(sweep(int(sys.argv[2]), Path(sys.argv[3])))
