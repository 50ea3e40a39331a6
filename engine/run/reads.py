"""What each rank of a new mesh would read of a checkpoint, computed from its indexes alone. Pure, no torch.

The cuts are those of the restore: the model and the optimizer are sharded by rows as `torch.chunk` does,
everything else is whole on every rank, and a rank's own random streams are read at the saved world size only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.format.element_types import itemsize
from engine.format.index import ShardFile, ShardIndex
from engine.format.layout import Chunk, PlacedChunk
from engine.restore.pieces import WINDOW_BYTES, Piece, cut_slice, group
from engine.run.mesh import MeshShape

SHARDED_KEYS = ("model", "optimizer")
PER_RANK_PREFIX = "per_rank."

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes) of a part of a tensor."""


@dataclass(frozen=True, slots=True)
class FileRead:
    """Of one shard file: bytes of tensors that a rank wants, and bytes it reads for them, in whole blocks."""

    file: str
    wanted_bytes: int
    read_bytes: int


def plan_reads(indexes: Sequence[ShardIndex], mesh: MeshShape, rank: int) -> list[FileRead]:
    """The shard files that `rank` of the new mesh reads, by name; files it reads nothing of are left out."""
    same_world = len(indexes) == mesh.world_size
    pieces: dict[str, list[Piece]] = defaultdict(list)
    wanted: dict[str, int] = defaultdict(int)
    shards: dict[str, ShardFile] = {}
    for shard, placed in _chunks(indexes):
        box = wanted_box(placed.chunk, mesh, rank, same_world=same_world)
        cut = None if box is None else overlap(placed.chunk, box)
        if cut is None:
            continue
        offsets, sizes = cut
        within = tuple(begin - origin for begin, origin in zip(offsets, placed.chunk.offsets, strict=True))
        shards[shard.file] = shard
        wanted[shard.file] += math.prod(sizes) * itemsize(placed.chunk.dtype)
        pieces[shard.file] += cut_slice(
            0,
            placed.begin,
            placed.chunk.sizes,
            within,
            sizes,
            itemsize(placed.chunk.dtype),
            contiguous=True,
            most_bytes=WINDOW_BYTES,
        )
    return [
        FileRead(name, wanted[name], _read_bytes(pieces[name], shards[name]))
        for name in sorted(pieces)
        if wanted[name] > 0
    ]


def wanted_box(chunk: Chunk, mesh: MeshShape, rank: int, *, same_world: bool) -> Box | None:
    """The part of the chunk's tensor that `rank` holds in the new mesh; None for nothing of it."""
    whole = (0,) * len(chunk.shape), chunk.shape
    if chunk.name.startswith(PER_RANK_PREFIX):
        return whole if same_world and chunk.name.split(".")[1] == f"{rank:05d}" else None
    if mesh.dp_shard == 1 or not chunk.shape or chunk.name.partition(".")[0] not in SHARDED_KEYS:
        return whole
    begin, end = chunk_rows(chunk.shape[0], mesh.dp_shard, rank % mesh.dp_shard)
    return (begin, *whole[0][1:]), (end - begin, *chunk.shape[1:])


def chunk_rows(rows: int, parts: int, part: int) -> tuple[int, int]:
    """The rows [begin, end) of one part, as `torch.chunk` cuts them: every part but the last ones is full."""
    size = -(-rows // parts)
    return min(rows, part * size), min(rows, (part + 1) * size)


def overlap(chunk: Chunk, box: Box) -> Box | None:
    """What of `box` lies in the chunk, in the tensor's coordinates; None when there is nothing."""
    begins = tuple(max(a, b) for a, b in zip(chunk.offsets, box[0], strict=True))
    ends = tuple(
        min(a + a_size, b + b_size)
        for a, a_size, b, b_size in zip(chunk.offsets, chunk.sizes, *box, strict=True)
    )
    if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
        return None
    return begins, tuple(end - begin for begin, end in zip(begins, ends, strict=True))


def _chunks(indexes: Iterable[ShardIndex]) -> Iterable[tuple[ShardFile, PlacedChunk]]:
    for index in indexes:
        yield from index.chunks


def _read_bytes(pieces: Sequence[Piece], shard: ShardFile) -> int:
    windows = group(pieces, shard.block_bytes, shard.file_bytes, WINDOW_BYTES)
    return sum(window.end - window.begin for window in windows)
