"""Programs of test_kill_sweep.py: processes that kill themselves at a numbered system call.

They are forks, so that a point costs milliseconds. This runs in a process of its own, in which torch has
never started a thread: those do not survive a fork.

    python -m tests.faults.kill_sweep job|rank RANK ROOT      prints how many points there were
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from engine.catalog.retention import Retention
from engine.checkpointer import Checkpointer
from engine.errors import SaveFailedError
from engine.parallel.coordination import Coordinator
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps, leftovers
from tests.faults.layer import FaultSystem, Trigger
from tests.faults.world import fresh_state, job


def die(name: str, real: Callable[[], Any]) -> Any:
    """What the armed operation does."""
    os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[Callable[[str, Any], None]], None]) -> Callable[[], tuple[int, list[list[Any]]]]:
    """Start `work(tell)` in a fork; the result waits for it: (exit status, what it told before it ended)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            work(lambda what, value: _write(writing, what, value))
            status = 0
        except BaseException:
            _write(writing, "error", traceback.format_exc())
        finally:
            os._exit(status)
    os.close(writing)

    def wait() -> tuple[int, list[list[Any]]]:
        with os.fdopen(reading) as pipe:
            told = [json.loads(line) for line in pipe]
        return os.waitpid(pid, 0)[1], told

    return wait


def _write(fd: int, what: str, value: Any) -> None:
    os.write(fd, (json.dumps([what, value]) + "\n").encode())


def committed(told: list[list[Any]]) -> list[int]:
    return [value for what, value in told if what == "committed"]


def kill_job(rank: int, root: Path) -> int:
    """The whole job dies before the k-th call of `rank`, for every k; each time the next one resumes."""
    reported = 0
    for k in range(200):

        def life(tell: Callable[[str, Any], None], k: int = k, reported: int = reported) -> None:
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
                world.ranks[rank].disk.arm(k, die)
                outcome = world.save(step + 3)[0]
                tell("committed", outcome.step)  # type: ignore[union-attr]
                world.settle()
                tell("survived", world.ranks[rank].disk.count)

        status, told = forked(life)()
        assert ["error"] not in [entry[:1] for entry in told], told
        assert told[0][0] == "restored", told
        assert told[0][1] >= reported, f"I1: call {k}: went back from {reported} to {told[0][1]}"
        assert [entry[1] for entry in told if entry[0] == "leftovers"] == [[], []], f"I6, call {k}: {told}"
        reported = max(committed(told))
        listed = committed_steps(root)
        assert reported in listed, f"I1: call {k}: {reported} was reported"
        if told[-1][0] == "survived":
            break
        assert status == signal.SIGKILL
    return k


def one_rank(
    rank: int, port: int, root: Path, k: int | None, step: int
) -> Callable[[Callable[[str, Any], None]], None]:
    """The life of one rank as a process of its own, over a real store."""

    def life(tell: Callable[[str, Any], None]) -> None:
        server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank == 0 else None

        def connect() -> TCPStore:
            return TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))

        disk = Trigger()
        coordinator = Coordinator(rank, 2, f"run-{step}", connect, server)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("engine.checkpointer.connect_ranks", lambda secs: coordinator)
            patch.setattr("engine.save.job.ACKNOWLEDGE_SECS", 0.1)
            patch.setattr(
                "engine.checkpointer.open_storage", lambda *_: LocalStorage(root, system=FaultSystem(disk))
            )
            state = fresh_state()
            ckpt = Checkpointer(root, state, per_rank=("mine",), retention=Retention(2), timeout_secs=20.0)
            record = ckpt.restore()
            tell("restored", record.step if record else 0)
            state["model"]["w"] = torch.full_like(state["model"]["w"], step)
            tell("committed", ckpt.save(step).result().step)  # type: ignore[union-attr]
            assert ckpt._saver is not None
            ckpt._saver.wait()
            # From here on nobody waits for the dead longer than this.
            ckpt._saver.runner.timeout_secs = 0.5
            if k is not None:
                disk.arm(k, die)
            try:
                tell("committed", ckpt.save(step + 1).result().step)  # type: ignore[union-attr]
                tell("survived", disk.count)
            except SaveFailedError as error:
                tell("failed", str(error))
        os._exit(0)

    return life


def kill_rank(victim: int, root: Path) -> int:
    """One process of two dies before its k-th call, for every k."""
    step, reported = 1, 0
    for k in range(200):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        waits = [forked(one_rank(r, port, root, k if r == victim else None, step)) for r in (0, 1)]
        told = [wait()[1] for wait in waits]
        survivor = told[1 - victim]
        assert survivor[0][0] == "restored", told
        assert survivor[0][1] >= reported, told
        reported = max(committed(told[0]) + committed(told[1]))
        assert reported in committed_steps(root), f"I1: call {k}"
        if told[victim][-1][0] == "survived":
            break
        what, value = survivor[-1]
        if what == "failed":
            assert f"rank {victim}" in value or "rank 0" in value, f"I4: {value}"
        else:
            assert what in ("survived", "committed"), f"I3: {survivor}"
        step += 2
    return k


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sweep = {"job": kill_job, "rank": kill_rank}[sys.argv[1]]
    print(sweep(int(sys.argv[2]), Path(sys.argv[3])))
