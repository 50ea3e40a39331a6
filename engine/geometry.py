"""Boxes in the index space of a tensor: intersection, coverage, cutting into rows. Pure.

A box is [offsets, offsets + sizes) in each dimension, half-open; a scalar's box has no dimensions and one
element. Anything with `offsets` and `sizes` is a box: chunks of the format, DCP's chunk metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple, Protocol


class Boxed(Protocol):
    """Anything with a position in its tensor."""

    @property
    def offsets(self) -> Sequence[int]: ...
    @property
    def sizes(self) -> Sequence[int]: ...


class Box(NamedTuple):
    """A box, in the coordinates of its tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def intersect(one: Boxed, two: Boxed) -> Box | None:
    """The elements that two boxes of one tensor share, or None."""
    offsets, sizes = [], []
    for begin, size, other, other_size in zip(one.offsets, one.sizes, two.offsets, two.sizes, strict=True):
        first = begin if begin > other else other
        length = min(begin + size, other + other_size) - first
        if length <= 0:
            return None
        offsets.append(first)
        sizes.append(length)
    return Box(tuple(offsets), tuple(sizes))


def within(box: Boxed, outer: Boxed) -> tuple[int, ...]:
    """A box's offsets relative to a box that contains it."""
    return tuple(begin - origin for begin, origin in zip(box.offsets, outer.offsets, strict=True))


def first_overlap(boxes: Sequence[Boxed]) -> tuple[int, int] | None:
    """The positions of two boxes of one tensor that share an element, or None.

    Sweeps along the dimension with the most different offsets and compares a box only with those that overlap
    it there: about one per box for sharded tensors, where comparing all pairs would take ranks squared.
    """
    filled = [number for number, box in enumerate(boxes) if prod(box.sizes)]
    if len(filled) < 2:
        return None
    dims = range(len(boxes[filled[0]].sizes))
    if not dims:
        return filled[0], filled[1]  # two scalars
    sweep = max(dims, key=lambda dim: len({boxes[number].offsets[dim] for number in filled}))
    active: list[int] = []
    for number in sorted(filled, key=lambda number: boxes[number].offsets[sweep]):
        box = boxes[number]
        active = [
            other
            for other in active
            if boxes[other].offsets[sweep] + boxes[other].sizes[sweep] > box.offsets[sweep]
        ]
        for other in active:
            if intersect(boxes[other], box) is not None:
                return other, number
        active.append(number)
    return None


def cover(shape: Sequence[int], boxes: Sequence[Boxed]) -> bool:
    """Whether boxes inside a tensor of this shape contain every element exactly once."""
    return sum(prod(box.sizes) for box in boxes) == prod(shape) and first_overlap(boxes) is None


def row_dimension(sizes: Sequence[int]) -> int | None:
    """The dimension along which a row-major box can be cut into contiguous parts.

    None for a box of one element or none.
    """
    if not prod(sizes):
        return None
    return next((dim for dim, size in enumerate(sizes) if size != 1), None)


def cut(box: Boxed, dim: int, start: int, length: int) -> Box:
    """Rows [start, start + length) of a box along `dim`, relative to the box."""
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[dim] += start
    sizes[dim] = length
    return Box(tuple(offsets), tuple(sizes))


def chunk_rows(rows: int, parts: int, part: int) -> tuple[int, int]:
    """Rows [begin, end) of one part, divided as `torch.chunk` does.

    Every part has ceil(rows / parts) rows, except the last ones, which have fewer or none.
    """
    size = -(-rows // parts)
    return min(rows, part * size), min(rows, (part + 1) * size)


def show(box: Boxed) -> str:
    """A box as text: "[0:4, 2:6]"."""
    spans = [f"{begin}:{begin + size}" for begin, size in zip(box.offsets, box.sizes, strict=True)]
    return f"[{', '.join(spans)}]"
