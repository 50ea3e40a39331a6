"""Two jobs on one directory: a holder that is paused at any operation of a save, while another takes over."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.directory.marks import hold, release
from engine.errors import DirectoryHeldError, HoldfastError, LeaseLostError, SaveFailedError
from engine.lease.lease import Lease
from engine.lease.process import ProcessIdentity
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps, leftovers
from tests.faults.world import PATIENCE_SECS, World, here, job


class Hours:
    """A clock that sleeping moves; every machine has its own, hours apart from the others."""

    def __init__(self, offset_secs: float) -> None:
        self.now = offset_secs

    def __call__(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.now += secs


@pytest.fixture(autouse=True)
def each_job_on_its_own_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs cannot look each other's pids up, and their clocks differ."""
    me = ProcessIdentity.current()
    acquire = Lease.acquire

    def elsewhere(storage: Any, *, run_id: str) -> Lease:
        number = here().number
        clock = Hours(number * 3600.0)
        process = dataclasses.replace(me, host=f"host-{number}", boot_id=f"boot-{number}")
        return acquire(storage, run_id=run_id, clock=clock, sleep=clock.sleep, process=process, wall=clock)

    monkeypatch.setattr("engine.save.run_directory.Lease.acquire", elsewhere)


def paused_save(world: World, step: int) -> tuple[threading.Thread, list[Any]]:
    """Start a save in the background; its outcomes are in the list when the thread has ended."""
    outcomes: list[Any] = []
    thread = threading.Thread(target=lambda: outcomes.extend(world.save(step)), daemon=True)
    thread.start()
    return thread, outcomes


@pytest.mark.parametrize("level", ["disk", "asked"])
def test_a_holder_that_sleeps_at_any_operation_cannot_commit_nor_harm(
    level: str, root: Path, covered: Callable[[int], None]
) -> None:
    step, k, fired = 1, 0, True
    while fired:
        with job(root, 1) as sleeper:
            assert not isinstance(sleeper.save(step)[0], BaseException)
            sleeper.settle()
            asleep, awake = threading.Event(), threading.Event()

            def pause(name: str, real: Callable[[], Any], asleep: Any = asleep, awake: Any = awake) -> Any:
                asleep.set()
                assert awake.wait(PATIENCE_SECS)
                return real()

            target = getattr(sleeper.ranks[0], level)
            target.arm(k, pause)
            thread, outcomes = paused_save(sleeper, step + 1)
            saver = sleeper.ranks[0].ckpt._saver
            assert saver is not None
            while not asleep.wait(0.005) and (thread.is_alive() or saver.flight.writing):
                pass
            fired = bool(target.fired)
            with job(root, 1) as winner:
                assert not isinstance(winner.save(step + 2)[0], BaseException)
                winner.settle()
                before = committed_steps(root)
                awake.set()
                thread.join(PATIENCE_SECS)
                where = f"operation {k} ({target.fired})"
                (outcome,) = outcomes
                sleeper.settle()
                if isinstance(outcome, BaseException):
                    assert isinstance(outcome, SaveFailedError), where
                else:
                    assert step + 1 in before, f"{where}: committed after the takeover"
                assert isinstance(sleeper.save(step + 3)[0], SaveFailedError), f"{where}: the loser commits"
                sleeper.settle()
                assert committed_steps(root) == before, f"{where}: the loser changed what is committed"
                assert max(before) == step + 2
                step += 4
                assert not isinstance(winner.save(step)[0], BaseException)
                winner.settle()
                assert leftovers(root) == [], where
        k += 1
    assert k > (24 if level == "disk" else 12)
    covered(k - 1)


def test_of_takers_that_come_at_once_one_wins(root: Path, covered: Callable[[int], None]) -> None:
    """The holder is dead; several jobs find its lease stale at the same moment."""
    rounds = 15
    for number in range(rounds):
        worlds = [World(root, 1) for _ in range(3)]
        start = threading.Barrier(len(worlds))
        outcomes: list[BaseException | None] = [None] * len(worlds)

        def take(at: int, start: Any = start, worlds: Any = worlds, outcomes: Any = outcomes) -> None:
            start.wait()
            try:
                worlds[at].start()
            except HoldfastError as error:
                outcomes[at] = error

        with job(root, 1, world=World(root, 1)) as first:
            first.ranks[0].ckpt._directory.lease._stop.set()  # type: ignore[union-attr]
            threads = [threading.Thread(target=take, args=(at,)) for at in range(len(worlds))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE_SECS)
            won = [world for world, outcome in zip(worlds, outcomes, strict=True) if outcome is None]
            committed = [world for world in won if not isinstance(world.save(number)[0], BaseException)]
            assert len(committed) == 1, outcomes
            lost = [outcome for outcome in outcomes if outcome is not None]
            assert all(isinstance(outcome, DirectoryHeldError | LeaseLostError) for outcome in lost), lost
            assert isinstance(first.save(number)[0], SaveFailedError)
            for world in worlds:
                world.close()
    covered(rounds)


def test_a_second_job_is_refused_while_the_first_one_lives(root: Path) -> None:
    with job(root, 2) as world:
        world.save(1)
        lease = world.ranks[0].ckpt._directory.lease
        assert lease is not None
        real = Hours.sleep

        def sleep_and_beat(self: Hours, secs: float) -> None:
            real(self, secs)
            lease.heartbeat()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Hours, "sleep", sleep_and_beat)
            with pytest.raises(DirectoryHeldError, match="host-"), job(root, 2):
                pass
        assert not isinstance(world.save(2)[0], BaseException)


def test_the_retention_of_a_loser_removes_nothing(root: Path) -> None:
    storage = LocalStorage(root)
    with job(root, 1) as loser:
        for step in (1, 2, 3):
            assert not isinstance(loser.save(step)[0], BaseException)
            loser.settle()
            if step == 1:
                hold(storage, committed_steps(root)[1])
        release(storage, committed_steps(root)[1])
        with job(root, 1):
            (outcome,) = loser.each(lambda rank: rank.ckpt._directory.delete_expired())
            assert isinstance(outcome, LeaseLostError), repr(outcome)
            assert set(committed_steps(root)) == {1, 2, 3}
