"""From slices of chunks to byte ranges of files, sorted and grouped into windows. Pure.

A slice is a box inside a chunk, which is stored row-major. Where the box covers whole rows, its bytes are one
run, which is read exactly. Where it covers only a part of each row (a tensor saved by rows and restored by
columns), whole rows are read and the part is copied out: one large read beats thousands of small ones.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

WINDOW_BYTES = 4 << 20
"""The most bytes that a reader thread holds at a time, unless a single row is longer."""

LEAST_RUN_BYTES = 64 << 10
"""Shorter runs are read together with the bytes between them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A byte range [begin, end) of one file, and where its bytes go.

    The range holds `rows` rows of shape `row_sizes`. Of each row the box [row_offsets, row_offsets +
    row_lengths) is wanted; it fills rows [to_row, to_row + rows) of the destination at index `to_index`
    (leading dimensions), or, when `flat`, bytes [to_row, to_row + end - begin) of the contiguous one.
    `slice` is the position of the slice that it serves.
    """

    slice: int
    begin: int
    end: int
    flat: bool
    rows: int = 0
    row_sizes: tuple[int, ...] = ()
    row_offsets: tuple[int, ...] = ()
    row_lengths: tuple[int, ...] = ()
    to_index: tuple[int, ...] = ()
    to_row: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """A byte range [begin, end) of one file, on block boundaries, and the pieces that lie inside it."""

    begin: int
    end: int
    pieces: tuple[Piece, ...]


def cut_slice(
    number: int,
    begin: int,
    sizes: Sequence[int],
    offsets: Sequence[int],
    lengths: Sequence[int],
    itemsize: int,
    *,
    contiguous: bool,
    most_bytes: int,
) -> Iterator[Piece]:
    """The pieces of one slice.

    Args:
        begin: the chunk's first byte in its file.
        sizes, offsets, lengths: the chunk's box, and the wanted box inside it.
        contiguous: whether the destination is one run of memory.
        most_bytes: the longest piece, unless a single row is longer.
    """
    if not math.prod(lengths):
        return
    if not sizes:
        sizes, offsets, lengths = (1,), (0,), (1,)
    # Every dimension after `dim` is wanted whole, so each index before it gives one run of bytes.
    dim = len(sizes) - 1
    while dim > 0 and lengths[dim] == sizes[dim]:
        dim -= 1
    run_bytes = math.prod(lengths[dim:]) * itemsize
    if contiguous and dim == 0:  # whole rows, nearly always: one run, without the slower loops below
        first = begin + offsets[0] * math.prod(sizes[1:]) * itemsize
        yield Piece(number, first, first + run_bytes, flat=True)
        return
    if contiguous and (math.prod(lengths[:dim]) == 1 or run_bytes >= LEAST_RUN_BYTES):
        yield from _flat_pieces(number, begin, sizes, offsets, lengths, dim, itemsize)
        return
    # The outermost dimension whose rows are still small enough to read whole.
    dim = 0
    while dim < len(sizes) - 1 and math.prod(sizes[dim + 1 :]) * itemsize > most_bytes:
        dim += 1
    row_bytes = math.prod(sizes[dim + 1 :]) * itemsize
    rows_each = max(1, most_bytes // max(1, row_bytes))
    for index in itertools.product(*(range(length) for length in lengths[:dim])):
        first = (
            begin
            + _element((*map(sum, zip(index, offsets[:dim], strict=True)), offsets[dim]), sizes) * itemsize
        )
        for row in range(0, lengths[dim], rows_each):
            rows = min(rows_each, lengths[dim] - row)
            yield Piece(
                number,
                first + row * row_bytes,
                first + (row + rows) * row_bytes,
                flat=False,
                rows=rows,
                row_sizes=tuple(sizes[dim + 1 :]),
                row_offsets=tuple(offsets[dim + 1 :]),
                row_lengths=tuple(lengths[dim + 1 :]),
                to_index=index,
                to_row=row,
            )


def _flat_pieces(
    number: int,
    begin: int,
    sizes: Sequence[int],
    offsets: Sequence[int],
    lengths: Sequence[int],
    dim: int,
    itemsize: int,
) -> Iterator[Piece]:
    """Runs that are contiguous on both sides: one for each index of the dimensions before `dim`."""
    run_bytes = lengths[dim] * math.prod(sizes[dim + 1 :]) * itemsize
    to = 0
    for index in itertools.product(*(range(length) for length in lengths[:dim])):
        start = (*map(sum, zip(index, offsets[:dim], strict=True)), offsets[dim])
        first = begin + _element(start, sizes) * itemsize
        yield Piece(number, first, first + run_bytes, flat=True, to_row=to)
        to += run_bytes


def _element(start: Sequence[int], sizes: Sequence[int]) -> int:
    """The row-major element number of the row that begins at `start` (leading dimensions)."""
    number = 0
    for position, size in itertools.zip_longest(start, sizes, fillvalue=0):
        number = number * size + position
    return number


def group(pieces: Sequence[Piece], block_bytes: int, file_bytes: int, most_bytes: int) -> list[Window]:
    """Group the pieces of one file into windows on block boundaries, in file order.

    Flat pieces are cut at window ends, so that they make no block be read twice; others stay whole. Pieces in
    the same or in adjoining blocks share a window. Pieces may overlap: a tied weight may be restored into two
    tensors.
    """
    windows: list[Window] = []
    waiting: list[Piece] = []
    begin = end = 0
    # The rest of a cut piece goes back into the heap: with overlaps it need not be the next in file order.
    heap = [(piece.begin, piece.end, number, piece) for number, piece in enumerate(pieces)]
    heapq.heapify(heap)
    while heap:
        *_, number, piece = heapq.heappop(heap)
        limit = begin + most_bytes
        joins = (
            bool(waiting)
            and piece.begin - piece.begin % block_bytes <= end
            and (piece.end <= limit or (piece.flat and piece.begin < limit))
        )
        if not joins:
            if waiting:
                windows.append(Window(begin, end, tuple(waiting)))
                waiting = []
            begin = piece.begin - piece.begin % block_bytes
            limit = begin + most_bytes
            end = begin
        head, rest = _cut(piece, limit)
        if rest is not None:
            heapq.heappush(heap, (rest.begin, rest.end, number, rest))
        waiting.append(head)
        end = max(end, min(file_bytes, -(-head.end // block_bytes) * block_bytes))
    if waiting:
        windows.append(Window(begin, end, tuple(waiting)))
    return windows


def direct_pieces(pieces: Sequence[Piece], fits: Callable[[Piece], bool]) -> list[Piece]:
    """The pieces of one window that can be read directly into their destinations, in file order.

    `pieces` are in file order; `fits` tells whether a destination can be read into. [] where pieces overlap:
    a byte of the file can be read into one place only.
    """
    if any(after.begin < before.end for before, after in itertools.pairwise(pieces)):
        return []
    return [piece for piece in pieces if piece.flat and fits(piece)]


def _cut(piece: Piece, at: int) -> tuple[Piece, Piece | None]:
    """A flat piece up to byte `at` of the file, and the rest of it."""
    if not piece.flat or piece.end <= at:
        return piece, None
    head = Piece(piece.slice, piece.begin, at, flat=True, to_row=piece.to_row)
    return head, Piece(piece.slice, at, piece.end, flat=True, to_row=piece.to_row + at - piece.begin)
