"""Divides the state among ranks so that every byte is written once and replicas share the work. Pure.

Each rank holds certain boxes of the global tensors. A box that several ranks hold (with DDP, along the
replicate dimension of HSDP, an optimizer's step counts) is divided among its holders by bytes, and large
boxes are split by rows, so that N replicas each copy and write 1/N. DCP itself assigns a whole replicated
tensor to one rank.

Buffers of modules are not divided: their values may differ between ranks, and rows from several ranks would
make a tensor that no rank has. The lowest rank that holds a buffer writes it whole; the others write their
own values beside it if these are kept (`engine.state.sharing`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from engine.errors import StateError
from engine.format.layout import Chunk
from engine.geometry import cover, cut, row_dimension
from engine.state.captured import per_rank_name
from engine.state.sharing import SharedBox


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one box that one of its holders writes.

    `box` is the box's position in the rank's own list; rows [start, start + length) along dimension
    `dim` of that box become `chunk`. A scalar has dim 0 and length 1.
    """

    box: int
    dim: int
    start: int
    length: int
    chunk: Chunk


def divide(
    held: Sequence[Sequence[Chunk]], shared_boxes: Mapping[Chunk, SharedBox] | None = None
) -> list[list[Part]]:
    """Assign every distinct box to its holders.

    Args:
        held: for each rank, the boxes that it holds, in the order of its own list.
        shared_boxes: information about boxes that several ranks hold; buffers among them are not divided.
    Returns: for each rank, the parts that it writes.
    Raises: StateError when the boxes of a tensor overlap or leave a hole, or ranks disagree on the tensor.
    """
    holders: dict[Chunk, list[tuple[int, int]]] = defaultdict(list)
    for rank, chunks in enumerate(held):
        for position, chunk in enumerate(chunks):
            holders[chunk].append((rank, position))
    _check_coverage(holders)

    loads = [0] * len(held)
    parts: list[list[Part]] = [[] for _ in held]
    shared: dict[tuple[int, ...], list[Chunk]] = defaultdict(list)
    for chunk, places in holders.items():
        if 0 in chunk.sizes and 0 not in chunk.shape:
            continue  # an empty local shard
        if len(places) == 1:
            rank, position = places[0]
            loads[rank] += chunk.chunk_bytes
            parts[rank].append(_whole(chunk, position))
        elif shared_boxes and shared_boxes[chunk].buffer:
            kept = places if shared_boxes[chunk].kept else places[:1]
            for rank, position in kept:
                loads[rank] += chunk.chunk_bytes
                written = chunk if rank == places[0][0] else own_chunk(chunk, rank)
                parts[rank].append(_whole(written, position))
        else:
            shared[tuple(rank for rank, _ in places)].append(chunk)
    # The largest groups last: they can balance what smaller groups left unbalanced.
    for ranks in sorted(shared, key=lambda ranks: (len(ranks), ranks)):
        _divide_group(ranks, shared[ranks], holders, loads, parts)
    return parts


def own_chunk(chunk: Chunk, rank: int) -> Chunk:
    """A rank's own value of a whole tensor, under that rank's own name."""
    return Chunk(per_rank_name(rank, chunk.name), chunk.dtype, chunk.shape, chunk.offsets, chunk.sizes)


def _divide_group(
    ranks: tuple[int, ...],
    chunks: list[Chunk],
    holders: dict[Chunk, list[tuple[int, int]]],
    loads: list[int],
    parts: list[list[Part]],
) -> None:
    """Lay the group's boxes end to end and cut the line where each rank's quota is full."""
    quotas = _fill(ranks, loads, sum(chunk.chunk_bytes for chunk in chunks))
    order = sorted(ranks, key=lambda rank: (-quotas[rank], rank))
    place = {chunk: dict(holders[chunk]) for chunk in chunks}
    turn = 0
    room = quotas[order[0]]
    # Large boxes first: the small, indivisible ones then fill the gaps.
    for chunk in sorted(chunks, key=lambda chunk: (-chunk.chunk_bytes, chunk.name, chunk.offsets)):
        dim, rows, row_bytes = _rows(chunk)
        start = 0
        while start < rows:
            while room <= 0 and turn + 1 < len(order):
                turn += 1
                room += quotas[order[turn]]
            last = turn + 1 == len(order)
            # Round to the nearest row, over or under the quota.
            take = rows - start if last else min(rows - start, max(1, round(room / (row_bytes or 1))))
            rank = order[turn]
            part = _part(chunk, place[chunk][rank], dim, start, take)
            parts[rank].append(part)
            loads[rank] += part.chunk.chunk_bytes
            room -= part.chunk.chunk_bytes if row_bytes else 1
            start += take


def _fill(ranks: tuple[int, ...], loads: list[int], total_bytes: int) -> dict[int, int]:
    """Each rank's share of `total_bytes`, such that the lowest loads rise to the same level."""
    by_load = sorted(ranks, key=lambda rank: loads[rank])
    below: list[int] = []
    level = 0
    for position, rank in enumerate(by_load):
        below.append(rank)
        level = -(-(total_bytes + sum(loads[r] for r in below)) // len(below))
        if position + 1 == len(by_load) or level <= loads[by_load[position + 1]]:
            break
    return {rank: max(0, level - loads[rank]) if rank in below else 0 for rank in ranks}


def _rows(chunk: Chunk) -> tuple[int, int, int]:
    """(dimension, rows, bytes per row) for cutting a box into contiguous parts."""
    dim = row_dimension(chunk.sizes)
    if dim is None:
        return 0, 1, chunk.chunk_bytes
    return dim, chunk.sizes[dim], chunk.chunk_bytes // chunk.sizes[dim]


def _whole(chunk: Chunk, position: int) -> Part:
    return Part(position, 0, 0, chunk.sizes[0] if chunk.sizes else 1, chunk)


def _part(chunk: Chunk, position: int, dim: int, start: int, length: int) -> Part:
    if not chunk.sizes or not chunk.chunk_bytes or length == chunk.sizes[dim]:
        return Part(position, dim, 0, chunk.sizes[dim] if chunk.sizes else 1, chunk)
    rows = cut(chunk, dim, start, length)
    return Part(position, dim, start, length, Chunk(chunk.name, chunk.dtype, chunk.shape, *rows))


def _check_coverage(holders: dict[Chunk, list[tuple[int, int]]]) -> None:
    by_name: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in holders:
        by_name[chunk.name].append(chunk)
    for name, chunks in by_name.items():
        first = chunks[0]
        for chunk in chunks:
            if (chunk.shape, chunk.dtype) != (first.shape, first.dtype):
                ranks = [holders[first][0][0], holders[chunk][0][0]]
                raise StateError(
                    f"{name}: rank {ranks[0]} has {first.dtype} {list(first.shape)}, rank {ranks[1]} has "
                    f"{chunk.dtype} {list(chunk.shape)}; a tensor that differs between ranks must be "
                    "declared in per_rank"
                )
        if not cover(first.shape, chunks):
            volume = sum(prod(chunk.sizes) for chunk in chunks)
            raise StateError(
                f"{name}: the ranks hold {volume} elements of {prod(first.shape)} in {len(chunks)} boxes "
                "that overlap or leave a hole; redistribute() a DTensor with interleaved shards to Shard"
            )
