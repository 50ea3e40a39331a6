"""The only module that deletes checkpoints.

The manifest goes first and durably, then the data: whenever it is interrupted, what is left is an attempt
without a manifest, never a listed checkpoint without its data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from engine.catalog.lease import STALE_SECS, Lease
from engine.catalog.retention import Decision
from engine.errors import StorageError
from engine.format.names import DEAD_PREFIX, HELD, MANIFEST, TMP_SUFFIX, parse_attempt_name
from engine.storage.base import Storage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reaped:
    """What was removed (ids), and what could not be removed (id, cause). The next round tries those again."""

    removed: tuple[str, ...]
    failed: tuple[tuple[str, str], ...] = ()


def reap(storage: Storage, decisions: Iterable[Decision]) -> Reaped:
    """Remove every checkpoint that is not to be kept, unless it was put on hold since the decision.

    One that fails does not stop the others: it is logged and returned, not raised.
    """
    return _remove_each(storage, [decision.record.id for decision in decisions if not decision.keep], _retire)


def reap_abandoned(storage: Storage, *, lease: Lease, current: Collection[str] = ()) -> Reaped:
    """Remove attempts that nobody will ever commit. Only the lease's holder may; LeaseLostError otherwise.

    `current`: ids that this run may be writing right now. Every other attempt without a manifest is an
    earlier run's, or a failed save of this one. Where the storage cannot rename, an earlier holder that only
    slept could still be between its last look at the lease and its commit: its attempts stay until this
    lease has stood for as long as it takes to call a holder dead. Uploads that have no end go with their
    attempts.
    """
    lease.check()
    settled = storage.is_local or lease.held_secs >= STALE_SECS
    broken_off = {path.partition("/")[0] for path in storage.unfinished_uploads()}
    tree = storage.list_heads().tree
    for name in broken_off:
        tree.setdefault(name, {})  # nothing but an upload without an end, which no listing shows
    abandoned, doubled = [], []
    for name, files in tree.items():
        dead = name.startswith(DEAD_PREFIX)
        if parse_attempt_name(name.removeprefix(DEAD_PREFIX)) is None:
            continue
        if MANIFEST in files:
            _remove_temporaries(storage, name, files)
            if name in broken_off and name not in current:
                doubled.append(name)  # the answer to the start of an upload was lost, and another one begun
            continue
        if dead or (name not in current and settled):
            abandoned.append(name)
    for name in doubled:
        storage.abort_uploads(name)
    return _remove_each(storage, abandoned, _clear)


def _retire(storage: Storage, name: str) -> bool:
    if storage.exists(f"{name}/{HELD}"):
        log.info("%s/%s was put on hold: it stays", storage.uri, name)
        return False
    storage.delete_file(f"{name}/{MANIFEST}")
    storage.sync_dir(name)
    storage.delete_tree(name)
    return True


def _remove_temporaries(storage: Storage, name: str, files: Iterable[str]) -> None:
    """Remove what publishing left beside the manifest: it has two names until the temporary one is gone."""
    for file in files:
        if file.startswith(MANIFEST) and file.endswith(TMP_SUFFIX):
            try:
                storage.delete_file(f"{name}/{file}")
            except StorageError as error:
                log.warning("could not remove %s/%s/%s: %s", storage.uri, name, file, error)


def _clear(storage: Storage, name: str) -> bool:
    if storage.exists(f"{name}/{MANIFEST}"):  # committed since the listing
        return False
    storage.delete_tree(name)
    return True


def _remove_each(storage: Storage, names: list[str], remove: Callable[[Storage, str], bool]) -> Reaped:
    removed, failed = [], []
    for name in names:
        try:
            if remove(storage, name):
                removed.append(name)
        except FileNotFoundError:
            removed.append(name)  # somebody else was faster
        except StorageError as error:
            log.warning("could not remove %s/%s, the next round tries again: %s", storage.uri, name, error)
            failed.append((name, str(error)))
    if removed:
        storage.sync_dir("")
    return Reaped(tuple(removed), tuple(failed))


def delete_attempt(storage: Storage, name: str) -> bool:
    """Remove one failed attempt of this run, once no rank can still be writing into it.

    Returns whether it was removed: a directory that has a manifest after all stays, it is a checkpoint.
    """
    return _clear(storage, name)
