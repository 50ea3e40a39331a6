"""`prune`: apply a retention policy by hand, and say why each checkpoint stays or goes."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

from engine.checkpoints.target import open_directory, run_policy
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


def run(arguments: argparse.Namespace) -> int:
    """Decide, say so, and delete the rest. DirectoryHeldError while a live run writes there."""
    storage = open_directory(arguments)
    listed = list_checkpoints(storage)
    if not listed:  # and no lease is left in a place where nothing was
        print(f"no checkpoints in {storage.uri}")
        return 0
    if arguments.dry_run:
        _say(_decide(storage, listed, arguments), "would go")
        for item in _partial(listed):
            _say_partial(item, "would go" if _looks_abandoned(storage, item.id) else "stays")
        return 0
    with Lease.acquire(storage, run_id=_RUN_ID) as lease:
        lease.start_heartbeat()
        listed = list_checkpoints(storage)  # again: now it stays as it is
        decisions = _decide(storage, listed, arguments)
        _say(decisions, "goes")
        removed = [reap(storage, decisions, lease=lease), reap_abandoned(storage, lease=lease)]
        for item in _partial(listed):
            _say_partial(item, "goes" if item.id in removed[-1].removed else "stays")
    _summarise(removed, listed)
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
    """For the words of a dry run only, so by this machine's clock: it may not write, to see the storage's."""
    if name.startswith(DEAD_PREFIX):
        return True
    try:
        changed = storage.last_change(name)
    except NotFoundError:
        return True
    return changed is not None and time.time() - changed >= arrivals.QUIET_SECS


def _say_partial(item: Listed, word: str) -> None:
    why = item.reason if word != "stays" else f"{item.reason}, or a copy that is still arriving"
    print(f"{word.ljust(8)}  {item.id}  {readable_bytes(item.bytes)}  {why}")


def _say(decisions: list[Decision], goes: str) -> None:
    for decision in decisions:
        record = decision.record
        word = "stays" if decision.keep else goes
        print(f"{word.ljust(8)}  {record.id}  {readable_bytes(record.bytes)}  {decision.why}")


def _summarise(removed: list[Reaped], listed: list[Listed]) -> None:
    sizes = {item.id: item.bytes for item in listed}
    gone = [id for reaped in removed for id in reaped.removed]
    print(f"removed {len(gone)}, {readable_bytes(sum(sizes.get(id, 0) for id in gone))}")
    failed = [cause for reaped in removed for _, cause in reaped.failed]
    if failed:
        raise StorageError(f"{len(failed)} could not be removed; the first: {failed[0]}")
