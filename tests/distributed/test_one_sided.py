"""Calls that only some ranks make: an error names the ranks and the call, and the next save commits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpointer import Checkpointer
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]

TIMEOUT_SECS = 2.0
NEAR_SECS = 15.0
"""Far below what a rank waited before (twice the timeout and 120 s), far above what a busy machine takes."""


def timed(work: Callable[[], Any]) -> tuple[Any, bool]:
    started = time.monotonic()
    found = outcome(work)
    return found, time.monotonic() - started < NEAR_SECS


def one_sided(rank: int, world_size: int, directory: str) -> dict[str, Any]:
    state = {"values": {"t": torch.ones(10)}}
    found: dict[str, Any] = {}
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(rank)  # each node's agent counts its own
    with Checkpointer(directory, state, timeout_secs=TIMEOUT_SECS) as checkpointer:

        def save(step: int) -> tuple[Any, bool]:
            def work() -> Any:
                record = checkpointer.save(step).result()
                return record and record.step

            return timed(work)

        def all_save(name: str, step: int) -> None:
            dist.barrier()
            found[name] = save(step)
            dist.barrier()

        all_save("all", 1)
        if rank == 0:
            found["rank 0 alone"] = save(2)
        all_save("after rank 0 alone", 2)  # the others must not take the call that is over for this one
        if rank == 1:
            found["rank 1 alone"] = save(4)
        all_save("after rank 1 alone", 5)
        if rank != 1:
            found["rank 1 skips"] = save(6)
        # No barrier: rank 1 is at the next save while the others still wait for it in this one.
        found["after rank 1 skips"] = save(7)
        dist.barrier()
        found["different steps"] = save(8 + rank)
        all_save("after different steps", 20)
        found["rank 0 ahead"] = save(31 if rank == 0 else 30)
        all_save("after rank 0 ahead", 32)
        if rank == 1:
            found["prepare alone"] = timed(checkpointer.prepare)
        all_save("after prepare alone", 33)
        if rank != 1:
            found["restore without rank 1"] = timed(lambda: checkpointer.restore("latest"))
        all_save("after restore without rank 1", 34)
        found["restore"] = timed(lambda: getattr(checkpointer.restore("latest"), "step", None))
        all_save("the same step again", 34)
    return found


def test_one_sided_calls(world: World, tmp_path: Path) -> None:
    zero, one, two = found = world(3).run(one_sided, str(tmp_path))
    for each in found:
        late = [name for name, (_, near) in each.items() if not near]
        assert not late
        answers = {name: answer for name, (answer, _) in each.items()}
        assert answers["all"] == 1
        assert answers["after rank 0 alone"] == 2
        assert answers["after rank 1 alone"] == 5
        assert answers["after rank 1 skips"] == 7
        assert answers["after different steps"] == 20
        assert answers["after rank 0 ahead"] == 32
        assert answers["after prepare alone"] == 33
        assert answers["after restore without rank 1"] == 34
        assert answers["restore"] == 34
        assert answers["the same step again"] == 34
    assert "ranks 1, 2 did not report within 2 s in the save of step 2" in zero["rank 0 alone"][0]
    assert "rank 0 did not reach the save of step 4 within 2 s" in one["rank 1 alone"][0]
    for rank in (0, 2):
        assert "rank 1: " in found[rank]["rank 1 skips"][0]
        assert (
            "did not reach the save of step 6: it is at the save of step 7"
            in found[rank]["rank 1 skips"][0]
        )
        assert "rank 1 did not report within 2 s in the restore" in found[rank]["restore without rank 1"][0]
    assert "did not reach the save of step 8: it is at the save of step 9" in zero["different steps"][0]
    assert "rank 0 did not reach the save of step 9" in one["different steps"][0]
    assert "last at the save of step 8" in two["different steps"][0]
    for rank in (1, 2):
        words = f"rank 0 is at the save of step 31, rank {rank} at the save of step 30"
        assert words in found[rank]["rank 0 ahead"][0]
    assert "rank 0 did not reach prepare() within 2 s" in one["prepare alone"][0]


def first_save(rank: int, world_size: int, directory: str, steps: list[int | None]) -> Any:
    """The first save, which has no plan yet; `steps` by rank, None for a rank that skips it."""

    def save(checkpointer: Checkpointer, step: int) -> Any:
        record = checkpointer.save(step).result()
        return record and record.step

    with Checkpointer(
        directory, {"values": {"t": torch.ones(10)}}, timeout_secs=TIMEOUT_SECS
    ) as checkpointer:
        step = steps[rank]
        first = None if step is None else timed(lambda: save(checkpointer, step))
        second = timed(lambda: save(checkpointer, 10))
        third = timed(lambda: save(checkpointer, 11))
        dist.barrier()
    return first, second, third


def test_the_first_save_of_different_steps(world: World, tmp_path: Path) -> None:
    for number, steps in enumerate(([1, 2, 1], [1, None, 1], [1, None, None])):
        found = world(3).run(first_save, str(tmp_path / str(number)), steps)
        for step, (first, second, third) in zip(steps, found, strict=True):
            assert second == (10, True)
            assert third == (11, True)
            assert step is None or ("the save of step" in first[0] and first[1])
