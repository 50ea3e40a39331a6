"""One rank's part of a save: its shard files from the arena, then its index."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import StorageFullError
from engine.format.digest import BLOCK_BYTES, block_digests, bytes_digest, combine
from engine.format.index import ShardFile, ShardIndex
from engine.format.manifest import FileReceipt, ShardReceipt
from engine.format.names import index_file
from engine.native import kernels
from engine.save.filling import Filling
from engine.save.staging_buffer import Arena, FileSlot
from engine.storage.base import Storage

DIGEST_SLICE_BYTES = 1 << 20 if kernels.library is None else 16 << 20
"""How much is digested at a time, about 0.1 or 1.2 ms: Python's loop holds the GIL for as long."""

DIGEST_NICENESS = 8
"""How far the digesting thread stands back behind training, where the copy has left digests to make: they are
made while a core has nothing else to do. Further back, a busy machine would delay the save."""


def write_rank(
    storage: Storage,
    attempt: str,
    arena: Arena | None,
    filling: Filling,
    *,
    rank: int,
    world_size: int,
    local: Mapping[str, Any],
    secs: dict[str, float],
    clock: Callable[[], float] = time.monotonic,
) -> ShardReceipt:
    """Make this rank's bytes durable: shards, index, directory. Adds seconds by cause to `secs`.

    Raises: StorageFullError, before anything is written if the free space tells; StorageError of any kind;
        the storage has removed the file that failed.
    """
    _check_space(storage, arena.file_bytes if arena else 0)
    storage.make_dir(attempt)
    slots = arena.slots if arena else ()
    files = [_write_shard(storage, attempt, arena, slot, filling, secs, clock) for slot in slots]
    index = ShardIndex(attempt, rank, world_size, tuple(files), dict(local))
    raw = index.to_bytes()
    started = clock()
    storage.write_file(f"{attempt}/{index_file(rank)}", raw)
    storage.sync_dir(attempt)
    _add(secs, "index", clock() - started)
    receipts = tuple(FileReceipt(file.file, file.file_bytes, file.digest) for file in files)
    return ShardReceipt(rank, receipts, FileReceipt(index_file(rank), len(raw), bytes_digest(raw)))


def _check_space(storage: Storage, need_bytes: int) -> None:
    """Own bytes only: the other ranks' files may be there already, and count as used then."""
    free_bytes = storage.free_bytes()
    if free_bytes is not None and free_bytes < need_bytes:
        raise StorageFullError(
            f"this rank's part of the checkpoint takes {need_bytes:,} bytes, and {storage.uri} has "
            f"{free_bytes:,} free: free space there, keep fewer checkpoints, or choose another directory"
        )


def _write_shard(
    storage: Storage,
    attempt: str,
    arena: Arena | None,
    slot: FileSlot,
    filling: Filling,
    secs: dict[str, float],
    clock: Callable[[], float],
) -> ShardFile:
    assert arena is not None
    file_bytes = slot.layout.file_bytes
    padded = arena.padded(slot)
    stop = threading.Event()

    def when_filled(begin: int, end: int) -> None:
        # Not from the first byte on: see DECISIONS 30.
        filling.wait_until(max(slot.begin + end, arena.file_bytes // 2))

    # Not in the write loop: digesting holds the GIL, and while the snapshot is still being copied the
    # training thread needs it between copies.
    with ThreadPoolExecutor(1, thread_name_prefix="holdfast-digest") as pool:
        digesting = pool.submit(_digest_when_filled, padded[:file_bytes], slot, filling, stop, clock)
        try:
            path = f"{attempt}/{slot.layout.file}"
            stats = storage.write_shard(path, padded, file_bytes, on_window=when_filled)
        except BaseException:
            stop.set()
            raise
        packed, digest_secs = digesting.result()
    _add(secs, "digest", digest_secs)
    _add(secs, "write", stats.write_secs)
    _add(secs, "fsync", stats.fsync_secs)
    return ShardFile(slot.layout.file, file_bytes, BLOCK_BYTES, packed, combine(packed), slot.layout.chunks)


def _digest_when_filled(
    view: memoryview, slot: FileSlot, filling: Filling, stop: threading.Event, clock: Callable[[], float]
) -> tuple[bytes, float]:
    """Packed digests of a whole file once the arena holds it, and the seconds they took beyond the copy."""
    _stand_back()
    filling.wait_until(slot.begin + len(view))
    noted = filling.digests_of(slot.layout.file)
    if noted is not None:
        return noted, 0.0
    started = clock()
    packed = []
    for at in range(0, len(view), DIGEST_SLICE_BYTES):
        if stop.is_set():
            break
        packed.append(block_digests(view[at : at + DIGEST_SLICE_BYTES]))
        # Gives the GIL away for a moment, if it was held. A thread that only asks for it gets it after 5 ms,
        # and training asks for it at every operation.
        time.sleep(0)
    return b"".join(packed), clock() - started


def _stand_back() -> None:
    """Lower the priority of this thread, which ends with its file. Linux has one for each thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, thread) + DIGEST_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, min(19, nice))


def _add(secs: dict[str, float], cause: str, value: float) -> None:
    secs[cause] = secs.get(cause, 0.0) + value
