"""Rank 0's end of a save: check all receipts, confirm every file in storage, publish the manifest."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.directory.record import CheckpointRecord, from_manifest
from engine.errors import (
    NotFoundError,
    PeerFailedError,
    ReplicaMismatchError,
    SaveFailedError,
    StorageError,
)
from engine.format.best import DEFAULT, BestRule
from engine.format.digest import bytes_digest
from engine.format.manifest import FileReceipt, Manifest, ShardReceipt, TensorInfo
from engine.format.names import MANIFEST
from engine.lease.lease import Lease
from engine.save.messages import Receipt, all_may_pass, failures
from engine.save.replicas import Comparison
from engine.storage.base import Storage
from engine.storage.confirm import is_as_written, loses_data

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SaveInfo:
    """The manifest's fields about a save, apart from its shards."""

    step: int
    attempt: str
    reasons: tuple[str, ...]
    epoch: int = 0
    tokens: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    world_size: int = 1
    mesh: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    software: Mapping[str, str] = field(default_factory=dict)
    parents: tuple[str, ...] = ()
    """The ids of the checkpoints that were merged into this one."""


def check_receipts(
    receipts: list[Receipt],
    attempt: str,
    different: Sequence[str] = (),
    comparison: Comparison | None = None,
) -> tuple[ShardReceipt, ...]:
    """Every rank's shard. Pure.

    Args:
        different: a sentence for each JSON value that must be equal on all ranks and is not.
        comparison: interprets the receipts' digests, if replicas were compared.
    Raises: PeerFailedError with every failed rank's cause; ReplicaMismatchError when a replicated value
        differs between ranks.
    """
    failed = failures(receipts)
    if failed:
        causes = [receipt.error for receipt in receipts if receipt.error]
        raise PeerFailedError(failed, may_pass=all_may_pass(causes))
    foreign = [receipt.rank for receipt in receipts if receipt.attempt != attempt]
    if foreign:
        raise SaveFailedError(
            f"rank {foreign[0]} reported a different attempt from {attempt}; restart the run"
        )
    lines = list(different)
    if comparison is not None:
        lines += comparison.differences([receipt.replicas for receipt in receipts])
    if lines:
        raise ReplicaMismatchError(
            "the ranks have diverged: "
            + "; ".join(lines)
            + ". Find out why. If a value is meant to differ, give it a different name on each rank, make it "
            "part of a DTensor, or name its state key in per_rank; if rank 0 alone decides it, name its "
            "state key in rank0"
        )
    return tuple(receipt.shard for receipt in receipts if receipt.shard is not None)


def confirm_files(
    storage: Storage,
    attempt: str,
    shards: tuple[ShardReceipt, ...],
    deadline: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Check from rank 0's node that every reported file exists in its full size.

    This detects a directory that the nodes do not share. A file missing from the listing is looked up by name
    until the deadline, because NFS caches listings. Raises: SaveFailedError naming the file and its rank.
    """
    listed = {entry.name: entry.bytes for entry in storage.list_dir(attempt)}
    for shard in shards:
        for receipt in (*shard.files, shard.index):
            if listed.get(receipt.file) != receipt.bytes:
                _confirm_by_name(storage, attempt, shard.rank, receipt, deadline, clock, sleep)


def _confirm_by_name(
    storage: Storage,
    attempt: str,
    rank: int,
    receipt: FileReceipt,
    deadline: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> None:
    pause = 0.05
    while True:
        try:
            found = storage.size(f"{attempt}/{receipt.file}")
        except NotFoundError:
            found = -1
        if found == receipt.bytes:
            return
        if clock() + pause > deadline:
            seen = "does not see it" if found < 0 else f"sees {found:,} bytes"
            raise SaveFailedError(
                f"rank {rank} wrote {receipt.file} with {receipt.bytes:,} bytes, but rank 0 {seen} in "
                f"{storage.uri}/{attempt}; all nodes must share one checkpoint directory"
            )
        sleep(pause)
        pause = min(2.0, pause * 2)


def commit(
    storage: Storage,
    lease: Lease | None,
    info: SaveInfo,
    shards: tuple[ShardReceipt, ...],
    tensors: Mapping[str, TensorInfo],
    aliases: Mapping[str, str],
    objects: Mapping[str, Any],
    *,
    sequence: int,
    parent: str | None,
    best: BestRule = DEFAULT,
    now: Callable[[], float] = time.time,
) -> CheckpointRecord:
    """Publish the manifest, and with it the checkpoint.

    Raises: LeaseLostError when another run has taken over the directory; StorageError; SaveFailedError when
        the storage lost the manifest.
    """
    manifest = Manifest(
        id=info.attempt,
        sequence=sequence,
        parent=parent,
        parents=info.parents,
        step=info.step,
        epoch=info.epoch,
        tokens=info.tokens,
        created=now(),
        reasons=info.reasons,
        metrics=dict(info.metrics),
        world_size=info.world_size,
        mesh=dict(info.mesh),
        tensors=dict(tensors),
        aliases=dict(aliases),
        objects=dict(objects),
        config=dict(info.config),
        software=dict(info.software),
        shards=shards,
        best=best,
    )
    raw = manifest.to_bytes()
    if lease is not None:
        lease.check()
    storage.publish(f"{info.attempt}/{MANIFEST}", raw, exclusive=True)
    _read_back(storage, f"{info.attempt}/{MANIFEST}", raw)
    return from_manifest(manifest, storage.uri, manifest_digest=bytes_digest(raw))


def _read_back(storage: Storage, path: str, raw: bytes) -> None:
    """Read the manifest back, because a storage may report success and lose the file.

    Raises: SaveFailedError when the manifest is certainly not there as written. An outage proves nothing: the
    storage has already confirmed the manifest.
    """
    try:
        as_written = is_as_written(storage, path, raw)
    except StorageError as error:
        log.warning("%s was reported written but could not be read back: %s", storage.describe(path), error)
        return
    if not as_written:
        raise SaveFailedError(loses_data(storage, path))


def software_versions(**more: str) -> dict[str, str]:
    """The software that writes a checkpoint, for its manifest."""
    return {"python": platform.python_version(), "platform": platform.platform(), **more}
