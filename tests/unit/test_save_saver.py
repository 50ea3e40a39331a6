"""Rank 0's word on each save, as the other ranks hear it, ranks as threads."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from engine.directory.record import CheckpointRecord
from engine.format.names import attempt_name
from engine.options import Checks, FailurePolicy
from engine.ranks.calls import Calls
from engine.ranks.coordination import Channel
from engine.save.commit import SaveInfo
from engine.save.handle import SaveHandle
from engine.save.job import Job, JobRunner
from engine.save.outcomes import Outcomes
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


def saver(channel: Channel, writer: Writer, busy: Busy) -> Saver:
    return Saver(
        capture=StateCapture({"values": {"t": torch.zeros(5)}}, (), channel.rank),
        snapshot=Snapshot(channel.rank, pin=False, budget_bytes=None),
        copier=Copier(None, []),
        channel=channel,
        calls=Calls(channel, DEADLINE_SECS, DEADLINE_SECS),
        runner=cast(JobRunner, writer),
        outcomes=Outcomes(FailurePolicy("raise", 1)),
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
