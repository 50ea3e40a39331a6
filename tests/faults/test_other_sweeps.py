"""The same exhaustive sweeps over starting and restoring, disks that stay broken, and storages that lie."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.directory.listing import list_checkpoints
from engine.errors import HoldfastError, RestoreFailedError, SaveFailedError
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps, engine_threads, leftovers, open_files
from tests.faults.layer import STORAGE_FAULTS, SYSTEM_FAULTS, Act, fails_with, lost, swallowed
from tests.faults.world import PATIENCE_SECS, Rank, World, job
from tests.support.tiny_checkpoint import write_checkpoint

OUTAGES = [
    "503",
    "reset",
    "denied",
    "EIO",
    "answer lost",
    *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("500", "full")),
]


def save_well(world: World, *steps: int) -> None:
    for step in steps:
        for outcome in world.save(step):
            assert not isinstance(outcome, BaseException), repr(outcome)
    world.settle()


def all_failed(outcomes: list[object], kind: type[BaseException]) -> bool:
    """Whether every rank failed with that kind; False if none did; anything between fails the test."""
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(failed) in (0, len(outcomes)), f"ranks differ: {outcomes}"
    for error in failed:
        assert isinstance(error, kind), repr(error)
    return bool(failed)


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("fault", OUTAGES)
def test_every_operation_of_a_restore_fails_once(
    fault: str, faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    """All ranks hear of it; an outage is never taken for damage, nor for an older or no checkpoint."""
    with job(root, 2) as world:
        save_well(world, 1, 2, 3)
        before = committed_steps(root)
        target, k, files = world.ranks[faulty].asked, 0, 0
        while True:
            target.arm(k, STORAGE_FAULTS[fault])
            outcomes = world.restore()
            target.disarm()
            if not target.fired:
                break
            where = f"operation {k} ({target.fired[0]})"
            if all_failed(outcomes, HoldfastError):
                assert world.ranks[0].ckpt._restorer.undefined == world.ranks[1].ckpt._restorer.undefined
                if world.ranks[0].ckpt._restorer.undefined:
                    refused = world.save(9)
                    assert all_failed(refused, RestoreFailedError), f"{where}: saved an undefined state"
            else:
                assert {record.step for record in outcomes} == {3}, f"{where}: went back"  # type: ignore[union-attr]
            assert committed_steps(root) == before, f"{where}: marked as damaged"
            again = world.restore()
            assert {record.step for record in again} == {3}, f"I5, {where}: {again}"  # type: ignore[union-attr]
            assert [rank.shows() for rank in world.ranks] == [3, 3], where
            assert engine_threads() == [], where
            files = files or open_files()
            assert open_files() <= files, where
            k += 1
        save_well(world, 4)
    assert k >= (6 if faulty == 0 else 4)
    covered(k)


def start_with_each_operation_changed(root: Path, level: str, act: Act, faulty: int = 0) -> int:
    """Start a job of two as often as it takes for `act` to have met each operation of rank `faulty` once.

    After each: what is committed is untouched, and the next start loads the newest and leaves nothing behind.
    Returns how many operations there are.
    """
    with job(root, 2) as world:
        save_well(world, 1, 2)
    k, fired = 0, True
    while fired:
        write_checkpoint(root, sequence=90 + k, hex=f"{k:08x}", commit=False)
        world = World(root, 2)
        target = getattr(world.ranks[faulty], level)
        target.arm(k, act)
        with contextlib.suppress(HoldfastError), job(root, 2, world=world):
            target.disarm()
        fired = bool(target.fired)
        where = f"operation {k} ({target.fired})"
        assert set(committed_steps(root)) == {1, 2}, where
        with job(root, 2) as after:
            assert {record.step for record in after.restore()} == {2}, where  # type: ignore[union-attr]
        assert leftovers(root) == [], where
        assert engine_threads(but=()) == [], where
        k += 1
    return k - 1


def starts() -> list[Any]:
    """Level and fault; rank 1 makes no system call in a start that rank 0 has not made."""
    asked = [
        pytest.param("asked", fault, rank, marks=pytest.mark.slow if fault in ("500", "full") else ())
        for fault in STORAGE_FAULTS
        for rank in (0, 1)
    ]
    return asked + [
        pytest.param("disk", fault, 0, marks=pytest.mark.slow if fault == "ESTALE" else ())
        for fault in SYSTEM_FAULTS
    ]


@pytest.mark.usefixtures("nothing_arrives")
@pytest.mark.parametrize(("level", "fault", "faulty"), starts())
def test_every_operation_of_a_start_fails_once(
    level: str, fault: str, faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    """Taking the lease, clearing abandoned attempts, the probe: all ranks stop, the next start works."""
    act = (STORAGE_FAULTS if level == "asked" else SYSTEM_FAULTS)[fault]
    swept = start_with_each_operation_changed(root, level, act, faulty)
    assert swept >= (4 if faulty == 0 else 1)
    covered(swept)


@pytest.mark.parametrize("faulty", [0, 1])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_breaks_at_any_call_and_stays_broken(
    code: int, faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    """Nothing can be cleaned up then; once the disk works again, one save later all is as it should be."""
    with job(root, 2) as world:
        save_well(world, 1, 2)
        target, k, step = world.ranks[faulty].disk, 0, 2
        while True:
            step += 1
            target.arm(k, fails_with(code), sticky=True)
            outcomes = world.save(step)
            world.settle()
            target.disarm()
            if not target.fired:
                break
            all_failed(outcomes, SaveFailedError)
            listed = committed_steps(root)
            assert {record.step for record in world.restore()} == {max(listed)}  # type: ignore[union-attr]
            step += 1
            save_well(world, step)
            assert leftovers(root) == [], f"call {k}"
            k += 1
    covered(k)


def lying_sweep(world: World, target: object, act: Act, root: Path) -> int:
    """Swallow every k-th operation. Whatever is lost: what a restore gives is whole, and never newer than
    the newest save; a save whose manifest was lost is not reported as committed."""
    k, step = 0, 10
    while True:
        step += 2
        save_well(world, step)
        target.arm(k, act)  # type: ignore[attr-defined]
        outcomes = world.save(step + 1)
        world.settle()
        target.disarm()  # type: ignore[attr-defined]
        if not target.fired:  # type: ignore[attr-defined]
            return k
        where = f"operation {k} ({target.fired[0]})"  # type: ignore[attr-defined]
        if not all_failed(outcomes, SaveFailedError):
            names = {item.id for item in list_checkpoints(LocalStorage(root)) if item.status != "partial"}
            assert outcomes[0].id in names, f"{where}: reported as committed and gone"  # type: ignore[union-attr]
        restored = {record.step for record in world.restore()}  # type: ignore[union-attr]
        assert restored in ({step}, {step + 1}), f"{where}: {restored}"
        assert {rank.shows() for rank in world.ranks} == restored, f"{where}: wrong bytes were loaded"
        k += 1


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_disk_that_reports_success_and_loses_the_bytes(
    faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    with job(root, 2) as world:
        covered(lying_sweep(world, world.ranks[faulty].disk, lost, root))


@pytest.mark.parametrize("faulty", [0, 1])
def test_a_storage_that_reports_success_and_does_nothing(
    faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    with job(root, 2) as world:
        covered(lying_sweep(world, world.ranks[faulty].asked, swallowed, root))


def hanging(world: World, rank: int) -> Act:
    """The operation does not return before the world is released; then it works."""

    def act(name: str, real: Callable[[], object]) -> object:
        world.store.hang(rank)
        return real()

    return act


@pytest.mark.parametrize("faulty", [0, 1])
def test_every_operation_of_a_save_hangs_beyond_the_deadline(
    faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    """The other rank hears of it in time, told which rank is late (I3, I4); when the late rank wakes up, its
    receipt is refused, and the next save works (I5)."""
    world_size, k, step = 2, 0, 2
    with job(root, world_size) as world:
        save_well(world, 1, 2)
        target = world.ranks[faulty].asked
        while True:
            step += 1
            world.store.hold_again()
            before_secs = world.store.elapsed_secs
            target.arm(k, hanging(world, faulty))
            outcomes: dict[int, object] = {}

            def save(rank: object, step: int = step, outcomes: dict[int, object] = outcomes) -> object:
                rank.fill(step)  # type: ignore[attr-defined]
                handle = rank.ckpt.save(step)  # type: ignore[attr-defined]
                try:
                    outcomes[rank.rank] = handle.result(PATIENCE_SECS)  # type: ignore[attr-defined]
                except SaveFailedError as error:
                    outcomes[rank.rank] = error  # type: ignore[attr-defined]
                # Whoever is on time has its answer now; only then does the sleeper wake.
                if rank.rank != faulty:  # type: ignore[attr-defined]
                    world.store.release()
                return None

            world.each(save)
            waited_secs = world.store.elapsed_secs - before_secs
            world.settle()
            target.disarm()
            if not target.fired:
                break
            where = f"operation {k} ({target.fired[0]})"
            punctual = outcomes[1 - faulty]
            if isinstance(punctual, SaveFailedError):
                assert f"rank {faulty} did not" in str(punctual), f"I4, {where}: {punctual}"
            listed = committed_steps(root)
            if not isinstance(punctual, SaveFailedError):
                assert step in listed, f"I1, {where}"
            if faulty != 0 and isinstance(punctual, SaveFailedError):
                assert step not in listed, f"{where}: the late receipt was taken"
                assert isinstance(outcomes[faulty], SaveFailedError), where
            assert waited_secs <= 100.0 + 60.0 + 30.0, f"I4, {where}: {waited_secs} s"
            step += 1
            save_well(world, step)
            assert leftovers(root) == [], where
            k += 1
    covered(k)


@pytest.mark.parametrize("faulty", [0, 1])
def test_every_operation_of_a_restore_hangs_beyond_the_deadline(
    faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    """The other rank hears of it in time, told who is late; once that one wakes up, restoring works."""
    k = 0
    with job(root, 2) as world:
        save_well(world, 1, 2, 3)
        before = committed_steps(root)
        target = world.ranks[faulty].asked
        while True:
            world.store.hold_again()
            before_secs, answered_at = world.store.elapsed_secs, []
            target.arm(k, hanging(world, faulty))

            def restore(rank: Rank, answered_at: list[float] = answered_at) -> object:
                rank.fill(-1)
                try:
                    return rank.ckpt.restore()
                finally:
                    if rank.rank != faulty:  # it has its answer; only then does the sleeper wake
                        answered_at.append(world.store.elapsed_secs)
                        world.store.release()

            outcomes = world.each(restore)
            waited_secs = answered_at[0] - before_secs
            target.disarm()
            if not target.fired:
                break
            where = f"operation {k} ({target.fired[0]})"
            punctual = outcomes[1 - faulty]
            if isinstance(punctual, BaseException):
                assert isinstance(punctual, HoldfastError), f"I3, {where}: {punctual!r}"
                assert f"rank {faulty} did not" in str(punctual), f"I4, {where}: {punctual}"
            else:
                assert punctual.step == 3, where  # type: ignore[attr-defined]
            assert waited_secs <= 100.0 + 60.0, f"I4, {where}: {waited_secs} s"
            assert committed_steps(root) == before, f"{where}: marked as damaged"
            again = world.restore()
            assert {record.step for record in again} == {3}, f"I5, {where}: {again}"  # type: ignore[union-attr]
            assert [rank.shows() for rank in world.ranks] == [3, 3], where
            assert engine_threads() == [], where
            k += 1
        save_well(world, 4)
    assert k >= 4
    covered(k)


@pytest.mark.usefixtures("nothing_arrives")
@pytest.mark.parametrize("faulty", [0, 1])
def test_every_operation_of_a_start_hangs_beyond_the_deadline(
    faulty: int, root: Path, covered: Callable[[int], None]
) -> None:
    """Taking the lease, clearing up, the probe: the other rank gives up in time, and the next start works."""
    with job(root, 2) as world:
        save_well(world, 1, 2)
    k, fired = 0, True
    while fired:
        write_checkpoint(root, sequence=90 + k, hex=f"{k:08x}", commit=False)
        world = World(root, 2)
        target = world.ranks[faulty].asked
        target.arm(k, hanging(world, faulty))

        answered_at: list[float] = []

        def started(rank: Rank, world: World = world, answered_at: list[float] = answered_at) -> None:
            if rank.rank != faulty:
                answered_at.append(world.store.elapsed_secs)
                world.store.release()

        world.when_started = started
        problem: HoldfastError | None = None
        try:
            with job(root, 2, world=world):
                target.disarm()
        except HoldfastError as error:
            problem = error
        fired = bool(target.fired)
        where = f"operation {k} ({target.fired})"
        assert problem is None or "did not" in str(problem), f"I4, {where}: {problem!r}"
        assert answered_at[0] <= 2 * 100.0 + 30.0, f"I4, {where}: {answered_at} s"
        with job(root, 2) as after:
            assert {record.step for record in after.restore()} == {2}, where  # type: ignore[union-attr]
        assert leftovers(root) == [], where
        assert engine_threads(but=()) == [], where
        k += 1
    covered(k - 1)


def test_a_call_that_never_returns_does_not_hold_training_for_ever(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clean-up after a save hangs: the next save says so, and once it returns saving goes on."""
    awake = threading.Event()

    def hang(name: str, real: Callable[[], object]) -> object:
        if name == "clear_dir":
            awake.wait(PATIENCE_SECS)
        return real()

    with job(root, 1) as world:
        save_well(world, 1, 2)
        saver = world.ranks[0].ckpt._saver
        assert saver is not None
        world.ranks[0].asked.arm(0, hang, sticky=True)
        assert not isinstance(world.save(3)[0], BaseException)
        monkeypatch.setattr("engine.save.saver.STUCK_GRACE_SECS", 0.0)
        monkeypatch.setattr(saver, "timeout_secs", 0.01)
        (outcome,) = world.save(4)
        assert isinstance(outcome, SaveFailedError)
        assert "save of step 3 is still running" in str(outcome)
        monkeypatch.undo()
        awake.set()
        world.settle()
        save_well(world, 5)
