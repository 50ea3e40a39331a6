"""The training thread's side of a save: decide, capture, plan, copy, and start the background thread.

Only one save is in flight at a time. For a moment the ranks may disagree on whether the previous save is
still being written, so rank 0 alone decides what to do about it, and the other ranks wait for its decision
(`engine.ranks.calls`): one store round trip per save, no collective.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field, replace
from typing import Literal

from engine.errors import (
    CoordinationError,
    HoldfastError,
    LateRanksError,
    SaveFailedError,
    SaveStuckError,
    may_pass,
)
from engine.format.json import canonical_bytes
from engine.format.names import new_attempt
from engine.gc_pause import CollectorPause
from engine.options import Checks
from engine.ranks.agreement import LATE_VERDICT_SECS, all_agree, all_arrive, open_call
from engine.ranks.calls import PREPARE, SAVE, Call, Calls, Request, end_call
from engine.ranks.coordination import Channel, Clock
from engine.save import events, shared_values
from engine.save.commit import SaveInfo
from engine.save.events import Listener
from engine.save.in_flight import Flight
from engine.save.job import Job, JobRunner
from engine.save.messages import Receipt, message_of
from engine.save.outcomes import Outcomes, SaveHandle
from engine.save.planner import LocalState, Planner
from engine.save.replicas import Comparison, Replicas
from engine.save.snapshot import Snapshot
from engine.save.snapshot_check import live_digests
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.staging_copy import Copier
from engine.state.capture import StateCapture

Busy = Literal["wait", "skip"]

STUCK_GRACE_SECS = 90.0
"""Added to a save's deadlines, for its commit and its clean-up."""


@dataclass(slots=True)
class Saver:
    """Takes snapshots and starts their background save. Used from the training thread only.

    Args:
        calls: matches the ranks' saves; rank 0 numbers them and names their attempts.
        run_id: makes attempt names unique.
        busy: what to do while the previous save is still being written.
        timeout_secs: how long ranks wait for each other within one save.
    """

    capture: StateCapture
    snapshot: Snapshot
    copier: Copier
    channel: Channel
    calls: Calls
    runner: JobRunner
    outcomes: Outcomes
    run_id: str
    busy: Busy
    timeout_secs: float
    checks: Checks
    on_event: Listener
    clock: Clock = time.monotonic
    flight: Flight = field(init=False)
    replicas: Replicas = field(init=False)
    planner: Planner = field(init=False)
    _pause: CollectorPause = field(default_factory=CollectorPause)
    _read_by_all: int = 0
    """How many announcements every rank has read once the newest save that was not skipped is committed."""

    def __post_init__(self) -> None:
        self.flight = Flight(self.runner, self.outcomes)
        self.replicas = Replicas(self.checks.replicas)
        self.planner = Planner(self.capture, self.snapshot, self.replicas, self.channel)
        # Of the channel alone: with this object in it, it would be a reference cycle.
        self.calls.on_missed = functools.partial(answer_missed, self.channel)

    def save(self, info: SaveInfo) -> SaveHandle:
        """Snapshot the state and start writing it. Every rank calls it for the same step.

        Fills in `info.attempt`, `info.world_size` and `info.mesh`.
        Raises: this rank's failure, such as StateError or MemoryBudgetError; the other ranks receive it as
            the failure of this save. SaveFailedError when an earlier save has failed, no call has raised that
            yet, and it is not tolerated: nothing is saved then.
        """
        with self._pause:
            return self._save(info)

    def _save(self, info: SaveInfo) -> SaveHandle:
        started = self.clock()
        try:
            call, state = self._decide(Request(SAVE, info.step))
        except CoordinationError as error:
            return self.flight.never_began(info, self.clock() - started, error)
        if call.term("action") == "skip":
            return SaveHandle(info.step, skipped=True)
        if call.term("action") == "fail":
            stuck = SaveStuckError(str(call.term("cause")))
            return self.flight.never_began(info, self.clock() - started, stuck)
        waited = self.clock()
        self.on_event(events.started(info.step, info.reasons))
        self.planner.plan(call, state, self.timeout_secs, committed=self.flight.committed)
        planned = self.clock()
        attempt = str(call.term("attempt"))
        info = replace(info, attempt=attempt, world_size=self.channel.world_size, mesh=state.mesh())
        job = self._job(call, info, state, started)
        job.secs.update(wait=waited - started, capture=planned - waited, copy=0.0)
        # Before the copy: the background thread writes each part of the staging buffer once it is filled.
        self.flight.start(job)
        if state.problem is None:
            self._copy(state, job)
        job.blocked_secs = self.clock() - started
        if state.problem is not None:
            if self.outcomes.policy.on_failure == "warn" and may_pass(state.problem):
                return job.handle  # it raises the failure; the next save raises it if there are too many
            # This call raises the cause itself, in its own class: the failure needs no further report.
            job.handle.mark_reported()
            raise state.problem
        self.on_event(events.snapshotted(info.step, job.blocked_secs, job.staged.file_bytes, job.secs))
        return job.handle

    def prepare(self) -> None:
        """Plan and allocate the staging buffer now instead of in the first save. Every rank calls it.

        Raises: what `save` would raise for this state, on every rank.
        """
        with self._pause:
            self._prepare(Request(PREPARE))

    def _prepare(self, request: Request) -> None:
        self.settle(request)
        call = open_call(self.calls, request, together=self.capture.asks_together)
        state = self._look(planning=True)
        self.planner.plan(call, state, self.timeout_secs, committed=self.flight.committed)
        try:
            # Do not wait a second time for ranks that missed the planning.
            secs = LATE_VERDICT_SECS if isinstance(state.problem, LateRanksError) else self.timeout_secs
            all_agree(self.channel, call.key, state.problem, secs, what=str(request))
        except HoldfastError as error:
            self.snapshot.forget_plan()  # the plan is void unless every rank has adopted it
            if isinstance(error, CoordinationError):
                end_call(self.channel, call)
            raise

    def settle(self, request: Request) -> None:
        """Wait for the save in flight before a call of all ranks that must not overlap with one."""
        self._begin(request)
        try:
            self.wait()
        except BaseException as error:
            self.calls.cancel(message_of(error))
            raise

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the save in flight ends, committed or failed. Raises: as `Flight.wait`."""
        self.flight.wait(self._most_secs, timeout)

    @property
    def _most_secs(self) -> float:
        return most_secs(self.timeout_secs)

    def _begin(self, request: Request) -> None:
        """On rank 0, if it must wait for the save in flight: announce that it has reached this call."""
        if self.channel.rank == 0 and self.flight.writing:
            self.calls.begin(request)

    def _decide(self, request: Request) -> tuple[Call, LocalState]:
        """Rank 0's decision on this save (its term "action"), and this rank's state if there is a save."""
        return self._lead(request) if self.channel.rank == 0 else self._follow(request)

    def _follow(self, request: Request) -> tuple[Call, LocalState]:
        """Every rank but 0: wait for rank 0's decision and obey."""
        call = self.calls.join(request)
        if call.term("action") in ("skip", "fail"):
            return call, LocalState()
        self.wait()
        if call.term("action") == "raise":
            # All ranks raise the same: each knows the outcome of the previous save now.
            own = self.flight.handle.take_failure() if self.flight.handle else None
            if own is not None and (self.outcomes.policy.on_failure == "raise" or not own.may_pass):
                raise own
            raise SaveFailedError(str(call.term("cause"))) from own
        if call.term("together"):
            all_arrive(self.channel, call, self.timeout_secs)
        return call, self._look(planning=bool(call.term("replan")))

    def _lead(self, request: Request) -> tuple[Call, LocalState]:
        """Rank 0: decide and announce it."""
        if self.busy == "skip" and self.flight.writing:
            return self._announce(request, "skip"), LocalState()
        self._begin(request)
        try:
            self.wait()
        except SaveStuckError as error:
            # `never_began` will count this failure on every rank; rank 0 decides for all whether to raise it.
            tolerated = self.outcomes.tolerates(error, uncounted=1)
            call = self._announce(request, "fail" if tolerated else "raise", cause=str(error))
            if tolerated:
                return call, LocalState()
            raise
        failure = self.flight.take_failure()
        if failure is not None:
            self._announce(request, "raise", cause=str(failure))
            raise failure
        if self.capture.asks_together:
            # All ranks look at their state together, and report what went wrong while planning.
            call = self._announce_go(request, replan=True, together=True)
            all_arrive(self.channel, call, self.timeout_secs)
            return call, self._look(planning=True)
        state = self._look()
        # Plan also after a problem on rank 0, because the other ranks learn of it in the planning; and after
        # a failed save, because some rank may have lost its plan: it ran out of memory, or its offer was
        # refused.
        replan = state.changed or state.problem is not None or self.flight.failed or self.planner.replaced
        state.planning = replan
        return self._announce_go(request, replan=replan, together=False), state

    def _announce_go(self, request: Request, *, replan: bool, together: bool) -> Call:
        """Announce a save that takes place, under a new attempt name."""
        if self.flight.committed:
            # Every rank took part in that save, so it has read its decision and all earlier ones. Not the
            # later ones: rank 0 skips a save without waiting for the others, so they may be behind.
            self.calls.forget(self._read_by_all)
            self._read_by_all = 0
        assert isinstance(request.subject, int)
        # Chosen by rank 0: nodes may have counted different numbers of restarts.
        attempt = new_attempt(request.subject, self.run_id, f"{self.run_id}/{self.calls.deciding}")
        call = self._announce(request, "go", replan=replan, together=together, attempt=attempt)
        self._read_by_all = self.calls.mark()
        return call

    def _announce(
        self,
        request: Request,
        action: Literal["go", "skip", "fail", "raise"],
        *,
        cause: str = "",
        replan: bool = False,
        together: bool = False,
        attempt: str = "",
    ) -> Call:
        terms = {
            "action": action,
            "cause": cause,
            "replan": replan,
            "together": together,
            "attempt": attempt,
        }
        return self.calls.decide(request, terms)

    def _look(self, *, planning: bool = False) -> LocalState:
        self._pause.begin()
        state = self.planner.look()
        state.planning = planning
        return state

    def _copy(self, state: LocalState, job: Job) -> None:
        started = self.clock()
        guarded = state.captured.guarded
        try:
            if self.snapshot.staging is not None:
                self.snapshot.staging.wait_ready()
            if self.checks.snapshots:
                job.live_digests = live_digests(self.snapshot)
            eager, overlapped = self.snapshot.copies(
                (lambda name, source: name in guarded and source.device.type != "cpu")
                if self.copier.overlaps
                else None
            )
            self.copier.copy(eager, overlapped, job.staged)
            job.secs["copy"] = self.clock() - started
        except BaseException as error:
            # The background thread waits for the copy, so it must learn of every error.
            job.staged.fail(error)
            if not isinstance(error, Exception):
                raise
            state.problem = error

    def _job(self, call: Call, info: SaveInfo, state: LocalState, started: float) -> Job:
        captured = state.captured
        kinds = self.capture.kinds(captured.shared)
        local = dict(captured.local)
        if self.channel.world_size > 1:  # a module's extra state may differ between ranks, like its buffers
            local |= {key: value for key, value in captured.shared.items() if kinds[key] == "module"}
        begun = self.clock()
        comparison = Comparison()
        if state.problem is None:
            try:
                comparison = self.replicas.look(self.snapshot.local_boxes, call.number)
            except Exception as error:
                state.problem = error
        return Job(
            call=call,
            info=info,
            handle=SaveHandle(info.step, most_secs=self._most_secs),
            staged=StagedSnapshot(self.snapshot.staging, self.copier.finish),
            local=local,
            objects=captured.shared,
            aliases=self.planner.aliases,
            tensors=self.planner.tensors,
            shared_digests={name: shared_values.digest(value) for name, value in captured.shared.items()},
            kinds=kinds,
            comparison=comparison,
            secs={"compare": self.clock() - begun} if comparison.found else {},
            started=started,
            problem=state.problem,
        )


def answer_missed(channel: Channel, call: Call, reason: str) -> None:
    """Answer a save that this rank has missed, with `reason` as its failure, so that rank 0 need not wait."""
    if call.request.kind != SAVE or call.term("action") in ("skip", "raise"):
        return
    if call.term("replan"):
        offer = {"error": reason, "may_pass": True, "held": []}
        channel.gather(f"{call.key}/plan/held", canonical_bytes(offer), 0)
    attempt = str(call.term("attempt") or "")
    receipt = Receipt(channel.rank, attempt, error=f"{CoordinationError.__name__}: {reason}")
    channel.gather(f"{call.key}/receipt", receipt.to_bytes(), 0)
    channel.gather(f"{call.key}/ack", b"1", 0)


def most_secs(timeout_secs: float) -> float:
    """The time after which every deadline of a save has passed; a save that meets a full disk runs twice."""
    return 2 * timeout_secs + STUCK_GRACE_SECS
