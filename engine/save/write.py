"""Writes one rank's files of a checkpoint: its shards, each from a source, then its index."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from engine.errors import StorageFullError
from engine.format.digest import BLOCK_BYTES, bytes_digest, combine
from engine.format.index import ShardFile, ShardIndex
from engine.format.layout import ShardLayout
from engine.format.manifest import FileReceipt, ShardReceipt
from engine.format.names import index_file
from engine.storage.base import Storage
from engine.storage.source import Source


class ShardSource(Source, Protocol):
    """A shard file to write. `digest_secs`: time spent on digests apart from the copy."""

    @property
    def layout(self) -> ShardLayout: ...

    @property
    def digest_secs(self) -> float: ...

    def digests(self) -> bytes:
        """The packed digests of all blocks of the file, after its last window."""
        ...


def write_rank(
    storage: Storage,
    attempt: str,
    sources: Sequence[ShardSource],
    *,
    rank: int,
    world_size: int,
    local: Mapping[str, Any],
    secs: dict[str, float],
    clock: Callable[[], float] = time.monotonic,
) -> ShardReceipt:
    """Make a rank's bytes durable: shards, index, directory. Adds seconds by cause to `secs`.

    Raises: StorageFullError, before writing anything if free space is known to be too small; any
        StorageError; the sources' errors. The storage has deleted the file that failed.
    """
    _check_space(storage, sum(source.file_bytes for source in sources))
    storage.make_dir(attempt)
    files = [_write_shard(storage, attempt, source, secs) for source in sources]
    index = ShardIndex(attempt, rank, world_size, tuple(files), dict(local))
    raw = index.to_bytes()
    started = clock()
    storage.write_file(f"{attempt}/{index_file(rank)}", raw)
    storage.sync_dir(attempt)
    _add(secs, "index", clock() - started)
    receipts = tuple(FileReceipt(file.file, file.file_bytes, file.digest) for file in files)
    return ShardReceipt(rank, receipts, FileReceipt(index_file(rank), len(raw), bytes_digest(raw)))


def _check_space(storage: Storage, need_bytes: int) -> None:
    """Counts this rank's bytes only: files of other ranks may exist already and count as used space."""
    free_bytes = storage.free_bytes()
    if free_bytes is not None and free_bytes < need_bytes:
        raise StorageFullError(
            f"this rank's part of the checkpoint takes {need_bytes:,} bytes, but {storage.uri} has "
            f"only {free_bytes:,} bytes free: free space there, keep fewer checkpoints, or choose "
            "another directory"
        )


def _write_shard(storage: Storage, attempt: str, source: ShardSource, secs: dict[str, float]) -> ShardFile:
    layout = source.layout
    stats = storage.write_shard(f"{attempt}/{layout.file}", source)
    packed = source.digests()
    _add(secs, "digest", source.digest_secs)
    _add(secs, "write", stats.write_secs)
    _add(secs, "fsync", stats.fsync_secs)
    return ShardFile(layout.file, layout.file_bytes, BLOCK_BYTES, packed, combine(packed), layout.chunks)


def _add(secs: dict[str, float], cause: str, value: float) -> None:
    secs[cause] = secs.get(cause, 0.0) + value
