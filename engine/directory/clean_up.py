"""Retention of a run's directory: expired checkpoints are deleted, but not before they are mirrored."""

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
    """What retention needs to know of a mirror. It answers from memory, never from its storage."""

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
    """Delete expired checkpoints and abandoned attempts. Returns whether anything was deleted.

    Args:
        disk_full: if there is nothing else to delete, delete one checkpoint that is still pending.
        failed_ids: attempts that this run failed to commit.
        memory: what earlier listings of the directory read, so that only new manifests are read.
    Raises: LeaseLostError; StorageError if the directory cannot be listed.
    """
    lease.check()
    deleted: tuple[str, ...] = ()
    last_resort = None
    if retention is not None:
        try:
            listed = list_checkpoints(storage, memory)
        except NotFoundError:
            listed = []
        local = committed(listed)
        # A hold set after this listing still counts: `reap` checks before each deletion.
        candidates = {record.id for record in local} - set(failed_ids)
        arriving = lease.arrivals.arriving(storage, candidates, lease_name(lease.epoch))
        settled = [record for record in local if record.id not in arriving]
        by_policy = decide_retention(settled, retention, exempt=exempt_ids(listed))
        pending_ids = mirror.pending_ids(local) if mirror is not None else frozenset()
        decisions = keep_pending(by_policy, pending_ids)
        if any(not decision.keep for decision in decisions):
            warn_no_best(storage, local, retention)
        deleted = reap(storage, decisions, lease=lease).deleted
        if disk_full and mirror is not None:
            last_resort = pending_to_delete(by_policy, pending_ids, mirror.in_flight)
    # It lists again, so that a checkpoint half deleted just now is deleted in the same round.
    deleted += reap_abandoned(storage, lease=lease, failed_ids=failed_ids).deleted
    if not deleted and last_resort is not None:
        path, why = last_resort.record.path, last_resort.why
        log.warning("deleting %s before it was copied to the mirror: %s", path, why)
        deleted = reap(storage, [last_resort], lease=lease).deleted
    return bool(deleted)


def warn_no_best(storage: Storage, records: Sequence[CheckpointRecord], retention: Retention) -> None:
    """Warn once per directory that no checkpoint counts as best, before the first one is deleted."""
    sentence = no_best_warning(records, retention)
    if sentence and first_time("no_best_warning", storage.uri, retention.rule.selector):
        log.warning("%s: %s", storage.uri, sentence)
