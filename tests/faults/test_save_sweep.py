"""Every system call and every storage operation of a save, a commit and the clean-up after it fails once.

One job lives through the whole sweep of one fault on one rank, so that whatever a failure leaks adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import HoldfastError, SaveFailedError
from tests.faults.invariants import (
    committed_steps,
    engine_threads,
    leftovers,
    living_staging_buffers,
    open_files,
)
from tests.faults.layer import STORAGE_FAULTS, SYSTEM_FAULTS, Act, Trigger
from tests.faults.world import Rank, World, job

HARMLESS = ("EINTR", "short write")
QUICK = ("ENOSPC", "EIO", "EINTR", "short write", "503", "full", "answer lost")
"""What `make test` sweeps; the others take the same ways through the code and are for `make test-all`."""


def split(faults: dict[str, Act]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in faults]


def sweep(world: World, trigger: Callable[[Rank], Trigger], faulty: int, act: Act, *, harmless: bool) -> int:
    """Fail the k-th operation of a save for every k there is; returns how many."""
    target = trigger(world.ranks[faulty])
    reported: dict[int, str] = {}

    def good_save(step: int) -> None:
        for outcome in world.save(step):
            assert not isinstance(outcome, BaseException), f"I5: {outcome!r}"
            reported[step] = outcome.id
        world.settle()

    good_save(1)
    good_save(2)
    good_save(3)
    files, step, k = 0, 3, 0
    buffers = living_staging_buffers()
    while True:
        step += 1
        target.arm(k, act)
        outcomes = world.save(step)
        world.settle()
        target.disarm()
        if not target.fired:
            assert living_staging_buffers() <= buffers, "I6: snapshots of failed saves are still in memory"
            return k
        where = f"operation {k} ({target.fired[0]}) on rank {faulty}"
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert len(failed) in (0, len(outcomes)), f"I3, {where}: {outcomes}"
        for error in failed:
            assert isinstance(error, SaveFailedError), f"I3, {where}: {error!r}"
            assert isinstance(error.__cause__, HoldfastError), f"I3, {where}: {error.__cause__!r}"
        assert not (failed and harmless), f"{where} should not have mattered: {failed[0]}"
        if not failed:
            reported[step] = outcomes[0].id  # type: ignore[union-attr]
        listed = committed_steps(world.root)
        newest = sorted(reported)[-2:]
        for known in newest:
            assert listed.get(known) == reported[known], f"I1, {where}: step {known} is gone"
        restored = world.restore()
        assert {record.step for record in restored} == {max(listed)}, f"I1, {where}: {restored}"  # type: ignore[union-attr]
        assert [rank.shows() for rank in world.ranks] == [max(listed)] * len(world.ranks), f"I2, {where}"
        step += 1
        good_save(step)
        assert leftovers(world.root) == [], f"I6, {where}"
        assert engine_threads() == [], f"I6, {where}"
        files = files or open_files()
        assert open_files() <= files, f"I6, {where}"
        saves = [key for key in world.store.keys if key.startswith("save/")]
        assert len(saves) <= 2, f"I6, {where}: {saves}"
        k += 1


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("fault", split(SYSTEM_FAULTS))
def test_every_system_call_of_a_save_fails_once(
    fault: str, faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    with job(root, 2) as world:
        points = sweep(
            world, lambda rank: rank.disk, faulty, SYSTEM_FAULTS[fault], harmless=fault in HARMLESS
        )
    assert points >= (24 if faulty == 0 else 14)
    covered(points)


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("fault", split(STORAGE_FAULTS))
def test_every_storage_operation_of_a_save_fails_once(
    fault: str, faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    with job(root, 2) as world:
        points = sweep(world, lambda rank: rank.asked, faulty, STORAGE_FAULTS[fault], harmless=False)
    assert points >= (12 if faulty == 0 else 4)
    covered(points)
