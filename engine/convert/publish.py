"""Commits a draft as a new checkpoint: acquires the lease, writes one rank's files, commits."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.convert.stream import ShardStream
from engine.convert.tensors import Progress
from engine.directory.listing import highest_sequence, list_checkpoints
from engine.directory.reaper import delete_attempt
from engine.directory.record import CheckpointRecord
from engine.errors import HoldfastError, StateError
from engine.format.json import canonical_bytes
from engine.format.layout import Chunk, ShardLayout, plan_files
from engine.format.manifest import TensorInfo
from engine.format.names import attempt_name
from engine.lease.lease import Lease
from engine.save.commit import SaveInfo, check_receipts, commit, confirm_files, software_versions
from engine.save.messages import Receipt
from engine.save.write import write_rank
from engine.storage.base import Storage

log = logging.getLogger(__name__)

CONFIRM_SECS = 60.0
"""How long a network file system may take to show files just written."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A checkpoint of one rank that is not written yet.

    windows: the rows of a tensor, in order, in any dtype that converts to the one in `tensors`.
    local: rank 0's JSON values.
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

    Raises: DirectoryHeldError while a live run holds the directory; LeaseLostError; StorageError; the errors
        of reading the draft's tensors. Then nothing is committed, and its files are deleted.
    """
    attempt = _attempt(draft)
    layouts = _layouts(draft)
    storage.make_dir()
    with Lease.acquire(storage, run_id=draft.reason) as lease:
        lease.start_heartbeat()
        sequence = highest_sequence(list_checkpoints(storage)) + 1
        try:
            files = [ShardStream(layout, draft.windows, progress) for layout in layouts]
            shard = write_rank(storage, attempt, files, rank=0, world_size=1, local=draft.local, secs={})
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
        log.warning("the unfinished attempt %s could not be deleted: %s", attempt, problem)


def _attempt(draft: Draft) -> str:
    """A new attempt's name. StateError, before any write, for values that a manifest cannot store."""
    try:
        canonical_bytes([draft.objects, draft.local, draft.config])
        for alias, name in draft.aliases.items():
            if name not in draft.tensors or alias in draft.tensors:
                raise ValueError(f"the alias {alias[:80]!r} does not name a tensor")
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
