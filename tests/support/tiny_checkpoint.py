"""Writes small, valid, committed checkpoints through engine.format and engine.storage, without torch.

The state is one matrix "model.w", split by rows over the ranks, and one vector "model.b" on the last rank.
The bytes follow from `seed` alone. Keyword arguments replace manifest fields, so that a test says only what
it is about.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.format.digest import BLOCK_BYTES, block_digests, bytes_digest, combine
from engine.format.index import ShardFile, ShardIndex
from engine.format.layout import Chunk, plan_files
from engine.format.manifest import FileReceipt, Manifest, ShardReceipt, TensorInfo
from engine.format.names import MANIFEST, attempt_name, index_file
from engine.storage.base import Storage
from engine.storage.local import LocalStorage

COLUMNS = 1024
"""Elements in a row of "model.w": 4 KiB, so that a few dozen rows make several digest blocks."""

BIAS = 8


def chunks_of(world_size: int, rows: int) -> list[list[Chunk]]:
    """Each rank's chunks: rows of the matrix as evenly as they go, the vector on the last rank."""
    per_rank = -(-rows // world_size)
    spans = [(min(rows, r * per_rank), min(rows, (r + 1) * per_rank)) for r in range(world_size)]
    shape = (rows, COLUMNS)
    split = [[Chunk("model.w", "F32", shape, (a, 0), (b - a, COLUMNS))] if b > a else [] for a, b in spans]
    split[-1].append(Chunk("model.b", "F32", (BIAS,), (0,), (BIAS,)))
    return split


def write_checkpoint(
    where: Path | Storage,
    *,
    sequence: int = 1,
    step: int | None = None,
    hex: str | None = None,
    world_size: int = 1,
    rows: int = 40,
    seed: int = 0,
    commit: bool = True,
    chunks: Sequence[Sequence[Chunk]] | None = None,
    **manifest_fields: Any,
) -> str:
    """Write one checkpoint and return its id. Without `commit` it stays an attempt.

    `chunks` replaces the even split, one sequence a rank; they need not make up the tensors.
    """
    storage = LocalStorage(where) if isinstance(where, Path) else where
    step = sequence * 10 if step is None else step
    id = attempt_name(step, f"{sequence:08x}" if hex is None else hex)
    storage.make_dir(id)
    split = chunks_of(world_size, rows) if chunks is None else chunks
    shards = tuple(_write_rank(storage, id, rank, world_size, held, seed) for rank, held in enumerate(split))
    manifest = Manifest(
        id=id,
        sequence=sequence,
        step=step,
        world_size=world_size,
        shards=shards,
        **{
            "tensors": {"model.w": TensorInfo("F32", (rows, COLUMNS)), "model.b": TensorInfo("F32", (BIAS,))},
            "created": 1.7e9 + sequence,
            "reasons": ("interval",),
            "config": {"model": "tiny", "keep_checkpoints": 10},
            "software": {"holdfast": "0"},
            **manifest_fields,
        },
    )
    if commit:
        storage.publish(f"{id}/{MANIFEST}", manifest.to_bytes(), exclusive=True)
    return id


def rewrite_manifest(directory: Path, **changes: Any) -> None:
    """Replace fields of a committed manifest, with a digest that fits."""
    path = directory / MANIFEST
    manifest = Manifest.from_bytes(path.read_bytes(), what=str(path))
    path.write_bytes(dataclasses.replace(manifest, **changes).to_bytes())


def rewrite_index(directory: Path, rank: int, raw: bytes) -> None:
    """Replace one rank's index, with a receipt in the manifest that fits."""
    path = directory / MANIFEST
    (directory / index_file(rank)).write_bytes(raw)
    manifest = Manifest.from_bytes(path.read_bytes(), what=str(path))
    shards = list(manifest.shards)
    receipt = FileReceipt(index_file(rank), len(raw), bytes_digest(raw))
    shards[rank] = dataclasses.replace(shards[rank], index=receipt)
    rewrite_manifest(directory, shards=tuple(shards))


def _write_rank(
    storage: Storage, id: str, rank: int, world_size: int, chunks: Sequence[Chunk], seed: int
) -> ShardReceipt:
    files = []
    for layout in plan_files(rank, chunks):
        noise = random.Random(f"{seed} {layout.file}")
        data = layout.header + noise.randbytes(layout.file_bytes - len(layout.header))
        storage.write_file(f"{id}/{layout.file}", data)
        digests = block_digests(data)
        files.append(ShardFile(layout.file, len(data), BLOCK_BYTES, digests, combine(digests), layout.chunks))
    index = ShardIndex(attempt=id, rank=rank, world_size=world_size, files=tuple(files))
    raw = index.to_bytes()
    storage.write_file(f"{id}/{index_file(rank)}", raw)
    return ShardReceipt(
        rank,
        tuple(FileReceipt(file.file, file.file_bytes, file.digest) for file in files),
        FileReceipt(index_file(rank), len(raw), bytes_digest(raw)),
    )
