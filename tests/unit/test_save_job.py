"""One save on its background threads, with ranks as threads: any failure gives all ranks the same outcome."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch.distributed as dist

from engine.directory.listing import committed, list_checkpoints
from engine.directory.record import CheckpointRecord
from engine.errors import SaveFailedError, StorageFullError, StorageUnavailableError, UnsavableValueError
from engine.format.layout import plan_files
from engine.format.manifest import TensorInfo
from engine.format.names import attempt_name
from engine.ranks.calls import SAVE, Call, Request
from engine.ranks.coordination import Channel
from engine.save import job as job_module
from engine.save.commit import SaveInfo, commit, confirm_files
from engine.save.events import guarded
from engine.save.job import OUTCOME_GRACE_SECS, Job, JobRunner
from engine.save.messages import Receipt, record_to_json
from engine.save.outcomes import Outcomes, SaveHandle
from engine.save.run_directory import RunDirectory
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.staging_buffer import StagingBuffer
from engine.storage.local import LocalStorage
from tests.support.boxes import shards
from tests.support.channels import DEADLINE_SECS, BrokenStore, ImpatientStore, MemoryStore, on_ranks
from tests.support.controlled import ControlledStorage

ROWS = 20


class Rig:
    """A save of one tensor, cut over the ranks, with everything that a test may want to break."""

    def __init__(self, root: Path, world_size: int = 3) -> None:
        self.storage = ControlledStorage(root)
        self.storage.make_dir()
        self.world_size = world_size
        self.store = MemoryStore()
        self.more: Callable[[int], dict[str, Any]] = lambda rank: {}
        self.publish: Callable[..., CheckpointRecord] = self._publish
        self.clean_up: Callable[[], None] = lambda: None
        self.timeout_secs = DEADLINE_SECS
        self.clock: Callable[[], float] = time.monotonic
        self.events: list[tuple[int, dict[str, Any]]] = []
        self.outcomes: list[tuple[int, CheckpointRecord | None]] = []
        self.info = SaveInfo(7, attempt_name(7, "aaaaaaaa"), ("manual",), world_size=world_size)

    def _publish(self, *given: Any) -> CheckpointRecord:
        return commit(self.storage, None, *given, sequence=1, parent=None)

    def staged(self, rank: int) -> StagedSnapshot:
        chunk = shards("t", (ROWS, 3), self.world_size)[rank]
        return StagedSnapshot(StagingBuffer(plan_files(rank, [chunk]), pin=False))

    def job(self, rank: int) -> Job:
        staged = self.staged(rank)
        staged.advance(staged.slots[-1].begin + staged.slots[-1].padded_bytes)
        fields: dict[str, Any] = {
            "call": Call(1, Request(SAVE, 7), {}),
            "info": self.info,
            "handle": SaveHandle(7),
            "staged": staged,
            "local": {"mine": rank},
            "objects": {"n": 1},
            "aliases": {},
            "tensors": {"t": TensorInfo("F32", (ROWS, 3))},
            "shared_digests": {"n": "same"},
            "started": self.clock(),
        }
        return Job(**fields | self.more(rank))

    def runner(self, channel: Channel) -> JobRunner:
        directory = SimpleNamespace(
            storage=self.storage,
            failed_ids=set(),
            publish=self.publish,
            clean_up=self.clean_up,
            delete_expired=lambda *, disk_full: False,
        )
        return JobRunner(
            cast(RunDirectory, directory),
            channel,
            self.timeout_secs,
            cast(Outcomes, SimpleNamespace(note=lambda record: self.outcomes.append((channel.rank, record)))),
            guarded(lambda event: self.events.append((channel.rank, event))),
            clock=self.clock,
        )

    def run(self) -> list[Any]:
        """Each rank's record or failure."""

        def work(channel: Channel) -> CheckpointRecord | None:
            job = self.job(channel.rank)
            self.runner(channel).run(job)
            return job.handle.result(0)

        return on_ranks(self.world_size, work, self.store)

    def committed(self) -> list[CheckpointRecord]:
        return committed(list_checkpoints(LocalStorage(self.storage.root)))

    def check_failed(self, *words: str) -> None:
        """Every rank fails with the same words, nothing is committed or left, and the store is clean."""
        results = self.run()
        for result in results:
            assert isinstance(result, SaveFailedError)
            assert str(result).startswith("the checkpoint of step 7 was not saved: ")
            for word in words:
                assert word in str(result)
        assert list_checkpoints(LocalStorage(self.storage.root)) == []
        assert self.store.values == {}
        assert sorted(rank for rank, record in self.outcomes if record is None) == list(
            range(self.world_size)
        )
        kinds = [event["event"] for _, event in self.events]
        assert kinds == ["save_failed"] * self.world_size
        assert all(words[0] in event["cause"] for _, event in self.events)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_save_ends_with_one_record_on_all_ranks(world_size: int, tmp_path: Path) -> None:
    rig = Rig(tmp_path, world_size)
    results = rig.run()
    assert len(set(map(repr, results))) == 1
    assert rig.committed() == [results[0]]
    assert rig.store.values == {}, "keys are deleted afterwards"
    assert sorted(rig.outcomes, key=lambda outcome: outcome[0]) == [
        (r, results[0]) for r in range(world_size)
    ]
    assert [event["event"] for _, event in rig.events] == ["save_committed"] * world_size
    assert {event["id"] for _, event in rig.events} == {results[0].id}


@pytest.mark.parametrize(
    "metrics", [{}, {"val_loss": 2.5}, {"val_loss": float("nan"), "x": float("-inf")}], ids=str
)
def test_the_record_of_the_other_ranks_is_rank_0s(metrics: dict[str, float], rig: Rig) -> None:
    rig.info = SaveInfo(
        7, rig.info.attempt, ("best", "epoch"), epoch=3, tokens=2**40, metrics=metrics, world_size=3
    )
    results = rig.run()
    assert len(set(map(repr, results))) == 1
    assert results[2].reasons == ("best", "epoch")
    assert str(results[2].metrics) == str(metrics)
    assert set(record_to_json(results[0])) >= {"id", "step", "sequence", "manifest_digest"}


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_one_ranks_writer_fails(rank: int, rig: Rig) -> None:
    def broken(path: str) -> None:
        if f"shard-{rank:05d}" in path:
            raise StorageFullError("no space is left")

    rig.storage.broken = broken
    rig.check_failed(f"rank {rank}: StorageFullError: no space is left")


def test_all_writers_fail(rig: Rig) -> None:
    def broken(path: str) -> None:
        raise OSError("no space is left")

    rig.storage.broken = broken
    rig.check_failed("rank 0: OSError", "rank 1: OSError", "rank 2: OSError")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_whose_state_could_not_be_saved(rank: int, rig: Rig) -> None:
    problem = UnsavableValueError("loader.pool: a function")
    rig.more = lambda r: {"problem": problem} if r == rank else {}
    rig.check_failed(f"rank {rank}: UnsavableValueError: loader.pool: a function")


@pytest.mark.parametrize("rank", [0, 2])
def test_a_copy_that_failed_in_the_training_thread(rank: int, rig: Rig) -> None:
    staged = rig.staged(rank)
    staged.fail(RuntimeError("device lost"))
    rig.more = lambda r: {"staged": staged} if r == rank else {}
    rig.check_failed(f"rank {rank}: RuntimeError: device lost")


def test_values_that_differ_between_ranks(rig: Rig) -> None:
    rig.more = lambda rank: {"shared_digests": {"loader": str(rank // 2)}, "objects": {"loader": rank // 2}}
    rig.check_failed("loader differs on rank 2: 1 there, 0 on rank 0", "per_rank")


def test_a_bug_in_answering_leaves_nobody_waiting(rig: Rig) -> None:
    rig.more = lambda rank: {"shared_digests": {"loader": str(rank // 2)}}
    rig.check_failed("'loader'")


class Hands:
    """A clock that is moved by hand, or by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, secs: float) -> None:
        self.now += secs


def test_a_file_that_is_gone_by_the_commit_allows_none(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rank has reported it in good faith: the storage lost it, or is not the one that rank 0 sees."""
    real = job_module.write_rank

    def loses(storage: Any, attempt: str, *args: Any, **given: Any) -> Any:
        receipt = real(storage, attempt, *args, **given)
        if given["rank"] == 1:
            storage.delete_file(f"{attempt}/{receipt.files[0].file}")
        return receipt

    rig.clock = clock = Hands()
    monkeypatch.setattr(job_module, "write_rank", loses)
    monkeypatch.setattr(job_module, "confirm_files", functools.partial(confirm_files, sleep=clock.sleep))
    rig.check_failed("rank 1 wrote shard-00001.safetensors with", "rank 0 does not see it")


@pytest.mark.parametrize("late_secs", [OUTCOME_GRACE_SECS / 2, OUTCOME_GRACE_SECS / 2 + 0.1])
def test_a_rank_0_that_is_too_late_to_be_waited_for_does_not_commit(
    late_secs: float, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the other ranks may have counted the save as failed."""
    rig.clock = clock = Hands()

    def looks_for_long(*args: Any, **given: Any) -> None:
        clock.now = rig.timeout_secs + late_secs

    monkeypatch.setattr(job_module, "confirm_files", looks_for_long)
    if late_secs > OUTCOME_GRACE_SECS / 2:
        rig.check_failed("rank 0 was not ready to commit within")
    else:
        assert all(isinstance(result, CheckpointRecord) for result in rig.run())


def test_a_commit_that_fails(rig: Rig) -> None:
    def publish(*given: Any) -> CheckpointRecord:
        raise StorageUnavailableError("the store is down")

    rig.publish = publish
    rig.check_failed("the store is down")


def test_a_bug_in_the_commit(rig: Rig) -> None:
    def publish(*given: Any) -> CheckpointRecord:
        raise ZeroDivisionError

    rig.publish = publish
    rig.check_failed("ZeroDivisionError")


def test_a_commit_that_reports_failure_but_happened_is_not_torn_down(rig: Rig) -> None:
    def publish(*given: Any) -> CheckpointRecord:
        rig._publish(*given)
        raise StorageUnavailableError("no answer")

    rig.publish = publish
    assert all(isinstance(result, SaveFailedError) for result in rig.run())
    assert len(rig.committed()) == 1, "what is committed is never deleted on account of an error"


def test_a_rank_that_never_reports_is_named_to_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module, "ACKNOWLEDGE_SECS", 0.01)
    rig.timeout_secs = 0.01
    absent = rig.job(2)

    def work(channel: Channel) -> Any:
        if channel.rank == 2:
            return absent
        job = rig.job(channel.rank)
        rig.runner(channel).run(job)
        return job.handle.result(0)

    results = on_ranks(3, work, rig.store)
    for result in results[:2]:
        assert isinstance(result, SaveFailedError)
        assert "rank 2 did not report" in str(result)
    assert rig.committed() == []
    # It may still be writing into the attempt: that is left to the reaper.
    assert (Path(rig.storage.root) / rig.info.attempt).is_dir()
    # When it comes after all, it hears what has become of the save.
    rig.runner(Channel(2, 3, rig.store)).run(absent)
    with pytest.raises(SaveFailedError, match="rank 2 did not report"):
        absent.handle.result(0)


def test_a_rank_that_never_reports_is_not_waited_for_once_more(rig: Rig) -> None:
    store = ImpatientStore()
    rig.timeout_secs, rig.clock = 7.0, store.clock
    Channel(1, 3, store).gather("save/1/receipt", Receipt(1, rig.info.attempt, error="Odd: x").to_bytes(), 0)
    Channel(1, 3, store).gather("save/1/ack", b"1", 0)
    job = rig.job(0)
    rig.runner(Channel(0, 3, store, store.clock)).run(job)
    with pytest.raises(SaveFailedError, match="rank 2 did not report within 7 s in the save of step 7"):
        job.handle.result(0)
    assert store.now == 7
    assert b'"over":true' in store.values["call/1"], "it need not come any more"


def test_a_lost_connection_ends_every_wait(rig: Rig) -> None:
    for rank in (0, 1):
        job = rig.job(rank)
        rig.runner(Channel(rank, 3, BrokenStore())).run(job)
        with pytest.raises(SaveFailedError, match="lost its connection"):
            job.handle.result(0)
        rig.info = SaveInfo(7, attempt_name(7, "bbbbbbbb"), ("manual",), world_size=3)


@pytest.mark.parametrize("error", [StorageUnavailableError("down"), ZeroDivisionError("a bug")], ids=repr)
def test_clean_up_runs_on_rank_0_after_the_commit_and_fails_nothing(
    error: Exception, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[tuple[str, int]] = []

    def clean_up() -> None:
        seen.append((threading.current_thread().name, len(rig.committed())))
        raise error

    rig.clean_up = clean_up
    results = rig.run()
    assert all(isinstance(result, CheckpointRecord) for result in results)
    assert [count for _, count in seen] == [1], "once, and it sees the new checkpoint"
    assert str(error) in caplog.text


def test_a_listener_that_fails_fails_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    class Deaf(list[Any]):
        def append(self, item: Any) -> None:
            raise ValueError("cannot hear")

    rig.events = Deaf()
    assert all(isinstance(result, CheckpointRecord) for result in rig.run())
    assert "cannot hear" in caplog.text


def test_a_deadline_that_passed_in_the_training_thread_still_asks_once(rig: Rig) -> None:
    """A long copy must not turn into a save that gives up before it has looked."""
    rig.timeout_secs = 0.001
    rig.more = lambda rank: {"started": time.monotonic() - 10}
    assert all(isinstance(result, CheckpointRecord) for result in rig.run())


class CutOff(MemoryStore):
    """The connection is lost as soon as one kind of key is to be set or waited for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def set(self, key: str, value: bytes, /) -> None:
        self._reach(key)
        super().set(key, value)

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        self._reach(*keys)
        super().wait(keys, timeout)

    def _reach(self, *keys: str) -> None:
        if any(f"/{self.kind}" in key for key in keys):
            raise dist.DistNetworkError("connection reset by peer")


@pytest.mark.parametrize(("kind", "told"), [("outcome", [0]), ("ack", [0, 1, 2])])
def test_a_connection_that_is_lost_after_the_commit_does_not_undo_it(
    kind: str, told: list[int], rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 has committed, and whoever has heard its word knows that."""
    rig.store = CutOff(kind)
    results = rig.run()
    (record,) = rig.committed()
    assert [rank for rank, result in enumerate(results) if result == record] == told
    assert all(isinstance(results[rank], SaveFailedError) for rank in range(3) if rank not in told)
    assert "the outcome of step 7 did not reach every rank" in caplog.text


def test_a_failure_keeps_its_cause_when_it_cannot_be_told(rig: Rig) -> None:
    def publish(*given: Any) -> CheckpointRecord:
        raise StorageUnavailableError("the store is down")

    rig.publish = publish
    rig.store = CutOff("outcome")
    assert "the store is down" in str(rig.run()[0])
