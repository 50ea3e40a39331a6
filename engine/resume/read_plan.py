"""How much of a checkpoint each rank of a new mesh would read, from its indexes alone. Pure, no torch.

Reads are divided as in the restore: model and optimizer are sharded by rows like `torch.chunk`, everything
else is whole on every rank, and per-rank random states are read only at the saved world size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.format.element_types import itemsize
from engine.format.index import ShardFile, ShardIndex
from engine.format.layout import Chunk, PlacedChunk
from engine.geometry import Box, chunk_rows, cut, intersect, whole, within
from engine.restore.pieces import WINDOW_BYTES, Piece, cut_slice, group
from engine.run.mesh import MeshShape

SHARDED_KEYS = ("model", "optimizer")
PER_RANK_PREFIX = "per_rank."


@dataclass(frozen=True, slots=True)
class FileRead:
    """One shard file: the tensor bytes a rank needs, and the bytes it reads for them, in whole blocks."""

    file: str
    needed_bytes: int
    read_bytes: int


def plan_reads(indexes: Sequence[ShardIndex], mesh: MeshShape, rank: int) -> list[FileRead]:
    """The shard files that `rank` of the new mesh reads, sorted by name."""
    same_world = len(indexes) == mesh.world_size
    pieces: dict[str, list[Piece]] = defaultdict(list)
    needed: dict[str, int] = defaultdict(int)
    shards: dict[str, ShardFile] = {}
    for shard, placed in _chunks(indexes):
        box = needed_box(placed.chunk, mesh, rank, same_world=same_world)
        shared = None if box is None else intersect(placed.chunk, box)
        if shared is None:
            continue
        shards[shard.file] = shard
        needed[shard.file] += math.prod(shared.sizes) * itemsize(placed.chunk.dtype)
        pieces[shard.file] += cut_slice(
            0,
            placed.begin,
            placed.chunk.sizes,
            within(shared, placed.chunk),
            shared.sizes,
            itemsize(placed.chunk.dtype),
            contiguous=True,
            most_bytes=WINDOW_BYTES,
        )
    return [
        FileRead(name, needed[name], _read_bytes(pieces[name], shards[name]))
        for name in sorted(pieces)
        if needed[name] > 0
    ]


def needed_box(chunk: Chunk, mesh: MeshShape, rank: int, *, same_world: bool) -> Box | None:
    """The part of the chunk's tensor that `rank` holds in the new mesh, or None."""
    everything = whole(chunk.shape)
    if chunk.name.startswith(PER_RANK_PREFIX):
        return everything if same_world and chunk.name.split(".")[1] == f"{rank:05d}" else None
    if mesh.dp_shard == 1 or not chunk.shape or chunk.name.partition(".")[0] not in SHARDED_KEYS:
        return everything
    begin, end = chunk_rows(chunk.shape[0], mesh.dp_shard, rank % mesh.dp_shard)
    return cut(everything, 0, begin, end - begin)


def _chunks(indexes: Iterable[ShardIndex]) -> Iterable[tuple[ShardFile, PlacedChunk]]:
    for index in indexes:
        yield from index.chunks


def _read_bytes(pieces: Sequence[Piece], shard: ShardFile) -> int:
    windows = group(pieces, shard.block_bytes, shard.file_bytes, WINDOW_BYTES)
    return sum(window.end - window.begin for window in windows)
