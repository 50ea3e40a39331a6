"""A new lease holder's first step: rename its predecessors' attempts, so that they cannot commit them."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import AlreadyExistsError, DamagedError, NotFoundError
from engine.format.names import (
    DEAD_PREFIX,
    MANIFEST,
    PROBE_PREFIX,
    TMP_SUFFIX,
    is_attempt_of,
    lease_name,
    parse_attempt_name,
    parse_lease,
)
from engine.lease.lease_file import MAX_LEASE_BYTES, LeaseInfo
from engine.storage.base import Heads, Storage

SLACK_SECS = 30.0
"""How long after its last heartbeat a holder may still have written."""


@dataclass(frozen=True, slots=True)
class _Holder:
    """An earlier holder. `changed`: when its lease changed, on the storage's clock; None if unknown."""

    run_id: str
    released: bool
    changed: float | None


@dataclass(frozen=True, slots=True)
class Fenced:
    """The result of fencing.

    predecessors: ids of the runs that ended without releasing the directory.
    heads: the directory as fencing left it; None if another process changed it meanwhile.
    """

    predecessors: frozenset[str]
    heads: Heads | None


class _Outcome(enum.Enum):
    """Of an attempt that was to be renamed."""

    FENCED = enum.auto()
    UNCLEAR = enum.auto()
    CANNOT_RENAME = enum.auto()


def fence(storage: Storage, epoch: int) -> Fenced:
    """Rename the attempts of earlier holders to dead-*, and delete old leases and probe files.

    Attempts of runs that never held this directory stay: a user may be copying a checkpoint into it.
    """
    heads = storage.list_heads()
    tree, left, is_known = heads.tree, dict(heads.tree), True
    holders = _earlier_holders(storage, tree.get("", {}), epoch)
    for name, files in tree.items():
        if parse_attempt_name(name) is None or MANIFEST in files:
            continue
        if not _was_left_by(storage, name, holders) or storage.why_not_ours(name):
            continue
        outcome = _fence_attempt(storage, name)
        if outcome is _Outcome.CANNOT_RENAME:
            break
        is_known = is_known and outcome is _Outcome.FENCED
        left[DEAD_PREFIX + name] = left.pop(name)
    for name in tree.get("", {}):
        # A crash during the write of a lease leaves lease-00000001.1f0c9a3e.tmp.
        older = parse_lease(name.partition(".")[0] if name.endswith(TMP_SUFFIX) else name)
        if (older is not None and older < epoch) or name.startswith(PROBE_PREFIX):
            storage.delete_file(name)
    storage.sync_dir("")
    predecessors = frozenset(holder.run_id for holder in holders if not holder.released)
    return Fenced(predecessors, Heads(left, heads.whole) if is_known else None)


def _earlier_holders(storage: Storage, files: Mapping[str, int], epoch: int) -> list[_Holder]:
    epochs = (parse_lease(name) for name in files)
    holders = (_holder(storage, older) for older in epochs if older is not None and older < epoch)
    return [holder for holder in holders if holder is not None]


def _holder(storage: Storage, epoch: int) -> _Holder | None:
    name = lease_name(epoch)
    try:
        raw = storage.read_bytes(name, max_bytes=MAX_LEASE_BYTES)
        info = LeaseInfo.from_bytes(raw, epoch, what=storage.describe(name))
        return _Holder(info.run_id, info.released, storage.last_change(name))
    except (NotFoundError, DamagedError):
        return None  # deleted by a faster run, or unreadable: its attempts are deleted once they are quiet


def _was_left_by(storage: Storage, name: str, holders: list[_Holder]) -> bool:
    """Whether an earlier holder wrote it, and nobody has written to it since.

    A run's own checkpoint may come back as a copy: such a copy changes after the run has ended.
    """
    writers = [holder for holder in holders if is_attempt_of(name, [holder.run_id])]
    if not writers:
        return False
    try:
        changed = storage.last_change(name)
    except NotFoundError:
        return False
    return any(
        not holder.released
        if changed is None or holder.changed is None
        else changed <= holder.changed + (0.0 if holder.released else SLACK_SECS)
        for holder in writers
    )


def _fence_attempt(storage: Storage, name: str) -> _Outcome:
    """Rename an attempt to dead-*, if the storage can rename (if not: no path is ever written twice)."""
    dead = DEAD_PREFIX + name
    try:
        if not storage.rename(name, dead):
            return _Outcome.CANNOT_RENAME
    except (NotFoundError, AlreadyExistsError):  # another new holder was faster
        return _Outcome.UNCLEAR
    # Its writer may have committed it after our listing. After the rename it cannot: this answer is final.
    if storage.exists(f"{dead}/{MANIFEST}"):
        storage.rename(dead, name)
        return _Outcome.UNCLEAR
    return _Outcome.FENCED
