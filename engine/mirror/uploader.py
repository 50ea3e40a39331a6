"""Brings committed checkpoints to the mirror, in the background, and never gets in the way of a save.

A thread of its own waits for commits, copies what is owed, and applies the run's retention to the mirror.
Whatever the mirror does, it costs the training an event and a log line per outage; the next commit tries
again, and so does time. What is left at the end is completed by the next start: copies that were broken off
are continued, not repeated.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.directory import marks
from engine.directory.listing import Memory, committed, exempt_ids, highest_sequence, list_checkpoints
from engine.directory.pending import pending_copies
from engine.directory.reaper import reap, reap_abandoned
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention, by_sequence, decide_retention
from engine.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    HoldfastError,
    LeaseLostError,
    NotFoundError,
    StorageUnavailableError,
)
from engine.forks import Home
from engine.format.names import MANIFEST, lease_name
from engine.lease.lease import Lease
from engine.mirror.copy_checkpoint import Cancelled, Copied, copy_checkpoint
from engine.storage.base import Storage
from engine.storage.open import open_storage

log = logging.getLogger(__name__)

RETRY_SECS = 60.0
"""After a failure, how long to wait for the next commit before trying again without one."""

CANCEL_SECS = 3.0
"""How long a copy that was asked to stop may take to do so."""

THREAD_NAME = "holdfast-mirror"
_POLL_SECS = 0.2

Patience = Callable[[], float | None]
"""Seconds that are left for the mirror at the end of a run; None for as long as it gets on."""


def no_limit() -> float | None:
    """Wait for the mirror until it has everything, or fails."""
    return None


def at_most(secs: float) -> Patience:
    """Wait for the mirror for so long, from now on."""
    end = time.monotonic() + secs
    return lambda: max(0.0, end - time.monotonic())


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """What a run wants of its mirror: see `owed.is_mirrored`; its policy (None keeps all); and its name."""

    freq: int
    retention: Retention | None
    run_id: str


def open_mirror(
    mirror: str | os.PathLike[str] | None, local: Storage, options: Mapping[str, str] | None
) -> Storage | None:
    """The storage of a mirror, if there is one. ConfigError when it is the directory itself."""
    if mirror is None:
        return None
    storage = open_storage(mirror, options)
    if storage.uri == local.uri:
        raise ConfigError(f"{storage.uri} is both the directory and its mirror: give two different ones")
    return storage


def copies_hang() -> bool:
    """Whether a mirror that was closed is still in a call to its storage, which may go on for long."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


class Mirror:
    """The mirror of one run's directory, on rank 0. Any thread may read `pending_ids` and `in_flight`.

    Args:
        local: the run's own directory.
        storage: where the copies go.
        on_event: told of "mirror_copied" and "mirror_failed", from the mirror's thread.
    """

    def __init__(
        self,
        local: Storage,
        storage: Storage,
        plan: MirrorPlan,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._local, self.storage = local, storage
        self._plan = plan
        self._on_event = on_event
        self._lease: Lease | None = None
        self._lock = threading.Lock()
        self._there: tuple[CheckpointRecord, ...] = ()
        self._seen_here: Memory = {}
        self._held: Mapping[str, str] = {}
        self._checked: set[str] = set()
        self._refused: set[str] = set()
        self._begun: set[str] = set()
        """What this process has begun to send: half of it is nobody else's."""
        self._failure: str | None = None
        self._left = 0
        self._wake, self._cancel = threading.Event(), threading.Event()
        self._closing = False
        self._home = Home()
        self.thread: threading.Thread | None = None
        self.in_flight: str | None = None
        """The id that is being sent right now."""
        self.highest_sequence = 0
        """The highest commit number that was seen in the mirror."""

    def open(self, *, required: bool = True) -> None:
        """Take the mirror's lease and see what it holds. Waits for a dead holder as any directory does.

        Raises: DirectoryHeldError when another run writes to the mirror; StorageError. A mirror that does
            not answer raises only if it is `required`: where nothing lies locally, it alone knows how far the
            commit numbers have come. Otherwise it is tried again later.
        """
        try:
            self._require_lease()
            self._see()
        except StorageUnavailableError as error:
            if required:
                self.try_release()
                raise
            log.warning("the mirror does not answer, and gets what it is owed later: %s", error)
        except HoldfastError:
            self.try_release()
            raise

    def try_release(self) -> None:
        """Let go of the lease, or of what is left of one that was lost. What fails at that is logged only."""
        if self._lease is not None:
            self._lease.try_release()
            self._lease = None

    def start(self) -> None:
        """Begin with what was owed already; from then on every `committed` is followed up."""
        self._wake.set()
        # A daemon: a store that never answers must not keep the process.
        self.thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
        self.thread.start()

    def committed(self) -> None:
        """There is a new local checkpoint. Returns at once."""
        self._wake.set()

    def pending_ids(self, local: Sequence[CheckpointRecord]) -> frozenset[str]:
        """Which of the local checkpoints the mirror is owed, as far as is known. Asks no storage."""
        with self._lock:
            there = self._there
        pending = pending_copies(local, there, self._plan.freq, self._plan.retention)
        return frozenset(record.id for record in pending)

    def close(self, patience: Patience = no_limit) -> bool:
        """Send what is owed, for as long as `patience` allows, then let go of the mirror.

        An outage ends it: the next start sends the rest. Returns False if a call to the storage hangs: its
        thread is left behind then. In a forked child it does nothing: the copies are the parent's.
        """
        if self._home.left:
            return True
        self._closing = True
        self._wake.set()
        thread = self.thread
        if thread is None:
            self.try_release()
            return True
        while thread.is_alive():
            left = patience()
            if left is not None and left <= 0:
                break
            thread.join(_POLL_SECS if left is None else min(left, _POLL_SECS))
        self._cancel.set()
        self._wake.set()
        thread.join(CANCEL_SECS)
        left_over = self._left_over()
        if left_over:
            log.warning(
                "the mirror %s is still owed %d checkpoint%s: the next start with it sends the rest",
                self.storage.uri,
                left_over,
                "s" * (left_over != 1),
            )
        return not thread.is_alive()

    def catch_up(self) -> None:
        """One round: send what is owed, then the mirror's retention.

        Raises: what the mirror's storage did; DirectoryHeldError, LeaseLostError; Cancelled.
        """
        self._left = len(self._waiting())
        lease = self._require_lease()
        lease.check()
        self._see()
        while record := self._next():
            self._bring(record)
            self._retire()
        self._retire()
        current = [record.id for record in self._waiting()]
        reap_abandoned(self.storage, lease=lease, current=current, failed_ids=self._begun)

    def recheck_earlier_copies(self) -> None:
        """Read what earlier runs have brought, newest first, until there is something better to do.

        A store may have changed a byte meanwhile, and a run that has the local copy can still mend it. What
        this run has brought itself was read when it arrived. Raises: as `catch_up`.
        """
        while not (self._wake.is_set() or self._cancel.is_set()):
            local = {record.id for record in self._local_records()}
            done = self._checked | self._refused
            known = [r for r in by_sequence(self._there) if r.id in local and r.id not in done]
            if not known:
                return
            self._bring(known[-1])

    def _serve(self) -> None:
        try:
            while True:
                self._wake.wait(RETRY_SECS if self._failure else None)
                self._wake.clear()
                last = self._closing
                if self._cancel.is_set():
                    return
                if self._try(self.catch_up) and not last:
                    self._try(self.recheck_earlier_copies)
                if last:
                    return
        finally:
            self.try_release()

    def _try(self, work: Callable[[], None]) -> bool:
        """Whether it worked. An outage is told once, not at every try."""
        try:
            work()
        except Cancelled:
            return False
        except Exception as error:
            if isinstance(error, LeaseLostError):
                self.try_release()
            if self._failure != type(error).__name__:
                self._failure = type(error).__name__
                self._tell_failure(None, f"{error}" or self._failure)
            return False
        if self._failure is not None:
            log.info("the mirror %s works again", self.storage.uri)
            self._failure = None
        return True

    def _see(self) -> None:
        listed = list_checkpoints(self.storage, heads=self._require_lease().take_heads())
        with self._lock:
            self._there = tuple(committed(listed))
            self._held = exempt_ids(listed)
            self.highest_sequence = max(self.highest_sequence, highest_sequence(listed))
        self._checked &= {record.id for record in self._there}

    def _local_records(self) -> list[CheckpointRecord]:
        try:
            return committed(list_checkpoints(self._local, self._seen_here))
        except NotFoundError:
            return []

    def _waiting(self) -> list[CheckpointRecord]:
        """What is owed by now, newest first; saves go on meanwhile."""
        waiting = pending_copies(self._local_records(), self._there, self._plan.freq, self._plan.retention)
        return [record for record in waiting if record.id not in self._refused]

    def _left_over(self) -> int:
        """How many are owed at the end, those included that were committed while the last copy went out."""
        try:
            return len(self._waiting())
        except HoldfastError:
            return self._left

    def _next(self) -> CheckpointRecord | None:
        waiting = self._waiting()
        self._left = len(waiting)
        return waiting[0] if waiting else None

    def _bring(self, record: CheckpointRecord) -> None:
        """Have one checkpoint in the mirror, whole."""
        self.in_flight = record.id
        self._begun.add(record.id)
        seen: str | None = None
        try:
            seen = marks.seen(self._local, record.id)
            copied = copy_checkpoint(
                self._local,
                record.id,
                self.storage,
                lease=self._require_lease(),
                check=True,
                cancel=self._cancel,
            )
        except (AlreadyExistsError, DamagedError, NotFoundError) as error:
            self._pass_over(record, error, seen)
            return
        finally:
            self.in_flight = None
        self._checked.add(record.id)
        is_new = record.id not in {known.id for known in self._there}
        if is_new:
            with self._lock:
                self._there = (*self._there, record)
            self._left -= 1
        if is_new or copied.sent_bytes:
            self._tell_copied(record, copied)

    def _pass_over(self, record: CheckpointRecord, error: HoldfastError, seen: str | None) -> None:
        """What cannot be sent must not hold up the others. An outage is raised again."""
        if not self._local.exists(f"{record.id}/{MANIFEST}"):
            log.info("%s was removed before the mirror had it", record.path)
            return
        if isinstance(error, NotFoundError):
            raise error
        self._refused.add(record.id)
        if isinstance(error, DamagedError):
            marks.mark_damaged(self._local, record.id, str(error), seen=seen)
        self._tell_failure(record, f"{record.path} was not copied: {error}")

    def _tell_copied(self, record: CheckpointRecord, copied: Copied) -> None:
        self._on_event(
            {
                "event": "mirror_copied",
                "step": record.step,
                "id": record.id,
                "path": copied.path,
                "bytes": copied.bytes,
                "sent_bytes": copied.sent_bytes,
                "secs": copied.secs,
                "owed": self._left,
            }
        )

    def _tell_failure(self, record: CheckpointRecord | None, cause: str) -> None:
        log.error("mirror: %s", cause)
        event = {"event": "mirror_failed", "path": self.storage.uri, "cause": cause, "owed": self._left}
        self._on_event(event | ({"step": record.step, "id": record.id} if record else {}))

    def _retire(self) -> None:
        """The run's retention, on the mirror. What is half sent is left to the end of a round."""
        # A hold that is newer than the last look is seen all the same: `reap` asks before each removal.
        lease = self._require_lease()
        brought = {record.id for record in self._there} - self._begun
        arriving = lease.arrivals.arriving(self.storage, brought, lease_name(lease.epoch))
        there = [record for record in self._there if record.id not in arriving]
        decisions = decide_retention(there, self._plan.retention, self._held)
        removed = set(reap(self.storage, decisions, lease=lease).removed)
        self._begun -= removed
        with self._lock:
            self._there = tuple(record for record in self._there if record.id not in removed)

    def _require_lease(self) -> Lease:
        if self._lease is None:
            self.storage.make_dir()
            self._lease = Lease.acquire(self.storage, run_id=self._plan.run_id, sleep=self._pause)
            self._lease.start_heartbeat()
        return self._lease

    def _pause(self, secs: float) -> None:
        """Sleep, unless the run is over."""
        if self._cancel.wait(secs):
            raise Cancelled
