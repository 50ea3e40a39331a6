"""A new committed checkpoint from a draft: the lease, one shard, the engine's own commit.

A shard is written from one buffer. A training rank has it in memory; here it is a scratch file that is
mapped, so that memory stays bounded whatever the state's size. It has no name, so that nothing of it is left
whatever happens. On a local directory it lies in that directory's file system.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.convert.tensors import Progress, fill
from engine.directory.listing import highest_sequence, list_checkpoints
from engine.directory.reaper import delete_attempt
from engine.directory.record import CheckpointRecord
from engine.errors import HoldfastError, StateError
from engine.format.digest import BLOCK_BYTES, block_digests, bytes_digest, combine
from engine.format.index import ShardFile, ShardIndex
from engine.format.json import canonical_bytes
from engine.format.layout import ALIGN_BYTES, Chunk, PlacedChunk, ShardLayout, plan_files
from engine.format.manifest import FileReceipt, ShardReceipt, TensorInfo
from engine.format.names import attempt_name, index_file
from engine.lease.lease import Lease
from engine.save.commit import SaveInfo, check_receipts, commit, confirm_files, software_versions
from engine.save.receipt import Receipt
from engine.state.torch_dtypes import to_torch
from engine.storage.base import Storage
from engine.storage.os_failures import mapped
from engine.storage.system import System

log = logging.getLogger(__name__)

CONFIRM_SECS = 60.0
"""How long a network file system may take to show the files that were just written."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint to be, of one rank.

    windows: the rows of a tensor, in order, of any dtype that converts to the one in `tensors`.
    local: rank 0's own JSON values.
    """

    reason: str
    step: int
    tensors: Mapping[str, TensorInfo]
    windows: Callable[[str], Iterator[torch.Tensor]]
    epoch: int = 0
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)
    local: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.tensor_bytes for info in self.tensors.values())


def publish(storage: Storage, draft: Draft, progress: Progress) -> CheckpointRecord:
    """Write the draft and commit it, with the highest sequence number of the directory.

    Raises: DirectoryHeldError while a live run writes there; LeaseLostError; StorageError; whatever reading
        the draft's tensors raises. Then nothing is committed and nothing of it is left.
    """
    attempt = _attempt(draft)
    layouts = _layouts(draft)
    storage.make_dir()
    with Lease.acquire(storage, run_id=draft.reason) as lease:
        lease.start_heartbeat()
        sequence = highest_sequence(list_checkpoints(storage)) + 1
        try:
            shard = _write(storage, attempt, layouts, draft, progress)
            shards = check_receipts([Receipt(0, attempt, shard)], attempt)
            confirm_files(storage, attempt, shards, time.monotonic() + CONFIRM_SECS)
            return commit(
                storage,
                lease,
                _info(draft, attempt),
                shards,
                draft.tensors,
                draft.aliases,
                draft.objects,
                sequence=sequence,
                parent=None,
            )
        except BaseException:
            _take_back(storage, attempt)
            raise


def _info(draft: Draft, attempt: str) -> SaveInfo:
    return SaveInfo(
        step=draft.step,
        attempt=attempt,
        reasons=(draft.reason,),
        epoch=draft.epoch,
        tokens=draft.tokens,
        metrics=draft.metrics,
        mesh={"names": [], "shape": []},
        config=draft.config,
        software=software_versions(torch=str(torch.__version__)),
        parents=draft.parents,
    )


def _take_back(storage: Storage, attempt: str) -> None:
    try:
        delete_attempt(storage, attempt)
    except HoldfastError as problem:
        log.warning("the unfinished attempt %s was left behind: %s", attempt, problem)


def _attempt(draft: Draft) -> str:
    """A new attempt's name. StateError for what no manifest could hold, before anything is touched."""
    try:
        canonical_bytes([draft.objects, draft.local, draft.config])
        for alias, name in draft.aliases.items():
            if name not in draft.tensors or alias in draft.tensors:
                raise ValueError(f"the further name {alias[:80]!r} does not lead to a tensor")
        return attempt_name(draft.step, secrets.token_hex(4))
    except (ValueError, AttributeError) as error:
        raise StateError(f"this cannot become a checkpoint: {error}") from error


def _layouts(draft: Draft) -> tuple[ShardLayout, ...]:
    try:
        chunks = [
            Chunk(name, info.dtype, info.shape, tuple(0 for _ in info.shape), info.shape)
            for name, info in draft.tensors.items()
        ]
        return plan_files(0, chunks)
    except ValueError as error:
        raise StateError(f"this cannot become a checkpoint: {error}") from error


def _write(
    storage: Storage, attempt: str, layouts: tuple[ShardLayout, ...], draft: Draft, progress: Progress
) -> ShardReceipt:
    """Make shard and index durable. Raises StorageError and what reading the draft raises."""
    storage.make_dir(attempt)
    files = [_write_shard(storage, attempt, layout, draft, progress) for layout in layouts]
    raw = ShardIndex(attempt, 0, 1, tuple(files), dict(draft.local)).to_bytes()
    storage.write_file(f"{attempt}/{index_file(0)}", raw)
    storage.sync_dir(attempt)
    receipts = tuple(FileReceipt(file.file, file.file_bytes, file.digest) for file in files)
    return ShardReceipt(0, receipts, FileReceipt(index_file(0), len(raw), bytes_digest(raw)))


def _write_shard(
    storage: Storage, attempt: str, layout: ShardLayout, draft: Draft, progress: Progress
) -> ShardFile:
    scratch = Scratch(layout, storage.describe("") if storage.is_local else None)
    for placed in layout.chunks:
        fill(scratch.view(placed), draft.windows(placed.chunk.name), progress)
        scratch.forget(placed)
    digests: dict[int, bytes] = {}

    def digest_window(begin: int, end: int) -> None:
        digests[begin] = block_digests(scratch.padded[begin:end])

    storage.write_shard(
        f"{attempt}/{layout.file}", scratch.padded, layout.file_bytes, on_window=digest_window
    )
    packed = b"".join(digests[begin] for begin in sorted(digests))
    return ShardFile(layout.file, layout.file_bytes, BLOCK_BYTES, packed, combine(packed), layout.chunks)


class Scratch:
    """A shard file in the making: a mapped file without a name, rounded up to whole pages.

    Args:
        folder: a directory in the file system to use; None for the temporary directory.
    Raises: StorageFullError when there is no room for it.
    """

    def __init__(self, layout: ShardLayout, folder: str | None) -> None:
        size = -(-layout.file_bytes // ALIGN_BYTES) * ALIGN_BYTES
        where = folder or tempfile.gettempdir()
        with mapped("write a scratch file in", where), tempfile.TemporaryFile(dir=where) as file:
            # Reserved first: a page of a mapping that finds the disk full kills the process.
            System().fallocate(file.fileno(), size)
            os.ftruncate(file.fileno(), size)
            self._pages = mmap.mmap(file.fileno(), size)
        self.padded = memoryview(self._pages)
        self._buffer = torch.frombuffer(self._pages, dtype=torch.uint8)
        self.padded[: len(layout.header)] = layout.header

    def view(self, placed: PlacedChunk) -> torch.Tensor:
        """The file's bytes of one chunk, as a tensor."""
        flat = self._buffer[placed.begin : placed.end]
        return flat.view(to_torch(placed.chunk.dtype)).view(placed.chunk.sizes)

    def forget(self, placed: PlacedChunk) -> None:
        """Leave a chunk's pages to the page cache: they no longer count as this process's memory."""
        begin = placed.begin // ALIGN_BYTES * ALIGN_BYTES
        self._pages.madvise(mmap.MADV_DONTNEED, begin, placed.end - begin) if placed.end > begin else None
