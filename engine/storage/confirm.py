"""Whether a small file that was reported written is there as it was written."""

from __future__ import annotations

from engine.errors import DamagedError, NotFoundError
from engine.storage.base import Storage


def is_as_written(storage: Storage, path: str, raw: bytes) -> bool:
    """Read a file back. False only on a definite no; StorageError where the storage does not answer."""
    try:
        return storage.read_bytes(path, max_bytes=len(raw)) == raw
    except (NotFoundError, DamagedError):
        return False


def loses_data(storage: Storage, path: str) -> str:
    """The message for a storage that reported success but did not keep the file."""
    return (
        f"{storage.describe(path)} was reported written, but is missing or reads back differently: this "
        "storage loses data. Test it with `python -m engine.checkpoints selftest`, or use another one"
    )
