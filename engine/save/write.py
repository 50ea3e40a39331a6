"""One rank's part of a save: its shard files from the arena, then its index."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from engine.format.digest import BLOCK_BYTES, block_digests, bytes_digest, combine
from engine.format.index import ShardFile, ShardIndex
from engine.format.manifest import FileReceipt, ShardReceipt
from engine.format.names import index_file
from engine.snapshot.arena import Arena, FileSlot
from engine.storage.base import Storage


def write_rank(
    storage: Storage,
    attempt: str,
    arena: Arena | None,
    *,
    rank: int,
    world_size: int,
    local: Mapping[str, Any],
    secs: dict[str, float],
    clock: Callable[[], float] = time.monotonic,
) -> ShardReceipt:
    """Make this rank's bytes durable: shards, index, directory. Adds seconds by cause to `secs`.

    Raises: StorageError of any kind; the storage has removed the file that failed.
    """
    storage.make_dir(attempt)
    files = [
        _write_shard(storage, attempt, arena, slot, secs, clock) for slot in (arena.slots if arena else ())
    ]
    index = ShardIndex(attempt, rank, world_size, tuple(files), dict(local))
    raw = index.to_bytes()
    started = clock()
    storage.write_file(f"{attempt}/{index_file(rank)}", raw)
    storage.sync_dir(attempt)
    _add(secs, "index", clock() - started)
    receipts = tuple(FileReceipt(file.file, file.file_bytes, file.digest) for file in files)
    return ShardReceipt(rank, receipts, FileReceipt(index_file(rank), len(raw), bytes_digest(raw)))


def _write_shard(
    storage: Storage,
    attempt: str,
    arena: Arena | None,
    slot: FileSlot,
    secs: dict[str, float],
    clock: Callable[[], float],
) -> ShardFile:
    assert arena is not None
    padded = arena.padded(slot)
    windows: dict[int, bytes] = {}

    def digest_window(begin: int, end: int) -> None:
        started = clock()
        windows[begin] = block_digests(padded[begin:end])
        _add(secs, "digest", clock() - started)

    file_bytes = slot.layout.file_bytes
    stats = storage.write_shard(f"{attempt}/{slot.layout.file}", padded, file_bytes, on_window=digest_window)
    _add(secs, "write", stats.write_secs)
    _add(secs, "fsync", stats.fsync_secs)
    packed = b"".join(windows[begin] for begin in sorted(windows))
    return ShardFile(slot.layout.file, file_bytes, BLOCK_BYTES, packed, combine(packed), slot.layout.chunks)


def _add(secs: dict[str, float], cause: str, value: float) -> None:
    secs[cause] = secs.get(cause, 0.0) + value
