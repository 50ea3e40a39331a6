"""One save on its background thread, from a staged snapshot to the outcome that every rank learns.

    every rank   write shards, index, directory -> receipt
    rank 0       all receipts are in and confirmed -> manifest = the commit -> outcome to all ranks
    every rank   outcome -> handle; acknowledgement, so that rank 0 can delete the outcome from the store
    rank 0       retention

A rank's failure travels in its receipt, so that all ranks learn the cause and none waits for a deadline
without need.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
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
    may_pass,
)
from engine.format.json import canonical_bytes
from engine.format.manifest import TensorInfo
from engine.ranks.calls import Call, end_call
from engine.ranks.coordination import Channel, Clock
from engine.save import events, shared_values
from engine.save.commit import SaveInfo, check_receipts, confirm_files
from engine.save.events import Listener
from engine.save.messages import (
    RETRY,
    Receipt,
    failures,
    lacked_space,
    message_of,
    outcome_from_bytes,
    outcome_to_bytes,
)
from engine.save.outcomes import Outcomes, SaveHandle
from engine.save.replicas import Comparison
from engine.save.run_directory import RunDirectory
from engine.save.snapshot_check import Digests, check_written
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.write import write_rank
from engine.state.optimizer_document import merge_documents
from engine.storage.base import Storage

log = logging.getLogger(__name__)

OUTCOME_GRACE_SECS = 60.0
"""Rank 0 waits for receipts, then commits; the other ranks wait this much longer for its outcome."""
ACKNOWLEDGE_SECS = 30.0


@dataclass(slots=True)
class Job:
    """Everything that the background thread needs of one save. The training thread no longer changes it.

    call: this save as a call of all ranks; its key prefixes the save's keys in the store.
    problem: this rank's failure in the training thread; its receipt reports it.
    staged: what this rank writes, possibly while it is still being copied.
    kinds: the kind of entry of each key of `objects`.
    comparison: this save's comparison of replicas.
    live_digests: the digests that the files must have when they are read back; empty without that check.
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
    kinds: Mapping[str, shared_values.Kind] = field(default_factory=dict)
    comparison: Comparison = field(default_factory=Comparison)


@dataclass(slots=True)
class JobRunner:
    """Runs jobs, one at a time. Its channel belongs to the background thread.

    Args:
        directory: where to save. Rank 0 publishes the manifest there, then deletes expired checkpoints.
        outcomes: counts every save before its handle is done.
    """

    directory: RunDirectory
    channel: Channel
    timeout_secs: float
    outcomes: Outcomes
    on_event: Listener
    clock: Clock = time.monotonic
    doing: str = ""
    """What the background thread is doing, for the message about a save that hangs."""

    @property
    def storage(self) -> Storage:
        return self.directory.storage

    def run(self, job: Job) -> None:
        """Run one save to its end. Never raises: the handle gets the outcome."""
        try:
            record = self._run(job)
        except BaseException as error:
            failure = _as_failure(job, error)
            log.error("%s", failure)
            self.outcomes.note(None)
            self._emit(job, "save_failed", job.staged.file_bytes, cause=message_of(error))
            job.handle.set_failure(failure)
            return
        self.outcomes.note(record)
        self._emit(job, "save_committed", record.bytes, path=record.path, id=record.id)
        job.handle.set_record(record)
        if self.channel.rank == 0:
            self.doing = "deleting expired checkpoints"
            try:
                self.directory.clean_up()
            except Exception as error:
                log.warning("clean-up after step %d failed; the next one tries again: %s", job.info.step,
                error)

    def _run(self, job: Job) -> CheckpointRecord:
        record = self._attempt(job, job.call.key, job.started + self.timeout_secs, may_retry=True)
        if record is None:  # the disk was full, and rank 0 has made room
            deadline = self.clock() + self.timeout_secs
            record = self._attempt(job, f"{job.call.key}/again", deadline, may_retry=False)
        assert record is not None
        return record

    def _attempt(self, job: Job, key: str, deadline: float, *, may_retry: bool) -> CheckpointRecord | None:
        """Write and commit; None on every rank if all must write once more."""
        self.doing = "writing this rank's shards"
        receipt = self._write(job)
        self.doing = "waiting for the other ranks"
        if self.channel.rank == 0:
            return self._lead(job, receipt, key, deadline, may_retry=may_retry)
        return self._follow(job, receipt, key, deadline)

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

    def _follow(self, job: Job, receipt: Receipt, key: str, deadline: float) -> CheckpointRecord | None:
        """Every rank but 0: send the receipt, answer rank 0's questions, wait for its outcome."""
        self.channel.gather(f"{key}/receipt", receipt.to_bytes(), 0)
        raw = self._await_outcome(key, deadline)
        if raw.startswith(shared_values.ASKING):
            own = shared_values.answer(raw, self.channel.rank, job.kinds, job.objects)
            self.channel.gather(f"{key}/values", own, 0)
            key = f"{key}/told"
            raw = self._await_outcome(key, deadline)
        with contextlib.suppress(CoordinationError):  # rank 0 may be gone; its outcome stands
            self.channel.gather(f"{key}/ack", b"1", 0)
        return outcome_from_bytes(raw)

    def _await_outcome(self, key: str, deadline: float) -> bytes:
        left_secs = max(1.0, deadline + OUTCOME_GRACE_SECS - self.clock())
        return self.channel.broadcast(f"{key}/outcome", None, left_secs)

    def _lead(
        self, job: Job, receipt: Receipt, key: str, deadline: float, *, may_retry: bool
    ) -> CheckpointRecord | None:
        """Rank 0: collect the receipts, commit, and tell every rank the outcome."""
        retry = False
        record: CheckpointRecord | None = None
        failure: BaseException | None = None
        try:
            receipts = self._collect_receipts(job, receipt, key, deadline)
            retry = may_retry and lacked_space(receipts) and self._make_room(job)
            wanted: dict[int, list[str]] = {}
            if not failures(receipts):
                wanted = shared_values.values_to_ask([receipt.shared for receipt in receipts])
            different: list[str] = []
            if wanted:
                own_keys = canonical_bytes({"0": wanted.get(0, [])})
                own = shared_values.answer(own_keys, 0, job.kinds, job.objects)
                # From here on the other ranks wait for the outcome under another key.
                asked_by, key = key, f"{key}/told"
                self.doing = "asking the other ranks for their values"
                left_secs = max(1.0, deadline - self.clock())
                told = shared_values.ask(self.channel, asked_by, wanted, own, left_secs)
                job.objects, different = shared_values.merge(job.objects, told, merge_documents)
            if not retry:
                record = self._commit(job, receipts, different, deadline)
        except BaseException as error:
            failure = error
            self._abandon(job, error)
        late = failure.ranks if isinstance(failure, LateRanksError) else ()
        self._tell(job, key, RETRY if retry else outcome_to_bytes(record, failure), late)
        if failure is not None:
            raise failure
        return record

    def _collect_receipts(self, job: Job, receipt: Receipt, key: str, deadline: float) -> list[Receipt]:
        started = self.clock()
        left_secs = max(1.0, deadline - started)
        raws = self.channel.gather(
            f"{key}/receipt", receipt.to_bytes(), left_secs, what=str(job.call.request)
        )
        assert raws is not None
        job.secs["receipts"] = self.clock() - started
        return [Receipt.from_bytes(raw) for raw in raws]

    def _make_room(self, job: Job) -> bool:
        """The disk is full and every rank has stopped writing: delete the attempt, then old checkpoints."""
        self.doing = "freeing space on a full disk"
        try:
            delete_attempt(self.storage, job.info.attempt)
            return self.directory.delete_expired(disk_full=True)
        except HoldfastError as problem:
            log.warning("could not free disk space for step %d: %s", job.info.step, problem)
            return False

    def _commit(
        self, job: Job, receipts: list[Receipt], different: list[str], deadline: float
    ) -> CheckpointRecord:
        self.doing = "committing"
        started = self.clock()
        shards = check_receipts(receipts, job.info.attempt, different, job.comparison)
        confirm_files(self.storage, job.info.attempt, shards, deadline, clock=self.clock)
        if self.clock() > deadline + OUTCOME_GRACE_SECS / 2:
            raise SaveFailedError(
                f"rank 0 was not ready to commit within {self.timeout_secs:g} s; the other ranks may have "
                "counted the save as failed. Look at rank 0's log for a slow disk or a hang"
            )
        record = self.directory.publish(job.info, shards, job.tensors, job.aliases, job.objects)
        job.secs["commit"] = self.clock() - started
        return record

    def _abandon(self, job: Job, error: BaseException) -> None:
        """Delete a failed attempt, unless a late rank may still write into it: the reaper will then."""
        self.doing = "deleting the failed attempt"
        self.directory.failed_ids.add(job.info.attempt)
        if isinstance(error, LateRanksError):
            with contextlib.suppress(CoordinationError):
                end_call(self.channel, job.call)
            return
        try:
            delete_attempt(self.storage, job.info.attempt)
        except HoldfastError as problem:
            log.warning("the failed attempt %s was left behind: %s", job.info.attempt, problem)

    def _tell(self, job: Job, key: str, outcome: bytes, late: Sequence[int] = ()) -> None:
        """Send the outcome, and wait until every rank has it before its key is deleted.

        The outcome stands even if a rank cannot be told. The key stays for late ranks; nothing waits for them
        again.
        """
        self.doing = "telling the other ranks the outcome"
        try:
            self.channel.broadcast(f"{key}/outcome", outcome, 0)
            self.channel.gather(f"{key}/ack", b"1", ACKNOWLEDGE_SECS, without=late)
            if not late:
                self.channel.forget([f"{key}/outcome"])
        except CoordinationError as error:  # late ranks included
            log.warning("the outcome of step %d did not reach every rank: %s", job.info.step, error)

    def _emit(self, job: Job, event: str, size_bytes: int, **more: Any) -> None:
        self.on_event(
            events.ended(
                event,
                job.info.step,
                job.info.reasons,
                blocked_secs=job.blocked_secs,
                total_secs=self.clock() - job.started,
                secs=job.secs,
                size_bytes=size_bytes,
                **more,
            )
        )


def _as_failure(job: Job, error: BaseException) -> SaveFailedError:
    message = f"the checkpoint of step {job.info.step} was not saved: {message_of(error)}"
    failure = (
        ReplicaMismatchError(message)
        if isinstance(error, ReplicaMismatchError)
        else SaveFailedError(message, may_pass=may_pass(error))
    )
    failure.__cause__ = error
    return failure
