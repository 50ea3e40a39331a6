"""Copies committed checkpoints to the mirror in the background, without ever delaying a save.

A thread waits for commits, copies pending checkpoints, and applies the run's retention to the mirror. A fault
of the mirror costs the training only an event and a log line per outage; it is retried after RETRY_SECS or at
the next commit. Checkpoints still pending at the end are copied by the next run, which resumes interrupted
copies.
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
"""After a failure, how long to wait for the next commit before retrying without one."""

CANCEL_SECS = 3.0
"""How long `close` waits for a cancelled copy to stop."""

THREAD_NAME = "holdfast-mirror"
_POLL_SECS = 0.2

Patience = Callable[[], float | None]
"""Seconds left for the mirror at the end of a run; None: no limit."""


def no_limit() -> float | None:
    """Wait for the mirror until it is up to date, or fails."""
    return None


def at_most(secs: float) -> Patience:
    """Wait for the mirror for at most `secs`, from now on."""
    end = time.monotonic() + secs
    return lambda: max(0.0, end - time.monotonic())


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """How a run uses its mirror: `freq` (see `is_mirrored`), retention (None keeps all), and the run's id."""

    freq: int
    retention: Retention | None
    run_id: str


def open_mirror(
    mirror: str | os.PathLike[str] | None, local: Storage, options: Mapping[str, str] | None
) -> Storage | None:
    """The storage of the mirror, if there is one. ConfigError if it is the local directory itself."""
    if mirror is None:
        return None
    storage = open_storage(mirror, options)
    if storage.uri == local.uri:
        raise ConfigError(f"{storage.uri} is both the directory and its mirror: give two directories")
    return storage


def copies_hang() -> bool:
    """Whether a closed mirror's thread still hangs in a call to its storage."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


class Mirror:
    """The mirror of one run's directory, on rank 0. Any thread may read `pending_ids` and `in_flight`.

    Args:
        local: the run's own directory.
        storage: the mirror's.
        on_event: receives "mirror_copied" and "mirror_failed" events, in the mirror's thread.
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
        self._mirrored: tuple[CheckpointRecord, ...] = ()
        self._memory: Memory = {}
        self._exempt: Mapping[str, str] = {}
        self._verified: set[str] = set()
        self._refused: set[str] = set()
        self._sent: set[str] = set()
        """Ids that this process has begun to send: a half-sent one is not another process's copy."""
        self._failure: str | None = None
        self._pending_count = 0
        self._wake, self._cancel = threading.Event(), threading.Event()
        self._closing = False
        self._home = Home()
        self.thread: threading.Thread | None = None
        self.in_flight: str | None = None
        """The id of the checkpoint being sent."""
        self.highest_sequence = 0
        """The highest commit number seen in the mirror."""

    def open(self, *, required: bool = True) -> None:
        """Acquire the mirror's lease and list it. Waits for a dead holder, as for any directory.

        Raises: DirectoryHeldError if another run writes to the mirror; StorageError. A mirror that does not
            answer raises only if it is `required`: without local checkpoints, only the mirror knows the
            highest commit number. Otherwise it is retried later.
        """
        try:
            self._require_lease()
            self._refresh()
        except StorageUnavailableError as error:
            if required:
                self.try_release()
                raise
            log.warning("the mirror does not answer; pending checkpoints are copied later: %s", error)
        except HoldfastError:
            self.try_release()
            raise

    def try_release(self) -> None:
        """Release the lease, if any, even one that was lost. Failures are only logged."""
        if self._lease is not None:
            self._lease.try_release()
            self._lease = None

    def start(self) -> None:
        """Start the thread: it copies what is pending now, and again after every `committed`."""
        self._wake.set()
        # A daemon: a store that never answers must not keep the process.
        self.thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
        self.thread.start()

    def committed(self) -> None:
        """Tell the mirror of a new local checkpoint. Returns at once."""
        self._wake.set()

    def pending_ids(self, local: Sequence[CheckpointRecord]) -> frozenset[str]:
        """Which of the local checkpoints are pending, as far as is known. Calls no storage."""
        with self._lock:
            mirrored = self._mirrored
        pending = pending_copies(local, mirrored, self._plan.freq, self._plan.retention)
        return frozenset(record.id for record in pending)

    def close(self, patience: Patience = no_limit) -> bool:
        """Copy pending checkpoints for as long as `patience` allows, then release the mirror.

        An outage ends it: the next run copies the rest. Returns False if a call to the storage hangs: then
        its thread is abandoned. Does nothing in a forked child: the copies are the parent's.
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
        count = self._count_pending()
        if count:
            log.warning(
                "%d checkpoint%s not yet copied to the mirror %s: the next run with it copies the rest",
                count,
                " is" if count == 1 else "s are",
                self.storage.uri,
            )
        return not thread.is_alive()

    def catch_up(self) -> None:
        """One round: copy pending checkpoints and apply the mirror's retention.

        Raises: StorageError; DirectoryHeldError; LeaseLostError; Cancelled.
        """
        self._pending_count = len(self._pending())
        lease = self._require_lease()
        lease.check()
        self._refresh()
        while record := self._next_pending():
            self._copy(record)
            self._apply_retention()
        self._apply_retention()
        current = [record.id for record in self._pending()]
        reap_abandoned(self.storage, lease=lease, current=current, failed_ids=self._sent)

    def recheck_earlier_copies(self) -> None:
        """Verify the copies of earlier runs, newest first, until there is a new checkpoint to copy.

        A store may have changed a byte meanwhile, and a run that has the local copy can repair it. This run's
        own copies were verified when they arrived. Raises: as `catch_up`.
        """
        while not (self._wake.is_set() or self._cancel.is_set()):
            local = {record.id for record in self._local_records()}
            done = self._verified | self._refused
            unverified = [r for r in by_sequence(self._mirrored) if r.id in local and r.id not in done]
            if not unverified:
                return
            self._copy(unverified[-1])

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
        """Whether it succeeded. An outage is reported once, not at every retry."""
        try:
            work()
        except Cancelled:
            return False
        except Exception as error:
            if isinstance(error, LeaseLostError):
                self.try_release()
            if self._failure != type(error).__name__:
                self._failure = type(error).__name__
                self._report_failure(None, f"{error}" or self._failure)
            return False
        if self._failure is not None:
            log.info("the mirror %s works again", self.storage.uri)
            self._failure = None
        return True

    def _refresh(self) -> None:
        listed = list_checkpoints(self.storage, heads=self._require_lease().take_heads())
        with self._lock:
            self._mirrored = tuple(committed(listed))
            self._exempt = exempt_ids(listed)
            self.highest_sequence = max(self.highest_sequence, highest_sequence(listed))
        self._verified &= {record.id for record in self._mirrored}

    def _local_records(self) -> list[CheckpointRecord]:
        try:
            return committed(list_checkpoints(self._local, self._memory))
        except NotFoundError:
            return []

    def _pending(self) -> list[CheckpointRecord]:
        """The pending checkpoints, newest first; saves continue meanwhile."""
        pending = pending_copies(self._local_records(), self._mirrored, self._plan.freq, self._plan.retention)
        return [record for record in pending if record.id not in self._refused]

    def _count_pending(self) -> int:
        """How many are pending at the end, including those committed during the last copy."""
        try:
            return len(self._pending())
        except HoldfastError:
            return self._pending_count

    def _next_pending(self) -> CheckpointRecord | None:
        pending = self._pending()
        self._pending_count = len(pending)
        return pending[0] if pending else None

    def _copy(self, record: CheckpointRecord) -> None:
        """Copy one checkpoint, or verify and repair its copy."""
        self.in_flight = record.id
        self._sent.add(record.id)
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
            self._skip(record, error, seen)
            return
        finally:
            self.in_flight = None
        self._verified.add(record.id)
        is_new = record.id not in {copy.id for copy in self._mirrored}
        if is_new:
            with self._lock:
                self._mirrored = (*self._mirrored, record)
            self._pending_count -= 1
        if is_new or copied.sent_bytes:
            self._report_copied(record, copied)

    def _skip(self, record: CheckpointRecord, error: HoldfastError, seen: str | None) -> None:
        """A checkpoint that cannot be copied must not hold up the others. An outage is raised again."""
        if not self._local.exists(f"{record.id}/{MANIFEST}"):
            log.info("%s was deleted before it was copied to the mirror", record.path)
            return
        if isinstance(error, NotFoundError):
            raise error
        self._refused.add(record.id)
        if isinstance(error, DamagedError):
            marks.mark_damaged(self._local, record.id, str(error), seen=seen)
        self._report_failure(record, f"{record.path} was not copied: {error}")

    def _report_copied(self, record: CheckpointRecord, copied: Copied) -> None:
        self._on_event(
            {
                "event": "mirror_copied",
                "step": record.step,
                "id": record.id,
                "path": copied.path,
                "bytes": copied.bytes,
                "sent_bytes": copied.sent_bytes,
                "secs": copied.secs,
                "owed": self._pending_count,
            }
        )

    def _report_failure(self, record: CheckpointRecord | None, cause: str) -> None:
        log.error("mirror: %s", cause)
        owed = self._pending_count
        event = {"event": "mirror_failed", "path": self.storage.uri, "cause": cause, "owed": owed}
        self._on_event(event | ({"step": record.step, "id": record.id} if record else {}))

    def _apply_retention(self) -> None:
        """Apply the run's retention to the mirror. Half-sent attempts are deleted at the end of a round."""
        # A hold set after the last listing still counts: `reap` checks before each deletion.
        lease = self._require_lease()
        not_ours = {record.id for record in self._mirrored} - self._sent
        arriving = lease.arrivals.arriving(self.storage, not_ours, lease_name(lease.epoch))
        settled = [record for record in self._mirrored if record.id not in arriving]
        decisions = decide_retention(settled, self._plan.retention, self._exempt)
        deleted = set(reap(self.storage, decisions, lease=lease).deleted)
        self._sent -= deleted
        with self._lock:
            self._mirrored = tuple(record for record in self._mirrored if record.id not in deleted)

    def _require_lease(self) -> Lease:
        if self._lease is None:
            self.storage.make_dir()
            self._lease = Lease.acquire(self.storage, run_id=self._plan.run_id, sleep=self._sleep)
            self._lease.start_heartbeat()
        return self._lease

    def _sleep(self, secs: float) -> None:
        """Sleep. Cancelled if the run ends meanwhile."""
        if self._cancel.wait(secs):
            raise Cancelled
