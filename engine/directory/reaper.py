"""The only module that deletes checkpoints, and of them only what Holdfast wrote.

The manifest goes first and durably, then the files whose names the format gives, then the directory if it is
empty: whenever that is interrupted, what is left is an attempt without a manifest, never a listed checkpoint
without its data. The names tell what is Holdfast's: once the manifest is gone, nothing else could. A
tombstone, written before and deleted last, tells such a remainder from a copy that is still arriving.
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
    HELD,
    MANIFEST,
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
    """What a round of deletions did.

    removed: ids whose files are gone; the directory may stay, with what somebody else put there.
    failed: (id, cause) of those that could not be removed; the next round tries again.
    """

    removed: tuple[str, ...] = ()
    failed: tuple[tuple[str, str], ...] = ()


def reap(storage: Storage, decisions: Iterable[Decision], *, lease: Lease | None = None) -> Reaped:
    """Remove every checkpoint that is not to be kept, unless it was put on hold since the decision.

    One that fails does not stop the others: it is logged and returned, not raised. `lease`: remembers what is
    removed only by halves, for `reap_abandoned` to go on with.
    """
    surplus = [decision.record.id for decision in decisions if not decision.keep]
    if lease is not None:
        lease.arrivals.removing.update(surplus)
    return _remove_each(storage, surplus, _retire)


def reap_abandoned(
    storage: Storage,
    *,
    lease: Lease,
    current: Collection[str] = (),
    failed_ids: Collection[str] = (),
    heads: Heads | None = None,
) -> Reaped:
    """Remove attempts that nobody will ever commit. Only the lease's holder may; LeaseLostError otherwise.

    They are: what a new holder has put aside (dead-*); what somebody had begun to delete; attempts that this
    run has `failed_ids`, because they failed or were about to be removed; on a storage that cannot rename,
    those of runs that held the directory before and died; and whatever else has no manifest and has not
    changed for an hour (see `arrivals`).
    Where the storage cannot rename, an earlier holder that only slept could still be between its last look at
    the lease and its commit: nothing goes there until this lease has stood for as long as it takes to call a
    holder dead. Uploads that have no end go with their attempts.

    `current`: ids that this run may be writing right now. `heads`: a listing that is new enough.
    """
    lease.check()
    settled = storage.is_local or lease.held_secs >= STALE_SECS
    uploads = _uploads(storage)
    heads = heads or storage.list_heads()
    tree = dict(heads.tree)
    for name in uploads:
        tree.setdefault(name, {})  # nothing but an upload without an end, which no listing shows
    lease.arrivals.keep_only(tree)
    failed_ids = lease.arrivals.removing.union(failed_ids)
    abandoned = []
    for name, files in tree.items():
        if parse_attempt_name(name.removeprefix(DEAD_PREFIX)) is None:
            continue
        paths = uploads.get(name, [])
        if MANIFEST in files:
            _remove_temporaries(storage, name, files)
            # The answer to the start of an upload was lost, and another one begun.
            if paths and name not in current and _is_abandoned(storage, name, lease, failed_ids, paths):
                storage.abort_uploads(name)
            continue
        if heads.whole and files and not any(map(is_checkpoint_file, files)):
            continue  # what is left there is somebody else's
        dead = name.startswith(DEAD_PREFIX) or (TOMBSTONE in files and name not in current)
        ours = settled and name not in current
        if dead or (ours and _is_abandoned(storage, name, lease, failed_ids, paths)):
            abandoned.append(name)
    return _remove_each(storage, abandoned, _clear)


def delete_attempt(storage: Storage, name: str) -> bool:
    """Remove one failed attempt of this run, once no rank can still be writing into it.

    Returns whether it was removed: a directory that has a manifest after all stays, it is a checkpoint.
    """
    return _clear(storage, name)


def _uploads(storage: Storage) -> dict[str, list[str]]:
    """By directory, the paths of uploads into it that have no end."""
    found: dict[str, list[str]] = {}
    for path in sorted(storage.unfinished_uploads()):
        found.setdefault(path.partition("/")[0], []).append(path)
    return found


def _is_abandoned(
    storage: Storage, name: str, lease: Lease, failed_ids: Collection[str], uploads: Collection[str]
) -> bool:
    if name in failed_ids:
        return True
    # Where a new holder can rename, it has put aside what its predecessors were writing.
    if not storage.is_local and is_attempt_of(name, lease.predecessors):
        return True
    if lease.arrivals.is_over(storage, name, lease_name(lease.epoch), uploads):
        return True
    if first_time("arriving", storage.uri, name):
        log.info(
            "%s has no manifest, and no run of this directory began it. It may be a copy that is still "
            "arriving: it stays until nothing in it has changed for an hour",
            storage.describe(name),
        )
    return False


def _retire(storage: Storage, name: str) -> bool:
    if storage.exists(f"{name}/{HELD}"):
        log.info("%s/%s was put on hold: it stays", storage.uri, name)
        return False
    reason = storage.why_not_ours(name)
    if reason:
        raise NotOursError(f"{storage.describe(name)} {reason}")
    # On a full disk deleting is what helps. Interrupted without a tombstone, the rest stays for an hour.
    with contextlib.suppress(StorageFullError):
        storage.publish(f"{name}/{TOMBSTONE}", b"", exclusive=False)
    storage.delete_file(f"{name}/{MANIFEST}")
    storage.sync_dir(name)
    _clear_files(storage, name)
    return True


def _clear(storage: Storage, name: str) -> bool:
    if storage.exists(f"{name}/{MANIFEST}"):  # committed since the listing
        return False
    return _clear_files(storage, name)


def _clear_files(storage: Storage, name: str) -> bool:
    """Whether there was anything of ours to remove."""
    cleared = storage.clear_dir(name, is_checkpoint_file)
    if cleared.left:
        names = [name if name.isprintable() else repr(name) for name in cleared.left[:_SHOWN]]
        shown = ", ".join(names) + ", ..." * (len(cleared.left) > _SHOWN)
        where = storage.describe(name)
        _say_once(storage, name, f"{where} stays: it holds files that Holdfast did not write: {shown}")
    return cleared.removed > 0 or not cleared.left


def _say_once(storage: Storage, name: str, sentence: str) -> None:
    if first_time("left", storage.uri, name, sentence):
        log.warning("%s", sentence)


def _remove_temporaries(storage: Storage, name: str, files: Mapping[str, int]) -> None:
    """Remove what publishing left beside the manifest: it has two names until the temporary one is gone."""
    for file in files:
        if file.startswith(MANIFEST) and file.endswith(TMP_SUFFIX) and is_checkpoint_file(file):
            try:
                storage.delete_file(f"{name}/{file}")
            except NotOursError:
                return
            except StorageError as error:
                log.warning("could not remove %s/%s/%s: %s", storage.uri, name, file, error)


def _remove_each(storage: Storage, names: list[str], remove: Callable[[Storage, str], bool]) -> Reaped:
    removed, failed = [], []
    for name in names:
        try:
            if remove(storage, name):
                removed.append(name)
        except FileNotFoundError:
            removed.append(name)  # somebody else was faster
        except NotOursError as error:
            _say_once(storage, name, f"clean-up leaves it alone: {error}")
        except StorageError as error:
            log.warning("could not remove %s/%s, the next round tries again: %s", storage.uri, name, error)
            failed.append((name, str(error)))
    if removed:
        storage.sync_dir("")
    return Reaped(tuple(removed), tuple(failed))
