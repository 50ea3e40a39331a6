"""Processes that a SIGSTOP holds at a numbered system call, and that are woken when it is too late.

    python -m tests.faults.stall_sweep rank|holder WHICH ROOT         prints how many points there were

This runs in a process of its own, see `processes`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from engine.lease.lease import Lease
from engine.lease.process import ProcessIdentity
from tests.faults.invariants import committed_steps, leftovers
from tests.faults.processes import Process, Tell, free_port, impatient, one_rank, outcome_of, stops

SHORT_SECS = 1.0


def pair(root: Path, step: int, victim: int, k: int) -> list[Process]:
    """Two ranks that save three times; the victim is stopped before the k-th call of the second save."""
    port = free_port()

    def start(rank: int) -> Process:
        def life(tell: Tell, hear: object) -> None:
            with one_rank(rank, 2, port, root, f"run-{step}", answer_secs=SHORT_SECS) as (
                ckpt,
                state,
                disk,
                patch,
            ):
                tell("first", outcome_of(ckpt, state, step))
                impatient(ckpt, patch, SHORT_SECS)
                if rank == victim:
                    disk.arm(k, stops(tell))
                tell("second", outcome_of(ckpt, state, step + 1))
                disk.disarm()
                impatient(ckpt, patch, None)
                tell("third", outcome_of(ckpt, state, step + 2))
            os._exit(0)

        return Process(life)

    return [start(0), start(1)]


def stall_rank(victim: int, root: Path) -> int:
    """One rank of two stands still before its k-th call, for every k, until the other one has given up."""
    for k in range(200):
        step = 3 * k + 1
        processes = pair(root, step, victim, k)
        late, punctual = processes[victim], processes[1 - victim]
        what, name = late.until("stopping", "second")
        if what != "stopping":
            for process in processes:
                process.end()
            break
        where = f"stopped before call {k} ({name})"
        late.wait_stopped()
        heard = punctual.until("second")[1]
        late.wake()
        woken = late.until("second")[1]
        for process in processes:
            assert process.until("third")[1] == ["committed", step + 2], f"I5, {where}: {process.told}"
            process.end()
        listed = committed_steps(root)  # the two newest, of which the second save is one if it is there
        assert heard is not None, f"I3, {where}"
        assert woken is not None, f"I3, {where}"
        if heard[0] == "failed":
            # In the middle of a question to the store, which rank 0 hosts, it hears the second.
            named = (f"rank {victim} did not", f"lost its connection to rank {victim},")
            assert any(words in heard[1] for words in named), f"I4, {where}: {heard[1]}"
            assert "within" in heard[1], f"I4, {where}: {heard[1]}"
            # Within the call that publishes, nobody can tell it to stop: see "Two outcomes of one save".
            assert (woken[0] == "committed") == (step + 1 in listed), f"{where}: {woken}, {listed}"
        else:
            assert step + 1 in listed, f"I1, {where}: {heard}, {listed}"
        if victim == 1:
            assert heard[0] == "failed", f"{where}: nobody waited for rank 1"
            assert woken[0] == "failed", f"{where}: the late receipt was taken"
            assert step + 1 not in listed, f"{where}: the late receipt was taken"
        assert step + 2 in listed, where
        assert leftovers(root) == [], f"I6, {where}"
    return k


class Hours:
    """Another machine's clock, which sleeping moves."""

    now = 7200.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.now += secs


def holder(root: Path, step: int, k: int) -> Process:
    """Holds the lease, and is stopped before the k-th call of its second save."""

    def life(tell: Tell, hear: Any) -> None:
        with one_rank(0, 1, free_port(), root, f"holder-{step}") as (ckpt, state, disk, _):
            tell("first", outcome_of(ckpt, state, step))
            disk.arm(k, stops(tell))
            tell("second", outcome_of(ckpt, state, step + 1))
            disk.disarm()
            tell("third", outcome_of(ckpt, state, step + 3))
        os._exit(0)

    return Process(life)


def taker(root: Path, step: int) -> Process:
    """A job on another machine, which knows the holder by its heartbeat only."""

    def life(tell: Tell, hear: Any) -> None:
        clock, acquire = Hours(), Lease.acquire
        me = dataclasses.replace(ProcessIdentity.current(), host="elsewhere", boot_id="another-boot")

        def elsewhere(storage: Any, *, run_id: str) -> Lease:
            return acquire(storage, run_id=run_id, clock=clock, sleep=clock.sleep, process=me, wall=clock)

        Lease.acquire = elsewhere  # type: ignore[method-assign, assignment]
        with one_rank(0, 1, free_port(), root, f"taker-{step}") as (ckpt, state, _, _):
            tell("first", outcome_of(ckpt, state, step + 2))
            hear()
            tell("second", outcome_of(ckpt, state, step + 4))
            ckpt.close()
        os._exit(0)

    return Process(life)


def stall_holder(_: int, root: Path) -> int:
    """The holder of the lease stands still before its k-th call, for every k, until it has lost it."""
    for k in range(200):
        step = 5 * k + 1
        sleeper = holder(root, step, k)
        what, name = sleeper.until("stopping", "second")
        if what != "stopping":
            sleeper.end()
            break
        where = f"stopped before call {k} ({name})"
        sleeper.wait_stopped()
        winner = taker(root, step)
        assert winner.until("first")[1] == ["committed", step + 2], f"{where}: {winner.told}"
        before = committed_steps(root)
        sleeper.wake()
        second, third = sleeper.until("second")[1], sleeper.until("third")[1]
        sleeper.end()
        assert second is not None, where
        if second[0] == "committed":
            assert step + 1 in before, f"{where}: committed after the takeover"
        else:
            assert step + 1 not in before, f"{where}: {second}"
        assert third is not None, where
        assert third[0] == "failed", f"{where}: the loser commits"
        assert "has taken" in third[1], f"{where}: {third[1]}"
        assert committed_steps(root) == before, f"{where}: the loser changed what is committed"
        winner.go()
        assert winner.until("second")[1] == ["committed", step + 4], f"{where}: {winner.told}"
        winner.end()
        assert leftovers(root) == [], f"I6, {where}"
    return k


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    sweep = {"rank": stall_rank, "holder": stall_holder}[sys.argv[1]]
    print(sweep(int(sys.argv[2]), Path(sys.argv[3])))
