"""Marks beside a checkpoint's data: damaged (never tried first again) and held (exempt from retention).

Both are small files in the checkpoint's directory, so that they go with it and need no table of their own. A
mark of damage holds for the bytes that were seen: a copy that was still arriving is whole once it is there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from engine.errors import DamagedError, HoldfastError, NotFoundError
from engine.format.digest import bytes_digest
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.names import DAMAGED, HELD, MANIFEST, TMP_SUFFIX, is_checkpoint_file
from engine.storage.base import Storage

log = logging.getLogger(__name__)

_MAX_REASON_CHARS = 4000
_MAX_MARK_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Mark:
    """What a mark of damage says; `holds` is False once the files are others than those that were seen."""

    reason: str
    holds: bool


def seen(storage: Storage, id: str) -> str:
    """A digest over the versions of a checkpoint's files. Take it before they are read.

    Raises: NotFoundError; StorageError.
    """
    files = {
        name: version
        for name, version in storage.versions(id).items()
        if is_checkpoint_file(name) and name not in (DAMAGED, HELD) and not name.endswith(TMP_SUFFIX)
    }
    return bytes_digest(canonical_bytes(files))


def mark_damaged(storage: Storage, id: str, reason: str, *, seen: str | None = None) -> None:
    """Mark a checkpoint as damaged; listings and `latest` then pass it over. The last reason stands.

    `seen`: what the function of that name said before the damage was found; the mark holds while it says the
    same. None: until it is taken away.
    """
    mark = {"reason": reason[:_MAX_REASON_CHARS]} | ({} if seen is None else {"seen": seen})
    storage.publish(f"{id}/{DAMAGED}", canonical_bytes(mark), exclusive=False)


def read_damage_mark(storage: Storage, id: str) -> Mark:
    """The mark of damage of a checkpoint. One that cannot be read holds; one that is gone does not.

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
    said, digest = value.get("reason"), value.get("seen")
    return Mark(said if isinstance(said, str) and said else reason, _is_as_seen(storage, id, digest))


def clear_damage_mark(storage: Storage, id: str) -> bool:
    """Remove the mark of damage from a checkpoint that was found whole; whether there was one.

    Raises: StorageError.
    """
    if not storage.exists(f"{id}/{DAMAGED}"):
        return False
    storage.delete_file(f"{id}/{DAMAGED}")
    storage.sync_dir(id)
    return True


def hold(storage: Storage, id: str) -> None:
    """Exempt a committed checkpoint from retention until `release`. NotFoundError if there is none."""
    _require(storage, id)
    storage.publish(f"{id}/{HELD}", b"", exclusive=False)
    _require(storage, id)  # retention may have removed it before it could see the mark


def release(storage: Storage, id: str) -> None:
    """Give a checkpoint back to retention. Releasing one that is not held does nothing."""
    _require(storage, id)
    storage.delete_file(f"{id}/{HELD}")
    storage.sync_dir(id)


def _is_as_seen(storage: Storage, id: str, digest: object) -> bool:
    if not isinstance(digest, str):  # of an older Holdfast, or meant to hold
        return True
    try:
        return seen(storage, id) == digest
    except HoldfastError as error:
        log.info("%s still counts as damaged: its files could not be checked for changes: %s", id, error)
        return True


def _require(storage: Storage, id: str) -> None:
    if not storage.exists(f"{id}/{MANIFEST}"):
        raise NotFoundError(f"{storage.describe(id)} is no committed checkpoint: it never was, or is gone")
