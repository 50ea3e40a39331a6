"""The only module that deletes checkpoints. It deletes only files that Holdfast wrote.

First the manifest is deleted, durably, then the files whose names belong to the format, then the directory if
it is empty. Whenever that is interrupted, an attempt without a manifest remains, never a listed checkpoint
without its data. Holdfast's files are known by their names: without the manifest nothing else identifies
them. A tombstone, written first and deleted last, tells such a remainder from a copy that is still arriving.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from engine.directory.logged_once import first_time
from engine.directory.retention import Decision
from engine.errors import NotOursError, StorageError, StorageFullError
from engine.format.names import (
    DEAD_PREFIX,
    MANIFEST,
    ON_HOLD,
    TMP_SUFFIX,
    TOMBSTONE,
    is_attempt_of,
    is_checkpoint_file,
    lease_name,
    parse_attempt_name,
)
from engine.lease.lease import STALE_SECS, Lease
from engine.storage.base import Heads, Storage

log = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Reaped:
    """The result of a round of deletions.

    deleted: ids whose files were deleted; a directory that contains other files stays.
    failed: (id, cause) of those that could not be deleted; the next round retries.
    """

    deleted: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


def reap(storage: Storage, decisions: Iterable[Decision], *, lease: Lease | None = None) -> Reaped:
    """Delete every expired checkpoint, unless it was put on hold since the decision.

    A failure does not stop the others: it is logged and returned, not raised. `lease`: remembers checkpoints
    that are only half deleted, so that `reap_abandoned` deletes the rest.
    """
    expired = [decision.record.id for decision in decisions if not decision.keep]
    if lease is not None:
        lease.arrivals.removing.update(expired)
    return _delete_each(storage, expired, _delete_checkpoint)


def reap_abandoned(
    storage: Storage,
    *,
    lease: Lease,
    current: Collection[str] = (),
    failed_ids: Collection[str] = (),
    heads: Heads | None = None,
) -> Reaped:
    """Delete attempts that will never be committed. Only the lease holder may; LeaseLostError otherwise.

    They are: attempts that a new holder has fenced (dead-*); half-deleted checkpoints; attempts in
    `failed_ids`; on a storage that cannot rename, those of earlier holders that died; and any other attempt
    without a manifest that has not changed for an hour (see `arrivals`).
    Where the storage cannot rename, an earlier holder that was only suspended could still be between its last
    check of the lease and its commit: nothing is deleted there until this lease is as old as STALE_SECS.
    Unfinished uploads are aborted with their attempts.

    Args:
        current: ids that this run may be writing right now.
        failed_ids: attempts that this run failed to commit, or had begun to delete.
        heads: a listing, if the caller has one that is recent enough.
    """
    lease.check()
    settled = storage.is_local or lease.held_secs >= STALE_SECS
    uploads = _uploads(storage)
    heads = heads or storage.list_heads()
    tree = dict(heads.tree)
    for name in uploads:
        tree.setdefault(name, {})  # only unfinished uploads, which no listing shows
    lease.arrivals.keep_only(tree)
    failed_ids = lease.arrivals.removing.union(failed_ids)
    abandoned = []
    for name, files in tree.items():
        if parse_attempt_name(name.removeprefix(DEAD_PREFIX)) is None:
            continue
        paths = uploads.get(name, [])
        if MANIFEST in files:
            _delete_temporaries(storage, name, files)
            # The answer to the start of an upload was lost, and another upload was begun.
            if paths and name not in current and _is_abandoned(storage, name, lease, failed_ids, paths):
                storage.abort_uploads(name)
            continue
        if heads.whole and files and not any(map(is_checkpoint_file, files)):
            continue  # only files that Holdfast did not write
        dead = name.startswith(DEAD_PREFIX) or (TOMBSTONE in files and name not in current)
        ours = settled and name not in current
        if dead or (ours and _is_abandoned(storage, name, lease, failed_ids, paths)):
            abandoned.append(name)
    return _delete_each(storage, abandoned, _delete_uncommitted)


def delete_attempt(storage: Storage, name: str) -> bool:
    """Delete one failed attempt of this run, once no rank can still be writing into it.

    Returns whether it was deleted: one that turns out to have a manifest is a checkpoint, and stays.
    """
    return _delete_uncommitted(storage, name)


def _uploads(storage: Storage) -> dict[str, list[str]]:
    """By directory, the paths of unfinished uploads into it."""
    found: dict[str, list[str]] = {}
    for path in sorted(storage.unfinished_uploads()):
        found.setdefault(path.partition("/")[0], []).append(path)
    return found


def _is_abandoned(
    storage: Storage, name: str, lease: Lease, failed_ids: Collection[str], uploads: Collection[str]
) -> bool:
    if name in failed_ids:
        return True
    # Where the storage can rename, a new holder has fenced its predecessors' attempts.
    if not storage.is_local and is_attempt_of(name, lease.predecessors):
        return True
    if lease.arrivals.is_over(storage, name, lease_name(lease.epoch), uploads):
        return True
    if first_time("arriving", storage.uri, name):
        log.info(
            "%s has no manifest, and no known run started it. It may be a copy that is still "
            "arriving: it is kept until nothing in it has changed for an hour",
            storage.describe(name),
        )
    return False


def _delete_checkpoint(storage: Storage, name: str) -> bool:
    if storage.exists(f"{name}/{ON_HOLD}"):
        log.info("%s/%s was put on hold: it is kept", storage.uri, name)
        return False
    reason = storage.why_not_ours(name)
    if reason:
        raise NotOursError(f"{storage.describe(name)} {reason}")
    # A full disk must not stop a deletion. Without a tombstone, an interrupted one is resumed after an hour.
    with contextlib.suppress(StorageFullError):
        storage.publish(f"{name}/{TOMBSTONE}", b"", exclusive=False)
    storage.delete_file(f"{name}/{MANIFEST}")
    storage.sync_dir(name)
    _delete_files(storage, name)
    return True


def _delete_uncommitted(storage: Storage, name: str) -> bool:
    if storage.exists(f"{name}/{MANIFEST}"):  # committed since the listing
        return False
    return _delete_files(storage, name)


def _delete_files(storage: Storage, name: str) -> bool:
    """Delete our files in a directory, and the directory if it is then empty. Whether there were any."""
    cleared = storage.clear_dir(name, is_checkpoint_file)
    if cleared.left:
        names = [name if name.isprintable() else repr(name) for name in cleared.left[:_SHOWN]]
        shown = ", ".join(names) + ", ..." * (len(cleared.left) > _SHOWN)
        where = storage.describe(name)
        _warn_once(storage, name, f"{where} is kept: it contains files that Holdfast did not write: {shown}")
    return cleared.removed > 0 or not cleared.left


def _warn_once(storage: Storage, name: str, sentence: str) -> None:
    if first_time("left", storage.uri, name, sentence):
        log.warning("%s", sentence)


def _delete_temporaries(storage: Storage, name: str, files: Mapping[str, int]) -> None:
    """Delete the temporary name of the manifest, which an interrupted publish leaves beside it."""
    for file in files:
        if file.startswith(MANIFEST) and file.endswith(TMP_SUFFIX) and is_checkpoint_file(file):
            try:
                storage.delete_file(f"{name}/{file}")
            except NotOursError:
                return
            except StorageError as error:
                log.warning("could not delete %s/%s/%s: %s", storage.uri, name, file, error)


def _delete_each(storage: Storage, names: list[str], delete: Callable[[Storage, str], bool]) -> Reaped:
    deleted, failed = [], []
    for name in names:
        try:
            if delete(storage, name):
                deleted.append(name)
        except FileNotFoundError:
            deleted.append(name)  # another process was faster
        except NotOursError as error:
            _warn_once(storage, name, f"clean-up leaves it alone: {error}")
        except StorageError as error:
            log.warning("could not delete %s/%s; the next round retries: %s", storage.uri, name, error)
            failed.append((name, str(error)))
    if deleted:
        storage.sync_dir("")
    return Reaped(tuple(deleted), tuple(failed))
