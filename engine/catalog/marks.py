"""Marks beside a checkpoint's data: damaged (never tried first again) and held (exempt from retention).

Both are small files in the checkpoint's directory, so that they go with it and need no table of their own.
"""

from __future__ import annotations

from engine.errors import DamagedError, NotFoundError
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.names import DAMAGED, HELD, MANIFEST
from engine.storage.base import Storage

_MAX_REASON_CHARS = 4000
_MAX_MARK_BYTES = 64 << 10


def mark_damaged(storage: Storage, id: str, reason: str) -> None:
    """Mark a checkpoint as damaged; listings and `latest` then pass it over. The last reason stands."""
    mark = canonical_bytes({"reason": reason[:_MAX_REASON_CHARS]})
    storage.publish(f"{id}/{DAMAGED}", mark, exclusive=False)


def damage_reason(storage: Storage, id: str) -> str:
    """Why a checkpoint is marked as damaged. A mark that cannot be read still counts."""
    path = f"{id}/{DAMAGED}"
    try:
        raw = storage.read_bytes(path, max_bytes=_MAX_MARK_BYTES)
        value = parse_canonical(raw, what=path)
    except (DamagedError, NotFoundError):
        value = None
    reason = value.get("reason") if isinstance(value, dict) else None
    return reason if isinstance(reason, str) and reason else f"it is marked as damaged by {path}"


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


def _require(storage: Storage, id: str) -> None:
    if not storage.exists(f"{id}/{MANIFEST}"):
        raise NotFoundError(f"{storage.describe(id)} is no committed checkpoint: it never was, or is gone")
