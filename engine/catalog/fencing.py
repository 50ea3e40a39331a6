"""What a new holder of the lease does first: put unfinished attempts out of their writers' reach."""

from __future__ import annotations

from engine.errors import AlreadyExistsError, NotFoundError
from engine.format.names import (
    DEAD_PREFIX,
    MANIFEST,
    PROBE_PREFIX,
    TMP_SUFFIX,
    parse_attempt_name,
    parse_lease,
)
from engine.storage.base import Storage


def fence(storage: Storage, epoch: int) -> None:
    """Rename attempts without a manifest to dead-*, and remove old leases and probe files."""
    tree = storage.list_heads().tree
    for name, files in tree.items():
        if parse_attempt_name(name) is None or MANIFEST in files:
            continue
        if not _bury(storage, name):
            break
    for name in tree.get("", {}):
        # A crash while a lease was written leaves lease-00000001.1f0c9a3e.tmp.
        older = parse_lease(name.partition(".")[0] if name.endswith(TMP_SUFFIX) else name)
        if (older is not None and older < epoch) or name.startswith(PROBE_PREFIX):
            storage.delete_file(name)
    storage.sync_dir("")


def _bury(storage: Storage, name: str) -> bool:
    """Rename an attempt to dead-*; False when the storage cannot rename (attempt paths are unique anyway)."""
    dead = DEAD_PREFIX + name
    try:
        if not storage.rename(name, dead):
            return False
    except (NotFoundError, AlreadyExistsError):  # another taker was here first
        return True
    # Its writer may have committed after our listing. It cannot after the rename, so this answer is final.
    if storage.exists(f"{dead}/{MANIFEST}"):
        storage.rename(dead, name)
    return True
