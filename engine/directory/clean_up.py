"""Retention of a directory that may have a mirror: what is still owed to the mirror stays."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Protocol

from engine.directory.listing import Memory, committed, exempt_ids, list_checkpoints
from engine.directory.logged_once import first_time
from engine.directory.pending import keep_pending, pending_to_delete
from engine.directory.reaper import reap, reap_abandoned
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention, decide_retention, no_best_warning
from engine.errors import NotFoundError
from engine.format.names import lease_name
from engine.lease.lease import Lease
from engine.storage.base import Storage

log = logging.getLogger(__name__)


class MirrorStatus(Protocol):
    """The part of a mirror that retention asks; it answers from memory, whatever its storage does."""

    @property
    def in_flight(self) -> str | None: ...
    def pending_ids(self, local: Sequence[CheckpointRecord]) -> frozenset[str]: ...


def delete_expired(
    storage: Storage,
    lease: Lease,
    retention: Retention | None,
    mirror: MirrorStatus | None = None,
    *,
    disk_full: bool = False,
    memory: Memory | None = None,
    failed_ids: Collection[str] = (),
) -> bool:
    """Delete what the policy does not keep, and abandoned attempts; whether anything was deleted.

    `disk_full`: when there is nothing else to remove, one checkpoint goes that the mirror is owed.
    `failed_ids`: ids that this run failed to commit.
    `memory`: of earlier listings of the directory, so that this reads the manifests that are new.
    Raises: LeaseLostError; StorageError when the directory cannot be listed.
    """
    lease.check()
    removed: tuple[str, ...] = ()
    last_resort = None
    if retention is not None:
        try:
            listed = list_checkpoints(storage, memory)
        except NotFoundError:
            listed = []
        local = committed(listed)
        # A hold that is newer than this listing is seen all the same: `reap` asks before each removal.
        brought = {record.id for record in local} - set(failed_ids)
        arriving = lease.arrivals.arriving(storage, brought, lease_name(lease.epoch))
        policy = decide_retention(
            [r for r in local if r.id not in arriving], retention, exempt=exempt_ids(listed)
        )
        owed = mirror.pending_ids(local) if mirror is not None else frozenset()
        decisions = keep_pending(policy, owed)
        if any(not decision.keep for decision in decisions):
            warn_no_best(storage, local, retention)
        removed = reap(storage, decisions, lease=lease).removed
        if disk_full and mirror is not None:
            last_resort = pending_to_delete(policy, owed, mirror.in_flight)
    # With a listing of its own: what was removed by halves just now is cleared away in the same round.
    removed += reap_abandoned(storage, lease=lease, failed_ids=failed_ids).removed
    if not removed and last_resort is not None:
        path, why = last_resort.record.path, last_resort.why
        log.warning("deleting %s before the mirror has a copy of it: %s", path, why)
        removed = reap(storage, [last_resort], lease=lease).removed
    return bool(removed)


def warn_no_best(storage: Storage, records: Sequence[CheckpointRecord], retention: Retention) -> None:
    """Say once of a directory that its best checkpoint cannot be told, before the first one is deleted."""
    sentence = no_best_warning(records, retention)
    if sentence and first_time("no_best_warning", storage.uri, retention.rule.selector):
        log.warning("%s: %s", storage.uri, sentence)
