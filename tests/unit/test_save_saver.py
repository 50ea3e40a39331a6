"""Rank 0's decision on each save, and what the other ranks do, with ranks as threads."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from engine.directory.record import CheckpointRecord
from engine.errors import SaveFailedError, SaveStuckError
from engine.format.names import attempt_name
from engine.options import Checks, FailurePolicy
from engine.ranks.calls import Calls
from engine.ranks.coordination import Channel
from engine.save.commit import SaveInfo
from engine.save.job import Job, JobRunner
from engine.save.outcomes import Outcomes, SaveHandle
from engine.save.saver import Busy, Saver
from engine.save.snapshot import Snapshot
from engine.save.staging_copy import Copier
from engine.state.capture import StateCapture
from tests.support.channels import DEADLINE_SECS, MemoryStore, on_ranks


class HurriedStore(MemoryStore):
    """From `hurry` on, what is not there at once never comes."""

    def __init__(self) -> None:
        super().__init__()
        self.hurry = False

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        if self.hurry and not self.check(keys):
            raise dist.DistStoreError(f"{keys} are not there")
        super().wait(keys, timeout)


class Writer:
    """Both background threads: a save commits once both ranks have come to it and `gate` is open."""

    doing = "writing"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.both = threading.Barrier(2)

    def run(self, job: Job) -> None:
        assert self.gate.wait(DEADLINE_SECS)
        self.both.wait(DEADLINE_SECS)
        job.handle.set_record(cast(CheckpointRecord, job.info.step))


class OneRank:
    """One rank's background thread: the save of step 1 fails once `gate` is open, all others commit."""

    doing = "writing"

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.gate = threading.Event()
        self.gate.set()

    def run(self, job: Job) -> None:
        assert self.gate.wait(DEADLINE_SECS)
        if job.info.step == 1:
            job.handle.set_failure(SaveFailedError("the checkpoint of step 1 was not saved: full"))
        else:
            job.handle.set_record(cast(CheckpointRecord, job.info.step))

    def on_event(self, event: dict[str, Any]) -> None:
        pass


def saver(
    channel: Channel, writer: Writer | OneRank, busy: Busy, policy: FailurePolicy | None = None
) -> Saver:
    return Saver(
        capture=StateCapture({"values": {"t": torch.zeros(5)}}, (), channel.rank),
        snapshot=Snapshot(channel.rank, pin=False, budget_bytes=None),
        copier=Copier(None, []),
        channel=channel,
        calls=Calls(channel, DEADLINE_SECS, DEADLINE_SECS),
        runner=cast(JobRunner, writer),
        outcomes=Outcomes(policy or FailurePolicy("raise", 1)),
        run_id="run",
        busy=busy,
        timeout_secs=DEADLINE_SECS,
        checks=Checks(),
        on_event=lambda event: None,
    )


def save(one: Saver, step: int) -> SaveHandle:
    return one.save(SaveInfo(step, attempt_name(step, "aaaaaaaa"), ("manual",)))


def test_a_rank_that_is_behind_still_hears_what_was_skipped() -> None:
    """Nobody waits for anybody to skip a save: rank 0 may have skipped many before another one asks."""
    store, writer = HurriedStore(), Writer()
    savers = [saver(Channel(rank, 2, store), writer, "skip") for rank in range(2)]
    on_ranks(2, lambda channel: save(savers[channel.rank], 1))
    for one in savers:
        store.hurry = one.channel.rank == 1
        assert [save(one, step).skipped for step in (2, 3, 4, 5)] == [True] * 4
    store.hurry = False
    writer.gate.set()
    for one in savers:
        one.wait()
    on_ranks(2, lambda channel: save(savers[channel.rank], 6).result())
    for one in savers:
        one.wait()
    on_ranks(2, lambda channel: save(savers[channel.rank], 7).result())
    left = [key for key in store.values if key.startswith("call/")]
    assert left == ["call/7"], "and what all have read is forgotten"


def test_decisions_do_not_pile_up() -> None:
    store, writer = MemoryStore(), Writer()
    writer.gate.set()
    savers = [saver(Channel(rank, 2, store), writer, "wait") for rank in range(2)]

    def work(channel: Channel) -> Any:
        return [save(savers[channel.rank], step).result() for step in range(5)]

    assert on_ranks(2, work) == [[0, 1, 2, 3, 4]] * 2
    assert [key for key in store.values if key.startswith("call/5")] == [
        key for key in store.values if key.startswith("call/")
    ]


def ended(one: Saver, step: int) -> Any:
    """What became of a save: its step, or the error."""
    try:
        return save(one, step).result()
    except SaveFailedError as error:
        return type(error), str(error)


@pytest.mark.parametrize("told", [None, 0, 1])
def test_rank_0_raises_a_failure_for_all_that_it_was_not_told_of(told: int | None) -> None:
    """Ranks may hear of a failure from a handle, each at its own time; what rank 0 knows counts."""
    store = MemoryStore()

    def work(channel: Channel) -> list[Any]:
        one = saver(channel, OneRank(channel), "wait")
        first = save(one, 1)
        one.wait()
        if channel.rank == told:
            with pytest.raises(SaveFailedError, match="full"):
                first.result()
        return [ended(one, step) for step in (2, 3)]

    raised = (SaveFailedError, "the checkpoint of step 1 was not saved: full")
    assert on_ranks(2, work, store) == [[2 if told == 0 else raised, 3]] * 2


@pytest.mark.parametrize(
    "policy", [FailurePolicy("raise"), FailurePolicy("warn", 3), FailurePolicy("warn", 1)]
)
def test_a_save_that_hangs_on_rank_0_is_a_failure_on_all_ranks(policy: FailurePolicy) -> None:
    store = MemoryStore()
    released = threading.Event()

    def work(channel: Channel) -> list[Any]:
        writer = OneRank(channel)
        one = saver(channel, writer, "wait", policy)
        if channel.rank == 0:
            writer.gate.clear()
            one.flight.stuck = True  # it was waited for long enough
        save(one, 4)
        found: list[Any] = []
        try:
            handle = save(one, 5)
            with pytest.raises(SaveFailedError) as caught:
                handle.result()
            found += ["endured", str(caught.value)]
        except SaveFailedError as error:
            found += [type(error), str(error)]
        finally:
            writer.gate.set()
            if channel.rank == 0:
                one.wait(DEADLINE_SECS)
                released.set()
        assert released.wait(DEADLINE_SECS)
        return [*found, ended(one, 6)]

    (zero, *first), (one, *second) = on_ranks(2, work, store)
    assert first == second
    assert "rank 0: the save of step 4 is still running" in first[0]
    assert first[1] == 6
    endured = policy == FailurePolicy("warn", 3)
    assert (zero, one) == (("endured", "endured") if endured else (SaveStuckError, SaveFailedError))
