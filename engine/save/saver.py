"""The training thread's side of a save: decide, capture, copy, hand over to the background thread.

One save is in flight at a time, by construction. Whether the one before is still being written differs
between ranks for a moment, so rank 0 alone decides what to do about it, and every other rank waits for its
word (`engine.ranks.calls`): one store round trip a save, no collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from engine.errors import (
    CoordinationError,
    HoldfastError,
    LateRanksError,
    SaveFailedError,
    SaveStuckError,
    StateError,
)
from engine.format.manifest import TensorInfo
from engine.format.names import new_attempt
from engine.gc_pause import CollectorPause
from engine.options import Checks
from engine.ranks.agreement import LATE_VERDICT_SECS, all_agree, all_arrive, open_call
from engine.ranks.calls import PREPARE, SAVE, Call, Calls, Request, end_call
from engine.ranks.coordination import Channel
from engine.save import documents
from engine.save.commit import SaveInfo
from engine.save.handle import SaveHandle
from engine.save.in_flight import Flight
from engine.save.job import Job, JobRunner
from engine.save.local_view import Moment, look, mesh_description
from engine.save.missed_save import answer_on
from engine.save.outcomes import Outcomes, may_pass
from engine.save.replicas import Comparison, Replicas, buffer_digests
from engine.save.snapshot import Snapshot
from engine.save.snapshot_check import live_digests
from engine.save.staged_snapshot import StagedSnapshot
from engine.save.staging_copy import Copier
from engine.save.write_plan import agree_on_plan
from engine.state.capture import StateCapture
from engine.state.sharing import Offer

Busy = Literal["wait", "skip"]

STUCK_GRACE_SECS = 90.0
"""On top of a save's deadlines: for its commit and its clean-up."""


@dataclass(slots=True)
class Saver:
    """Takes snapshots and starts their background save. Used from the training thread only.

    Args:
        calls: which save all ranks are in; the number of a call and its attempt are rank 0's.
        run_id: makes attempt names unique.
        busy: what to do when the save before is still being written.
        timeout_secs: how long ranks wait for each other within one save.
        checks: what to compare at every save beyond the everyday.
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
    on_event: Callable[[dict[str, Any]], None]
    clock: Callable[[], float] = time.monotonic
    flight: Flight = field(init=False)
    replicas: Replicas = field(init=False)
    _pause: CollectorPause = field(default_factory=CollectorPause)
    _replaced: bool = False
    """Whether a restore has put other values into the state since the last plan."""
    _tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    _aliases: Mapping[str, str] = field(default_factory=dict)
    _read_by_all: int = 0
    """How many announcements every rank has read once the newest save that was not skipped is committed."""

    def __post_init__(self) -> None:
        self.flight = Flight(self.runner, self.outcomes)
        self.replicas = Replicas(self.checks.replicas)
        self.calls.on_missed = answer_on(self.channel)

    def state_replaced(self) -> None:
        """A restore has put other values into the state: the next save compares all replicas. Every rank."""
        self.replicas.forget()
        self._replaced = True

    def save(self, info: SaveInfo) -> SaveHandle:
        """Snapshot the state and start writing it. Every rank calls it for the same step.

        `info.attempt` and `info.mesh` are filled in here.
        Raises: StateError, MemoryBudgetError or whatever else this rank could not do; the other ranks learn
            of it as the failure of this save. SaveFailedError when a save before has failed, nobody has been
            told, and it is not endured: nothing is saved then.
        """
        with self._pause:
            return self._save(info)

    def _save(self, info: SaveInfo) -> SaveHandle:
        started = self.clock()
        try:
            call, moment = self._decide(Request(SAVE, info.step))
        except CoordinationError as error:
            return self.flight.never_began(info, self.clock() - started, error)
        if call.term("action") == "skip":
            return SaveHandle(info.step, skipped=True)
        if call.term("action") == "fail":
            stuck = SaveStuckError(str(call.term("cause")))
            return self.flight.never_began(info, self.clock() - started, stuck)
        waited = self.clock()
        self.on_event({"event": "save_started", "step": info.step, "reasons": list(info.reasons)})
        self._plan(call, moment)
        planned = self.clock()
        mesh = mesh_description(moment.captured.tensors)
        attempt = str(call.term("attempt"))
        info = replace(info, attempt=attempt, world_size=self.channel.world_size, mesh=mesh)
        job = self._job(call, info, moment, started)
        job.secs.update(wait=waited - started, capture=planned - waited, copy=0.0)
        # Started before the copy: it writes each part of the staging buffer as soon as that is filled.
        self.flight.start(job)
        if moment.problem is None:
            self._copy(moment, job)
        job.blocked_secs = self.clock() - started
        if moment.problem is not None:
            if self.outcomes.policy.on_failure == "warn" and may_pass(moment.problem):
                return job.handle  # which has it, and whoever saves next is told if there are too many
            # The caller gets the cause at once and in its own class: nobody need be told of it again.
            job.handle.mark_told()
            raise moment.problem
        self._announce_snapshot(job)
        return job.handle

    def prepare(self) -> None:
        """Plan and take the staging buffer now, so that the first save need not. Every rank calls it.

        Raises: what `save` would raise for this state; every rank then raises.
        """
        with self._pause:
            self._prepare(Request(PREPARE))

    def _prepare(self, request: Request) -> None:
        self.settle(request)
        call = open_call(self.calls, request, together=self.capture.asks_together)
        moment = self._look()
        moment.planning = True
        self._plan(call, moment)
        try:
            # Who has not come to the planning is not waited for once more.
            secs = LATE_VERDICT_SECS if isinstance(moment.problem, LateRanksError) else self.timeout_secs
            all_agree(self.channel, call.key, moment.problem, secs, what=str(request))
        except HoldfastError as error:
            self.snapshot.forget_plan()  # a plan that one rank could not take is none
            if isinstance(error, CoordinationError):
                end_call(self.channel, call)
            raise

    def settle(self, request: Request) -> None:
        """Have no save in flight before a call of all ranks that bears none."""
        self._begin(request)
        try:
            self.wait()
        except BaseException as error:
            self.calls.cancel(str(error) or type(error).__name__)
            raise

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the save in flight, whatever its outcome. Raises: as `Flight.wait`."""
        self.flight.wait(self._most_secs, timeout)

    @property
    def _most_secs(self) -> float:
        return most_secs(self.timeout_secs)

    def _begin(self, request: Request) -> None:
        """Tell the others that rank 0 has come, when they have to wait for it all the same."""
        if self.channel.rank == 0 and self.flight.writing:
            self.calls.begin(request)

    def _decide(self, request: Request) -> tuple[Call, Moment]:
        """Rank 0's word on this save ("go" or "skip"), and this rank's state."""
        if self.channel.rank != 0:
            call = self.calls.join(request)
            if call.term("action") in ("skip", "fail"):
                return call, Moment()
            self.wait()
            if call.term("action") == "raise":
                # The same on every rank: each knows the outcome of the save before by now.
                told = self.flight.handle.take_failure() if self.flight.handle else None
                if told is not None and (self.outcomes.policy.on_failure == "raise" or not told.may_pass):
                    raise told
                raise SaveFailedError(str(call.term("cause"))) from told
            if call.term("together"):
                all_arrive(self.channel, call, self.timeout_secs)
            moment = self._look()
            moment.planning = bool(call.term("replan"))
            return call, moment
        if self.busy == "skip" and self.flight.writing:
            return self._announce(request, "skip"), Moment()
        self._begin(request)
        try:
            self.wait()
        except SaveStuckError as error:
            # One more failure, as `never_began` counts it: rank 0 decides for all what becomes of it.
            endured = self.outcomes.endures(error, more=1)
            call = self._announce(request, "fail" if endured else "raise", cause=str(error))
            if endured:
                return call, Moment()
            raise
        failure = self.flight.take_failure()
        if failure is not None:
            self._announce(request, "raise", cause=str(failure))
            raise failure
        if self.capture.asks_together:
            # The others look now, too, and what they find is said while planning.
            self._forget_decisions()
            call = self._announce(request, "go", replan=True, together=True)
            self._read_by_all = self.calls.mark()
            all_arrive(self.channel, call, self.timeout_secs)
            moment = self._look()
            moment.planning = True
            return call, moment
        moment = self._look()
        # With a problem of its own rank 0 calls for a plan too: that is where the others hear of it first.
        # After a failed save some rank may have none: it ran out of memory, or was refused.
        moment.planning = moment.changed or moment.problem is not None or self.flight.failed or self._replaced
        self._forget_decisions()
        call = self._announce(request, "go", replan=moment.planning)
        self._read_by_all = self.calls.mark()
        return call, moment

    def _announce(
        self,
        request: Request,
        action: str,
        *,
        cause: str = "",
        replan: bool = False,
        together: bool = False,
    ) -> Call:
        terms = {"action": action, "cause": cause, "replan": replan, "together": together, "attempt": ""}
        if action == "go":
            assert isinstance(request.subject, int)
            # Rank 0's alone: nodes may have different ideas of how often they were restarted.
            key = f"{self.run_id}/{self.calls.deciding}"
            terms["attempt"] = new_attempt(request.subject, self.run_id, key)
        return self.calls.decide(request, terms)

    def _forget_decisions(self) -> None:
        """Whoever took part in a save has read the word on it, and all words before.

        Not the words that followed: rank 0 waits for nobody to skip a save, so the others may be behind.
        """
        if self.flight.committed:
            self.calls.forget(self._read_by_all)
            self._read_by_all = 0

    def _look(self) -> Moment:
        self._pause.begin()
        return look(self.capture, self.snapshot)

    def _plan(self, call: Call, moment: Moment) -> None:
        """Take part in planning when rank 0 says so."""
        if not moment.planning:
            if moment.changed and moment.problem is None:
                moment.problem = StateError(
                    f"the tensors of rank {self.channel.rank}'s state have changed since the last save, "
                    "those of rank 0 have not; change the state on all ranks before the same save"
                )
            return
        self._replaced = False
        if self.flight.committed:
            self.replicas.confirm()
        try:
            plan = agree_on_plan(
                self.channel,
                f"{call.key}/plan",
                self._offer(moment),
                moment.problem,
                self.timeout_secs,
                self.replicas.compared,
                str(call.request),
            )
            self._tensors, self._aliases = plan.tensors, plan.aliases
            self.snapshot.adopt(plan.parts)
            self.replicas.adopt(plan, self.snapshot.memory)
        except Exception as error:
            self.snapshot.forget_plan()
            moment.problem = error

    def _offer(self, moment: Moment) -> Offer:
        """What this rank brings to a plan; its failure is kept, as that of `_look`."""
        if moment.problem is None and self.channel.world_size > 1:
            held = self.snapshot.memory
            try:
                return Offer(
                    self.snapshot.held,
                    buffer_digests(held, moment.captured.buffers),
                    moment.captured.aliases,
                    any(item.tensor.device.type != "cpu" for item in held),
                    moment.captured.stateless,
                )
            except Exception as error:
                moment.problem = error
        return Offer([] if moment.problem else self.snapshot.held, {}, moment.captured.aliases)

    def _copy(self, moment: Moment, job: Job) -> None:
        started = self.clock()
        guarded = moment.captured.guarded
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
            # The background thread waits for the copy: it has to learn of every error.
            job.staged.fail(error)
            if not isinstance(error, Exception):
                raise
            moment.problem = error

    def _job(self, call: Call, info: SaveInfo, moment: Moment, started: float) -> Job:
        captured = moment.captured
        kinds = self.capture.kinds(captured.shared)
        local = dict(captured.local)
        if self.channel.world_size > 1:  # a module's extra state may differ between ranks, as its buffers may
            local |= {key: value for key, value in captured.shared.items() if kinds[key] == "module"}
        begun = self.clock()
        comparison = Comparison()
        if moment.problem is None:
            try:
                comparison = self.replicas.look(self.snapshot.memory, call.number)
            except Exception as error:
                moment.problem = error
        return Job(
            call=call,
            info=info,
            handle=SaveHandle(info.step, most_secs=self._most_secs),
            staged=StagedSnapshot(self.snapshot.staging, self.copier.finish),
            local=local,
            objects=captured.shared,
            aliases=self._aliases,
            tensors=self._tensors,
            shared_digests={name: documents.digest(value) for name, value in captured.shared.items()},
            kinds=kinds,
            comparison=comparison,
            secs={"compare": self.clock() - begun} if comparison.found else {},
            started=started,
            problem=moment.problem,
        )

    def _announce_snapshot(self, job: Job) -> None:
        causes = [cause for cause in ("wait", "capture", "compare", "copy") if cause in job.secs]
        self.on_event(
            {
                "event": "save_snapshotted",
                "step": job.info.step,
                "blocked_secs": job.blocked_secs,
                "bytes": job.staged.file_bytes,
                "secs_by_cause": {cause: round(job.secs[cause], 6) for cause in causes},
            }
        )


def most_secs(timeout_secs: float) -> float:
    """By then every deadline of a save has passed: a disk that is full costs it its time twice."""
    return 2 * timeout_secs + STUCK_GRACE_SECS
