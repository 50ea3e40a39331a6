"""Marks on a checkpoint: damaged (passed over by `latest`) and on hold (exempt from retention).

Both are small files in the checkpoint's directory: they are deleted with it, and no table can go stale. A
damage mark records the versions of the files that were read: if a copy was still arriving, its mark becomes
void once it is complete.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from engine.errors import DamagedError, HoldfastError, NotFoundError
from engine.format.digest import bytes_digest
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.names import DAMAGED, MANIFEST, ON_HOLD, TMP_SUFFIX, is_checkpoint_file
from engine.storage.base import Storage

log = logging.getLogger(__name__)

_MAX_REASON_CHARS = 4000
_MAX_MARK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Mark:
    """A damage mark. `holds` is False once the files differ from those that were read."""

    reason: str
    holds: bool


def seen(storage: Storage, id: str) -> str:
    """A digest over the versions of a checkpoint's files. Take it before you read them.

    Raises: NotFoundError; StorageError.
    """
    files = {
        name: version
        for name, version in storage.versions(id).items()
        if is_checkpoint_file(name) and name not in (DAMAGED, ON_HOLD) and not name.endswith(TMP_SUFFIX)
    }
    return bytes_digest(canonical_bytes(files))


def mark_damaged(storage: Storage, id: str, reason: str, *, seen: str | None = None) -> None:
    """Mark a checkpoint as damaged; listings and `latest` then skip it. The last reason wins.

    `seen`: the result of `seen()` from before the damage was found; the mark holds while that is unchanged.
    None: it holds until it is cleared.
    """
    mark = {"reason": reason[:_MAX_REASON_CHARS]} | ({} if seen is None else {"seen": seen})
    storage.publish(f"{id}/{DAMAGED}", canonical_bytes(mark), exclusive=False)


def read_damage_mark(storage: Storage, id: str) -> Mark:
    """The damage mark of a checkpoint. One that cannot be parsed holds; a missing one does not.

    Raises: StorageError.
    """
    path = f"{id}/{DAMAGED}"
    reason = f"it is marked as damaged by {path}"
    try:
        raw = storage.read_bytes(path, max_bytes=_MAX_MARK_BYTES)
        value = parse_canonical(raw, what=path)
    except NotFoundError:
        return Mark("", holds=False)
    except DamagedError:
        value = None
    if not isinstance(value, dict):
        return Mark(reason, holds=True)
    recorded, digest = value.get("reason"), value.get("seen")
    if isinstance(recorded, str) and recorded:
        reason = recorded
    return Mark(reason, _is_as_seen(storage, id, digest))


def clear_damage_mark(storage: Storage, id: str) -> bool:
    """Delete the damage mark of a checkpoint that was found whole. Returns whether there was one.

    Raises: StorageError.
    """
    if not storage.exists(f"{id}/{DAMAGED}"):
        return False
    storage.delete_file(f"{id}/{DAMAGED}")
    storage.sync_dir(id)
    return True


def hold(storage: Storage, id: str) -> None:
    """Exempt a committed checkpoint from retention until `release`. NotFoundError if it does not exist."""
    _require(storage, id)
    storage.publish(f"{id}/{ON_HOLD}", b"", exclusive=False)
    _require(storage, id)  # retention may have deleted it before it saw the mark


def release(storage: Storage, id: str) -> None:
    """Let retention delete the checkpoint again. Does nothing for one that is not on hold."""
    _require(storage, id)
    storage.delete_file(f"{id}/{ON_HOLD}")
    storage.sync_dir(id)


def _is_as_seen(storage: Storage, id: str, digest: object) -> bool:
    if not isinstance(digest, str):  # written by an older Holdfast, or meant to hold until cleared
        return True
    try:
        return seen(storage, id) == digest
    except HoldfastError as error:
        log.info("%s still counts as damaged: could not check whether its files have changed: %s", id, error)
        return True


def _require(storage: Storage, id: str) -> None:
    if not storage.exists(f"{id}/{MANIFEST}"):
        where = storage.describe(id)
        raise NotFoundError(f"{where} is not a committed checkpoint: never committed, or deleted")
