"""A call that never returns: whoever waits is told in time what hangs, and the process still ends."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.errors import SaveFailedError, SaveStuckError
from engine.lease.lease_file import LeaseInfo
from engine.save.outcomes import SaveHandle
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps
from tests.faults.world import PATIENCE_SECS, Rank, World, job

ROOT = Path(__file__).resolve().parents[2]


class Hang:
    """An operation that does not return before `wake`."""

    def __init__(self, operation: str) -> None:
        self._operation, self._awake = operation, threading.Event()
        self.reached = threading.Event()

    def __call__(self, name: str, real: Callable[[], object]) -> object:
        if name == self._operation:
            self.reached.set()
            assert self._awake.wait(PATIENCE_SECS), "the test never woke it"
        return real()

    def wake(self) -> None:
        self._awake.set()


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[World], None]]:
    """Let every deadline of a save that is in flight pass at once, for those who wait for it."""

    def lose_it(world: World) -> None:
        monkeypatch.setattr("engine.save.saver.STUCK_GRACE_SECS", 0.0)
        for rank in world.ranks:
            monkeypatch.setattr(rank.ckpt._saver, "timeout_secs", 0.01)

    return lose_it


def hang_in(world: World, operation: str, step: int, rank: int = 0) -> Hang:
    """Start a save of which that rank's operation hangs."""
    hang = Hang(operation)
    world.ranks[rank].asked.arm(0, hang, sticky=True)

    def start(rank: Rank) -> None:
        rank.fill(step)
        rank.ckpt.save(step)

    for outcome in world.each(start):
        assert outcome is None, outcome
    assert hang.reached.wait(PATIENCE_SECS)
    return hang


OPERATIONS = {
    "write_shard": "writing this rank's shards",
    "publish": "committing",
    "clear_dir": "deleting expired checkpoints",
}
CALLS: dict[str, Callable[[Rank], object]] = {
    "close": lambda rank: rank.ckpt.close(),
    "wait": lambda rank: rank.ckpt.wait(),
    "save": lambda rank: rank.ckpt.save(9),
    "restore": lambda rank: rank.ckpt.restore(),
    "prepare": lambda rank: rank.ckpt.prepare(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_who_waits_for_a_save_that_hangs_is_told_what_hangs(
    operation: str, call: str, root: Path, no_patience: Callable[[World], None]
) -> None:
    with job(root, 1, on_failure="raise") as world:
        for step in (1, 2):
            assert not isinstance(world.save(step)[0], BaseException)
            world.settle()
        hang = hang_in(world, operation, 3)
        no_patience(world)
        (outcome,) = world.each(CALLS[call])
        assert isinstance(outcome, SaveStuckError), repr(outcome)
        assert "rank 0: the save of step 3 is still running" in str(outcome)
        assert OPERATIONS[operation] in str(outcome)
        hang.wake()
        world.settle()


def test_the_handle_of_a_save_that_hangs_does_not_hang(
    root: Path, monkeypatch: pytest.MonkeyPatch, no_patience: Callable[[World], None]
) -> None:
    with job(root, 1) as world:
        assert not isinstance(world.save(1)[0], BaseException)
        world.settle()
        hang = Hang("publish")
        world.ranks[0].asked.arm(0, hang, sticky=True)
        no_patience(world)
        monkeypatch.setattr(world.ranks[0].ckpt._saver.runner, "timeout_secs", 100.0)  # type: ignore[union-attr]

        def save(rank: Rank) -> object:
            return rank.ckpt.save(2).result()

        (outcome,) = world.each(save)
        assert isinstance(outcome, SaveStuckError), repr(outcome)
        assert "the save of step 2 has no outcome" in str(outcome)
        hang.wake()
        world.settle()


def test_the_other_ranks_hear_why_rank_0_cannot_save(
    root: Path, no_patience: Callable[[World], None]
) -> None:
    with job(root, 2, on_failure="raise") as world:
        for step in (1, 2):
            assert not isinstance(world.save(step)[0], BaseException)
            world.settle()
        hang = hang_in(world, "clear_dir", 3)
        no_patience(world)
        outcomes = world.save(4)
        hang.wake()
        world.settle()
        assert isinstance(outcomes[0], SaveStuckError)
        for outcome in outcomes:
            assert isinstance(outcome, SaveFailedError), repr(outcome)
            assert "rank 0: the save of step 3 is still running" in str(outcome)
        assert not isinstance(world.save(5)[0], BaseException), "I5: it has woken up"


def test_training_goes_on_past_a_save_that_hangs(
    root: Path, no_patience: Callable[[World], None], caplog: pytest.LogCaptureFixture
) -> None:
    """All ranks alike: the saves after it fail, too many of them raise, and once it wakes up all is well."""
    with job(root, 2, max_failures=3) as world:
        for step in (1, 2):
            assert not isinstance(world.save(step)[0], BaseException)
            world.settle()
        hang = hang_in(world, "clear_dir", 3)
        no_patience(world)
        for step in (4, 5):
            outcomes = world.each(lambda rank, step=step: rank.ckpt.save(step))  # type: ignore[misc]
            assert all(isinstance(outcome, SaveHandle) for outcome in outcomes), outcomes
            for outcome in outcomes:
                with pytest.raises(SaveFailedError, match="the save of step 3 is still running"):
                    outcome.result(0)
        outcomes = world.each(lambda rank: rank.ckpt.save(6))
        hang.wake()
        world.settle()
        for outcome in outcomes:
            assert isinstance(outcome, SaveFailedError), repr(outcome)
            assert "the save of step 3 is still running" in str(outcome)
        assert not isinstance(world.save(7)[0], BaseException), "I5: it has woken up"
    assert "the checkpoint of step 4 was not saved" in caplog.text
    assert set(committed_steps(root)) >= {3, 7}


def test_the_directory_is_not_given_away_while_a_writer_may_wake_up(
    root: Path, no_patience: Callable[[World], None]
) -> None:
    with job(root, 1) as world:
        assert not isinstance(world.save(1)[0], BaseException)
        world.settle()
        hang = hang_in(world, "publish", 2)
        no_patience(world)
        (outcome,) = world.each(lambda rank: rank.ckpt.close())
        assert isinstance(outcome, SaveStuckError)
        (lease,) = root.glob("lease-*")
        assert not LeaseInfo.from_bytes(lease.read_bytes(), 1, what="it").released
        hang.wake()
        saver = world.ranks[0].ckpt._saver
        assert saver is not None
        saver.wait(PATIENCE_SECS)
    assert set(committed_steps(root)) == {1, 2}


def test_a_storage_that_does_not_take_the_release_holds_nobody_up(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs between two saves: closing says so."""
    monkeypatch.setattr("engine.lease.lease.RELEASE_SECS", 0.01)
    with job(root, 1) as world:
        assert not isinstance(world.save(1)[0], BaseException)
        world.settle()
        hang = Hang("publish")
        world.ranks[0].asked.arm(0, hang, sticky=True)
        (outcome,) = world.each(lambda rank: rank.ckpt.close())
        hang.wake()
        assert isinstance(outcome, TimeoutError | OSError), repr(outcome)
        assert "the lease was not released" in str(outcome)
        lease = world.ranks[0].ckpt._directory.lease
        assert lease is not None
        assert lease._thread is not None
        lease._thread.join(PATIENCE_SECS)


HANGS_AT_EXIT = """
import logging, os, sys, torch
logging.basicConfig(level="ERROR")
from engine import Checkpointer
from engine.train.session import end_process
from engine.save import saver
from engine.storage.local import LocalStorage
reading, writing = os.pipe()
LocalStorage.write_shard = lambda *args, **given: os.read(reading, 1)  # a mount that is gone
saver.STUCK_GRACE_SECS = 0.0
ckpt = Checkpointer(sys.argv[1], {"values": {"t": torch.ones(2)}}, timeout_secs=0.1)
ckpt.save(5)
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [("", 1), ("sys.exit(0)", 1), ("end_process(2)", 1), ("\ntry: ckpt.close()\nfinally: end_process(2)", 2)],
    ids=["forgotten", "sys.exit", "end_process", "closed"],
)
def test_a_process_ends_although_a_save_hangs(ending: str, status: int, root: Path) -> None:
    """And not as if all were well. Without that the interpreter would join the thread for ever."""
    ran = subprocess.run(
        [sys.executable, "-c", HANGS_AT_EXIT + ending, root],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == status, ran.stderr
    if status == 1:
        assert "the save of step 5 is still running" in ran.stderr
        assert "writing this rank's shards" in ran.stderr


def test_nothing_of_that_is_said_when_a_slow_save_ends(root: Path) -> None:
    with job(root, 1) as world:
        assert not isinstance(world.save(1)[0], BaseException)
        hang = hang_in(world, "write_shard", 2)
        waiting = threading.Thread(target=world.ranks[0].ckpt.wait)
        waiting.start()
        hang.wake()
        waiting.join(PATIENCE_SECS)
        assert not waiting.is_alive()
    assert set(committed_steps(root)) == {1, 2}
    assert LocalStorage(root).list_dir()
