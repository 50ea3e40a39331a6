"""`prune`: apply a retention policy by hand. `hold` and `release`: exempt a checkpoint from retention."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from engine.checkpoints.target import open_checkpoint, open_directory, run_policy
from engine.directory import marks
from engine.directory.listing import Listed, committed, exempt_ids, list_checkpoints
from engine.directory.reaper import Reaped, reap, reap_abandoned
from engine.directory.retention import Decision, decide_retention, metrics_in_words, no_best_warning
from engine.errors import NotFoundError, StorageError
from engine.format.names import DEAD_PREFIX
from engine.lease import arrivals
from engine.lease.lease import Lease
from engine.storage.base import Storage
from engine.text import readable_bytes

_RUN_ID = "prune"
_KEPT, _EXPIRED, _DELETED, _WOULD_DELETE = "kept", "expired", "deleted", "would delete"


def run_prune(arguments: argparse.Namespace) -> int:
    """Print every decision, and delete the expired. DirectoryHeldError while a live run writes there."""
    storage = open_directory(arguments)
    listed = list_checkpoints(storage)
    if not listed:  # before a lease is created in an empty place
        print(f"no checkpoints in {storage.uri}")
        return 0
    if arguments.dry_run:
        _print_decisions(_decide(storage, listed, arguments), _WOULD_DELETE)
        for item in _partial(listed):
            _print_partial(item, _WOULD_DELETE if _looks_abandoned(storage, item.id) else _KEPT)
        return 0
    with Lease.acquire(storage, run_id=_RUN_ID) as lease:
        lease.start_heartbeat()
        listed = list_checkpoints(storage)  # again: under the lease no other run changes it
        decisions = _decide(storage, listed, arguments)
        _print_decisions(decisions, _EXPIRED)  # before the deletions, which may fail or find a new hold
        reaped = [reap(storage, decisions, lease=lease), reap_abandoned(storage, lease=lease)]
        for item in _partial(listed):
            _print_partial(item, _DELETED if item.id in reaped[-1].deleted else _KEPT)
    _summarise(reaped, listed)
    return 0


def run_hold(arguments: argparse.Namespace) -> int:
    """Put one checkpoint on hold, or release it."""
    storage, name = open_checkpoint(arguments)
    if arguments.command == "hold":
        marks.hold(storage, name)
        print(f"{name} is on hold: retention keeps it until `release`")
    else:
        marks.release(storage, name)
        print(f"{name} is released: retention may delete it")
    return 0


def _decide(storage: Storage, listed: list[Listed], arguments: argparse.Namespace) -> list[Decision]:
    records = committed(listed)
    policy = run_policy(storage, records)
    rolling = policy.rolling if arguments.rolling is None else arguments.rolling
    metric = policy.metric if arguments.best_metric is None else arguments.best_metric
    mode = policy.mode if arguments.best_mode is None else arguments.best_mode
    policy = replace(
        policy, rolling=rolling, best=arguments.best, epochs=not arguments.no_epochs, metric=metric, mode=mode
    )
    if no_best_warning(records, policy):
        there = metrics_in_words(records)
        print(f"note: no checkpoint has a finite {policy.metric!r} ({there}): none is kept as best")
    return decide_retention(records, policy, exempt=exempt_ids(listed))


def _partial(listed: list[Listed]) -> list[Listed]:
    return [item for item in listed if item.status == "partial"]


def _looks_abandoned(storage: Storage, name: str) -> bool:
    """For a dry run only: by this machine's clock, since reading the storage's clock needs a write."""
    if name.startswith(DEAD_PREFIX):
        return True
    try:
        changed = storage.last_change(name)
    except NotFoundError:
        return True
    return changed is not None and time.time() - changed >= arrivals.QUIET_SECS


def _print_partial(item: Listed, word: str) -> None:
    why = item.reason if word != _KEPT else f"{item.reason}, or a copy that is still arriving"
    _print(word, item.id, item.bytes, why)


def _print_decisions(decisions: list[Decision], if_expired: str) -> None:
    for decision in decisions:
        word = _KEPT if decision.keep else if_expired
        _print(word, decision.record.id, decision.record.bytes, decision.why)


def _print(word: str, id: str, bytes: int, why: str) -> None:
    print(f"{word.ljust(len(_WOULD_DELETE))}  {id}  {readable_bytes(bytes)}  {why}")


def _summarise(rounds: list[Reaped], listed: list[Listed]) -> None:
    sizes = {item.id: item.bytes for item in listed}
    deleted = [id for reaped in rounds for id in reaped.deleted]
    print(f"deleted {len(deleted)}, {readable_bytes(sum(sizes.get(id, 0) for id in deleted))}")
    failed = [cause for reaped in rounds for _, cause in reaped.failed]
    if failed:
        raise StorageError(f"{len(failed)} could not be deleted; the first: {failed[0]}")
