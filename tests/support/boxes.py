"""Chunks as tests write them down, and a look at which elements a set of boxes covers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch

from engine.format.layout import Chunk


def box(
    name: str, shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int], dtype: str = "F32"
) -> Chunk:
    """One box of a global tensor."""
    return Chunk(name, dtype, tuple(shape), tuple(offsets), tuple(sizes))


def whole(name: str, *shape: int, dtype: str = "F32") -> Chunk:
    """A tensor in one box."""
    return box(name, shape, [0] * len(shape), shape, dtype)


def spans(extent: int, parts: int) -> list[tuple[int, int]]:
    """(offset, size) of each rank's share, as DTensor's `Shard` cuts a dimension: later ones may be empty."""
    each = -(-extent // parts)
    starts = [min(extent, part * each) for part in range(parts + 1)]
    return [(a, b - a) for a, b in itertools.pairwise(starts)]


def shards(name: str, shape: Sequence[int], parts: int, dim: int = 0, dtype: str = "F32") -> list[Chunk]:
    """A tensor cut along one dimension, one box a rank."""
    boxes = []
    for offset, size in spans(shape[dim], parts):
        offsets, sizes = [0] * len(shape), list(shape)
        offsets[dim], sizes[dim] = offset, size
        boxes.append(box(name, shape, offsets, sizes, dtype))
    return boxes


def covered(shape: Sequence[int], boxes: Iterable[Chunk]) -> torch.Tensor:
    """How often each element of a global tensor is covered."""
    count = torch.zeros(tuple(shape), dtype=torch.int64)
    for chunk in boxes:
        count[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))] += 1
    return count
