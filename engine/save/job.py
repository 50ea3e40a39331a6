"""One save on its background thread, from a staged snapshot to the outcome that every rank learns.

    every rank   write shards, index, directory -> receipt
    rank 0       all receipts in and confirmed -> manifest = the commit -> outcome to all
    every rank   outcome -> handle; acknowledged, so that rank 0 may forget it
    rank 0       retention

Whatever fails on one rank travels in its receipt, so that all ranks learn the cause and nobody waits for a
deadline that is not needed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.directory.reaper import delete_attempt
from engine.directory.record import CheckpointRecord
from engine.errors import (
    CoordinationError,
    HoldfastError,
    LateRanksError,
    ReplicaMismatchError,
    SaveFailedError,
)
from engine.format.best import BestRule
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.manifest import TensorInfo
from engine.ranks.calls import Call, end_call
from engine.ranks.coordination import Channel
from engine.save import documents
from engine.save.commit import SaveInfo, check_receipts, confirm_files
from engine.save.handle import SaveHandle
from engine.save.outcomes import Outcomes, may_pass
from engine.save.receipt import Receipt, failures, lacked_space
from engine.save.replicas import Comparison
from engine.save.run_directory import RunDirectory
from engine.save.snapshot_check import Digests, check_written
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.write import write_rank
from engine.state.optimizer_document import merge_documents
from engine.storage.base import Storage

log = logging.getLogger(__name__)

OUTCOME_GRACE_SECS = 60.0
"""How much longer than for receipts the ranks wait for rank 0's word: it also has to commit."""
ACKNOWLEDGE_SECS = 30.0
_AGAIN = b"again"


@dataclass(slots=True)
class Job:
    """Everything the background thread needs of one save; nothing in it changes under its feet.

    call: the call of all ranks that this save is; its key is the prefix of this save's in the store.
    problem: what already failed on this rank in the training thread; its receipt carries it.
    staged: what this rank writes, while it is still being copied.
    kinds: what kind of entry each key of `objects` is.
    comparison: what this save compares of what several ranks hold.
    live_digests: what has to be found when the files are read back; empty when that is not asked for.
    """

    call: Call
    info: SaveInfo
    handle: SaveHandle
    staged: StagedSnapshot
    local: Mapping[str, Any]
    objects: Mapping[str, Any]
    aliases: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    shared_digests: Mapping[str, str]
    started: float
    blocked_secs: float = 0.0
    problem: Exception | None = None
    secs: dict[str, float] = field(default_factory=dict)
    live_digests: Digests = field(default_factory=dict)
    kinds: Mapping[str, documents.Kind] = field(default_factory=dict)
    comparison: Comparison = field(default_factory=Comparison)


@dataclass(slots=True)
class JobRunner:
    """Runs jobs, one at a time. Its channel belongs to the background thread.

    Args:
        directory: where the save goes. Rank 0 publishes the manifest there, then deletes what has expired.
        outcomes: hears of every save before anybody who waits for it.
    """

    directory: RunDirectory
    channel: Channel
    timeout_secs: float
    outcomes: Outcomes
    on_event: Callable[[dict[str, Any]], None]
    clock: Callable[[], float] = time.monotonic
    doing: str = ""
    """What the background thread is at, in words, for the message of whoever waits too long."""

    @property
    def storage(self) -> Storage:
        return self.directory.storage

    def run(self, job: Job) -> None:
        """Carry one save through. Never raises: the outcome is in the handle."""
        try:
            record = self._run(job)
        except BaseException as error:
            failure = _as_failure(job, error)
            log.error("%s", failure)
            self.outcomes.note(None)
            self._emit(job, "save_failed", cause=_words(error))
            job.handle.set_failure(failure)
            return
        self.outcomes.note(record)
        self._emit(job, "save_committed", path=record.path, bytes=record.bytes, id=record.id)
        job.handle.set_record(record)
        if self.channel.rank == 0:
            self.doing = "deleting expired checkpoints"
            try:
                self.directory.clean_up()
            except Exception as error:
                log.warning(
                    "cleaning up after step %d failed and will be tried again: %s", job.info.step, error
                )

    def _run(self, job: Job) -> CheckpointRecord:
        record = self._attempt(job, job.call.key, job.started + self.timeout_secs, may_retry=True)
        if record is None:  # the disk was full, and room was made
            deadline = self.clock() + self.timeout_secs
            record = self._attempt(job, f"{job.call.key}/again", deadline, may_retry=False)
        assert record is not None
        return record

    def _attempt(self, job: Job, key: str, deadline: float, *, may_retry: bool) -> CheckpointRecord | None:
        """Write and commit; None on every rank when all are to try once more."""
        self.doing = "writing this rank's shards"
        receipt = self._write(job)
        self.doing = "waiting for the other ranks"
        started = self.clock()
        if self.channel.rank != 0:
            self.channel.gather(f"{key}/receipt", receipt.to_bytes(), 0)
            raw = self.channel.broadcast(
                f"{key}/outcome", None, max(1.0, deadline + OUTCOME_GRACE_SECS - self.clock())
            )
            if raw.startswith(documents.ASKING):
                own = documents.answer(raw, self.channel.rank, job.kinds, job.objects)
                self.channel.gather(f"{key}/values", own, 0)
                key = f"{key}/told"
                raw = self.channel.broadcast(
                    f"{key}/outcome", None, max(1.0, deadline + OUTCOME_GRACE_SECS - self.clock())
                )
            with contextlib.suppress(CoordinationError):  # rank 0 may be gone; its word stands
                self.channel.gather(f"{key}/ack", b"1", 0)
            return None if raw == _AGAIN else _record_from(raw)
        record: CheckpointRecord | None = None
        failure: BaseException | None = None
        try:
            raws = self.channel.gather(
                f"{key}/receipt",
                receipt.to_bytes(),
                max(1.0, deadline - self.clock()),
                what=str(job.call.request),
            )
            assert raws is not None
            job.secs["receipts"] = self.clock() - started
            receipts = [Receipt.from_bytes(raw) for raw in raws]
            again = may_retry and lacked_space(receipts) and self._make_room(job)
            wanted = {} if failures(receipts) else documents.to_ask([receipt.shared for receipt in receipts])
            different: list[str] = []
            if wanted:
                own = documents.answer(canonical_bytes({"0": wanted.get(0, [])}), 0, job.kinds, job.objects)
                # From here on the others wait for the outcome under another key.
                asked_by, key = key, f"{key}/told"
                self.doing = "asking the other ranks for their values"
                told = documents.ask(self.channel, asked_by, wanted, own, max(1.0, deadline - self.clock()))
                job.objects, different = documents.put_together(job.objects, told, merge_documents)
            record = None if again else self._commit(job, receipts, different, deadline)
        except BaseException as error:
            failure = error
            self.doing = "removing the failed attempt"
            self._clean_up(job, error)
            if isinstance(error, LateRanksError):
                with contextlib.suppress(CoordinationError):
                    end_call(self.channel, job.call)
        if record is None and failure is None:
            self._tell(job, key, _AGAIN)
            return None
        document = {
            "error": "" if failure is None else _words(failure),
            "may_pass": failure is not None and may_pass(failure),
            "replicas": isinstance(failure, ReplicaMismatchError),
            "record": record and record_to_json(record),
        }
        late = failure.ranks if isinstance(failure, LateRanksError) else ()
        self._tell(job, key, canonical_bytes(document), late)
        if failure is not None:
            raise failure
        return record

    def _make_room(self, job: Job) -> bool:
        """The disk is full, and every rank has stopped writing: clear the attempt, then old checkpoints."""
        self.doing = "making room on a full disk"
        try:
            delete_attempt(self.storage, job.info.attempt)
            return self.directory.delete_expired(disk_full=True)
        except HoldfastError as problem:
            log.warning("no room could be made for step %d: %s", job.info.step, problem)
            return False

    def _write(self, job: Job) -> Receipt:
        rank = self.channel.rank
        try:
            if job.problem is not None:
                raise job.problem
            shard = write_rank(
                self.storage,
                job.info.attempt,
                job.staged.files(clock=self.clock),
                rank=rank,
                world_size=self.channel.world_size,
                local=job.local,
                secs=job.secs,
                clock=self.clock,
            )
            replicas = job.comparison.texts()
            if job.live_digests:
                check_written(self.storage, job.info.attempt, job.staged.slots, job.live_digests)
        except Exception as error:
            return Receipt(rank, job.info.attempt, error=f"{type(error).__name__}: {error}")
        return Receipt(rank, job.info.attempt, shard, job.shared_digests, replicas, dict(job.secs))

    def _commit(
        self, job: Job, receipts: list[Receipt], different: list[str], deadline: float
    ) -> CheckpointRecord:
        self.doing = "committing"
        started = self.clock()
        shards = check_receipts(receipts, job.info.attempt, different, job.comparison)
        confirm_files(self.storage, job.info.attempt, shards, deadline, clock=self.clock)
        if self.clock() > deadline + OUTCOME_GRACE_SECS / 2:
            raise SaveFailedError(
                f"rank 0 was not ready to commit within {self.timeout_secs:g} s; the other ranks count the "
                "save as failed by now. Look at its log for a slow disk or a hang"
            )
        record = self.directory.publish(job.info, shards, job.tensors, job.aliases, job.objects)
        job.secs["commit"] = self.clock() - started
        return record

    def _clean_up(self, job: Job, error: BaseException) -> None:
        """Remove a failed attempt, unless a late rank may still be writing into it: then the reaper will."""
        self.directory.failed_ids.add(job.info.attempt)
        if isinstance(error, LateRanksError):
            return
        try:
            delete_attempt(self.storage, job.info.attempt)
        except HoldfastError as problem:
            log.warning("the failed attempt %s was left behind: %s", job.info.attempt, problem)

    def _tell(self, job: Job, key: str, outcome: bytes, late: Sequence[int] = ()) -> None:
        """Give every rank the outcome, and see that they have it before the key goes.

        Ranks that cannot be told change nothing about it: what is committed is. The key stays for those that
        are late, and nobody waits for them once more.
        """
        self.doing = "telling the other ranks the outcome"
        try:
            self.channel.broadcast(f"{key}/outcome", outcome, 0)
            self.channel.gather(f"{key}/ack", b"1", ACKNOWLEDGE_SECS, without=late)
            if not late:
                self.channel.forget([f"{key}/outcome"])
        except CoordinationError as error:  # that they are late among others
            log.warning("the outcome of step %d did not reach everyone: %s", job.info.step, error)

    def _emit(self, job: Job, event: str, **more: Any) -> None:
        document = {
            "event": event,
            "step": job.info.step,
            "blocked_secs": job.blocked_secs,
            "secs": self.clock() - job.started,
            "reasons": list(job.info.reasons),
            "secs_by_cause": {cause: round(value, 6) for cause, value in job.secs.items()},
            "bytes": job.staged.file_bytes,
            **more,
        }
        try:
            self.on_event(document)
        except Exception:
            log.exception("a listener failed on %s of step %d", event, job.info.step)


def record_to_json(record: CheckpointRecord) -> dict[str, Any]:
    """A record as ranks send it to each other."""
    return {name: getattr(record, name) for name in record.__slots__} | {
        "best": record.best.to_json(),
        "reasons": list(record.reasons),
        "metrics": {name: str(value) for name, value in record.metrics.items()},
    }


def _record_from(raw: bytes) -> CheckpointRecord:
    document = parse_canonical(raw, what="the outcome of a save")
    if document["replicas"]:
        raise ReplicaMismatchError(document["error"])
    if document["error"]:
        raise SaveFailedError(document["error"], may_pass=document["may_pass"])
    fields = document["record"]
    fields["reasons"] = tuple(fields["reasons"])
    fields["best"] = BestRule(**fields["best"])
    fields["metrics"] = {name: float(value) for name, value in fields["metrics"].items()}
    return CheckpointRecord(**fields)


def _as_failure(job: Job, error: BaseException) -> SaveFailedError:
    words = f"the checkpoint of step {job.info.step} was not saved: {_words(error)}"
    apart = isinstance(error, ReplicaMismatchError)
    failure = ReplicaMismatchError(words) if apart else SaveFailedError(words, may_pass=may_pass(error))
    failure.__cause__ = error
    return failure


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__
