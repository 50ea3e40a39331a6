"""From slices to byte ranges: whatever the boxes, the bytes that arrive are exactly those of the slice."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.restore import pieces as pieces_module
from engine.restore.load_plan import Slice
from engine.restore.pieces import LEAST_RUN_BYTES, Piece, Window, cut_slice, group
from engine.restore.window import copy_out


@dataclass(frozen=True)
class Case:
    """A chunk at byte `begin` of a file, the wanted box inside it, and how it is read."""

    begin: int
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool
    block_bytes: int
    most_blocks: int

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        return self.begin + math.prod(self.sizes) * self.itemsize + 24

    def pieces(self, number: int = 0) -> list[Piece]:
        return list(
            cut_slice(
                number,
                self.begin,
                self.sizes,
                self.offsets,
                self.lengths,
                self.itemsize,
                contiguous=self.contiguous,
                most_bytes=max(1, (self.most_blocks - 2) * self.block_bytes),
            )
        )

    def windows(self) -> list[Window]:
        return group(self.pieces(), self.block_bytes, self.file_bytes, self.most_blocks * self.block_bytes)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    boxes = [draw(st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted)) for size in sizes]
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.int64]))
    return Case(
        begin=8 * draw(st.integers(0, 40)),
        sizes=sizes,
        offsets=tuple(a for a, _ in boxes),
        lengths=tuple(b - a for a, b in boxes),
        dtype=dtype,
        contiguous=draw(st.booleans()),
        block_bytes=draw(st.sampled_from([8, 16, 64])),
        most_blocks=draw(st.integers(3, 6)),
    )


def assemble(case: Case, raw: torch.Tensor) -> torch.Tensor:
    """Fill a destination the way the reader does, from whole windows."""
    if case.contiguous:
        to = torch.zeros(case.lengths, dtype=case.dtype)
    else:
        to = torch.zeros((*case.lengths[:-1], 2 * case.lengths[-1]), dtype=case.dtype)[..., ::2]
    item = Slice("t", 0, case.offsets, case.lengths, to)
    for window in case.windows():
        held = raw[window.begin : window.end].clone()  # nothing outside of the window is at hand
        for piece in window.pieces:
            copy_out(piece, held[piece.begin - window.begin : piece.end - window.begin], item)
    return to


def file_of(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The file's bytes, and the chunk in it."""
    generator = torch.Generator().manual_seed(case.begin)
    raw = torch.randint(0, 256, (case.file_bytes,), dtype=torch.uint8, generator=generator)
    if case.dtype.is_floating_point:
        raw = torch.randint(0, 100, (case.file_bytes,), dtype=torch.uint8, generator=generator)  # no NaN
    end = case.begin + math.prod(case.sizes) * case.itemsize
    return raw, raw[case.begin : end].clone().view(case.dtype).view(case.sizes)


@settings(max_examples=400)
@given(cases(), st.sampled_from([1, 16, LEAST_RUN_BYTES]))
def test_the_slice_arrives_exactly(case: Case, least_run_bytes: int) -> None:
    if not case.sizes and not case.contiguous:
        return  # a scalar is always contiguous
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "LEAST_RUN_BYTES", least_run_bytes)
        raw, chunk = file_of(case)
        box = tuple(slice(o, o + n) for o, n in zip(case.offsets, case.lengths, strict=True))
        assert torch.equal(assemble(case, raw), chunk[box])


@settings(max_examples=300)
@given(cases(), st.sampled_from([1, 16, LEAST_RUN_BYTES]))
def test_windows_are_whole_blocks_in_file_order(case: Case, least_run_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "LEAST_RUN_BYTES", least_run_bytes)
        windows = case.windows()
    row_bytes = math.prod(case.sizes[1:]) * case.itemsize
    for window in windows:
        assert window.begin % case.block_bytes == 0
        assert window.end % case.block_bytes == 0 or window.end == case.file_bytes
        assert window.end <= case.file_bytes
        longest = case.most_blocks * case.block_bytes
        assert window.end - window.begin <= max(longest, row_bytes + 2 * case.block_bytes)
        for piece in window.pieces:
            assert window.begin <= piece.begin < piece.end <= window.end
    assert all(one.begin < two.begin for one, two in itertools.pairwise(windows))


@st.composite
def runs(draw: st.DrawFn) -> list[Piece]:
    """Flat pieces of one file, apart from each other, in any order."""
    ends = sorted(draw(st.lists(st.integers(0, 600), max_size=12, unique=True)))
    found = [
        Piece(number, a, b, flat=True, to_row=draw(st.integers(0, 5)))
        for number, (a, b) in enumerate(zip(ends[::2], ends[1::2], strict=False))
    ]
    return draw(st.permutations(found))


@settings(max_examples=300)
@given(runs(), st.sampled_from([4, 16, 64]), st.integers(1, 4))
def test_no_block_is_read_twice_for_flat_pieces(
    found: list[Piece], block_bytes: int, most_blocks: int
) -> None:
    windows = group(found, block_bytes, 600, most_blocks * block_bytes)
    for one, two in itertools.pairwise(windows):
        assert one.end <= two.begin
    needed = {block for p in found for block in range(p.begin // block_bytes, -(-p.end // block_bytes))}
    read = [block for w in windows for block in range(w.begin // block_bytes, -(-w.end // block_bytes))]
    assert sorted(read) == sorted(needed), "and none that is not needed"
    assert all(w.end - w.begin <= most_blocks * block_bytes for w in windows)
    # Every byte of every piece is served once, at its place in the destination.
    for whole in found:
        parts = sorted(
            (p for w in windows for p in w.pieces if p.slice == whole.slice), key=lambda p: p.begin
        )
        assert parts[0].begin == whole.begin
        assert parts[-1].end == whole.end
        assert all(a.end == b.begin for a, b in itertools.pairwise(parts))
        assert all(p.to_row - whole.to_row == p.begin - whole.begin for p in parts)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)), max_size=6),
    st.sampled_from([4, 16, 64]),
    st.integers(1, 4),
)
def test_pieces_that_overlap_are_served_too(
    spans: list[tuple[int, int]], block_bytes: int, most_blocks: int
) -> None:
    """A tied weight that is restored into two tensors."""
    found = [Piece(number, a, a + n, flat=True) for number, (a, n) in enumerate(spans)]
    windows = group(found, block_bytes, 600, most_blocks * block_bytes)
    for whole in found:
        parts = sorted(
            (p for w in windows for p in w.pieces if p.slice == whole.slice), key=lambda p: p.begin
        )
        assert (parts[0].begin, parts[-1].end) == (whole.begin, whole.end)
        assert all(a.end == b.begin for a, b in itertools.pairwise(parts))
        assert all(p.to_row == p.begin - whole.begin for p in parts)
    for window in windows:
        assert all(window.begin <= p.begin < p.end <= window.end for p in window.pieces)


def cut(
    sizes: Sequence[int],
    offsets: Sequence[int],
    lengths: Sequence[int],
    most_bytes: int = 1 << 22,
    **more: bool,
) -> list[Piece]:
    return list(
        cut_slice(
            0,
            4096,
            sizes,
            offsets,
            lengths,
            4,
            contiguous=more.get("contiguous", True),
            most_bytes=most_bytes,
        )
    )


@pytest.mark.parametrize(
    ("sizes", "offsets", "lengths", "spans"),
    [
        ((), (), (), [(4096, 4100)]),
        ((10,), (2,), (3,), [(4104, 4116)]),
        ((4, 5), (1, 0), (2, 5), [(4116, 4156)]),
        ((1, 4, 5), (0, 1, 0), (1, 2, 5), [(4116, 4156)]),
        ((4, 5), (1, 1), (1, 2), [(4120, 4128)]),
        ((4, 5), (0, 0), (0, 5), []),
        ((0, 5), (0, 0), (0, 5), []),
        # Part of each of several short rows: the touched rows, whole.
        ((4, 5), (1, 1), (2, 2), [(4116, 4156)]),
    ],
)
def test_which_bytes_are_read(
    sizes: Sequence[int], offsets: Sequence[int], lengths: Sequence[int], spans: list[tuple[int, int]]
) -> None:
    assert [(piece.begin, piece.end) for piece in cut(sizes, offsets, lengths)] == spans


def test_long_runs_of_a_column_slice_are_read_exactly() -> None:
    columns = LEAST_RUN_BYTES  # half a row is 2 x LEAST_RUN_BYTES bytes
    found = cut((3, columns), (0, columns // 2), (3, columns // 2))
    assert [piece.flat for piece in found] == [True] * 3
    assert sum(piece.end - piece.begin for piece in found) == 3 * columns // 2 * 4


def test_short_runs_are_read_with_what_lies_between_them() -> None:
    found = cut((1000, 64), (0, 32), (1000, 32))
    assert [(piece.flat, piece.begin, piece.end) for piece in found] == [(False, 4096, 4096 + 1000 * 256)]


def test_rows_are_read_in_pieces_of_bounded_size() -> None:
    found = cut((1000, 64), (0, 32), (1000, 32), most_bytes=10_000)
    assert max(piece.end - piece.begin for piece in found) <= 10_000
    assert [piece.to_row for piece in found] == list(range(0, 1000, 10_000 // 256))


def test_a_row_longer_than_the_bound_is_cut_along_a_later_dimension() -> None:
    found = cut((2, 100, 64), (0, 0, 0), (2, 100, 10), most_bytes=10_000)
    assert max(piece.end - piece.begin for piece in found) <= 10_000
    assert {piece.to_index for piece in found} == {(0,), (1,)}


def test_a_destination_that_is_not_contiguous_gets_rows() -> None:
    (piece,) = cut((10,), (2,), (3,), contiguous=False)
    assert not piece.flat
    assert (piece.rows, piece.row_sizes, piece.to_row) == (3, (), 0)


def test_neighbours_share_a_window_and_distant_pieces_do_not() -> None:
    near = [Piece(0, 10, 20, flat=True), Piece(1, 70, 90, flat=True), Piece(2, 130, 140, flat=True)]
    assert [(w.begin, w.end, len(w.pieces)) for w in group(near, 64, 1000, 1024)] == [(0, 192, 3)]
    far = [Piece(0, 10, 20, flat=True), Piece(1, 200, 210, flat=True)]
    assert [(w.begin, w.end) for w in group(far, 64, 1000, 1024)] == [(0, 64), (192, 256)]


def test_the_last_window_ends_with_the_file() -> None:
    (window,) = group([Piece(0, 70, 100, flat=True)], 64, 100, 1024)
    assert (window.begin, window.end) == (64, 100)


def test_resharding_gpt2_by_rows_reads_little_more_than_it_needs() -> None:
    """Two ranks' halves, wanted in quarters: the blocks at the cuts are all that is read in addition."""
    rows, columns, block = 50257, 768, 65536
    half, quarter = -(-rows // 2), -(-rows // 4)
    needed = read = 0
    for rank in range(4):
        want = (rank * quarter, min(rows, (rank + 1) * quarter))
        for saver in range(2):
            have = (saver * half, min(rows, (saver + 1) * half))
            low, high = max(want[0], have[0]), min(want[1], have[1])
            if low >= high:
                continue
            sizes, file_bytes = (have[1] - have[0], columns), 4096 + (have[1] - have[0]) * columns * 4
            found = cut(sizes, (low - have[0], 0), (high - low, columns))
            windows = group(found, block, file_bytes, 1 << 22)
            needed += (high - low) * columns * 4
            read += sum(window.end - window.begin for window in windows)
    assert needed == rows * columns * 4
    assert read / needed <= 1.05
