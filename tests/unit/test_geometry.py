"""Boxes of tensors, checked against sets of their elements: intersection, coverage, cutting."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.geometry import (
    Box,
    chunk_rows,
    cover,
    cut,
    first_overlap,
    intersect,
    row_dimension,
    show,
    whole,
    within,
)

SHAPE = (7, 7)


def elements(box: Box | None) -> set[tuple[int, ...]]:
    """The index of every element in a box."""
    if box is None:
        return set()
    return set(itertools.product(*(range(a, a + n) for a, n in zip(*box, strict=True))))


spans = st.tuples(st.integers(0, 4), st.integers(0, 3))
boxes = st.tuples(spans, spans).map(lambda dims: Box(tuple(a for a, _ in dims), tuple(n for _, n in dims)))


@given(boxes, boxes)
def test_what_two_boxes_share(one: Box, two: Box) -> None:
    shared = intersect(one, two)
    assert elements(shared) == elements(one) & elements(two)
    if shared is not None:
        inside = {
            tuple(a + b for a, b in zip(one.offsets, index, strict=True))
            for index in elements(Box(within(shared, one), shared.sizes))
        }
        assert inside == elements(shared)


@given(st.lists(boxes, max_size=6))
def test_overlaps_are_found_exactly_as_by_comparing_all_pairs(held: list[Box]) -> None:
    pairs = itertools.combinations(range(len(held)), 2)
    expected = {(a, b) for a, b in pairs if elements(held[a]) & elements(held[b])}
    found = first_overlap(held)
    assert (found is None) == (not expected)
    assert found is None or tuple(sorted(found)) in expected


@given(st.lists(boxes, max_size=5))
def test_a_tensor_is_covered_when_every_element_is_there_once(held: list[Box]) -> None:
    there = [index for box in held for index in elements(box)]
    everything = sorted(elements(whole(SHAPE)))
    assert cover(SHAPE, held) == (sorted(there) == everything)
    rest = cut(whole(SHAPE), 0, 3, 4)
    assert cover(SHAPE, [cut(whole(SHAPE), 0, 0, 3), rest])
    assert not cover(SHAPE, [cut(whole(SHAPE), 0, 0, 2), rest]), "a hole"
    assert not cover(SHAPE, [cut(whole(SHAPE), 0, 0, 4), cut(whole(SHAPE), 0, 2, 3)]), "as many, but not once"


@pytest.mark.parametrize(
    ("sizes", "dim"),
    [((), None), ((1, 1), None), ((0, 3), None), ((5,), 0), ((1, 4, 2), 1), ((2, 1), 0)],
)
def test_the_dimension_that_can_be_cut(sizes: Sequence[int], dim: int | None) -> None:
    assert row_dimension(sizes) == dim


@pytest.mark.parametrize(("rows", "parts"), list(itertools.product((0, 1, 5, 8), (1, 2, 3, 8))))
def test_rows_are_divided_as_torch_divides_them(rows: int, parts: int) -> None:
    expected = [len(part) for part in torch.arange(rows).chunk(parts)] if rows else []
    found = [chunk_rows(rows, parts, part) for part in range(parts)]
    assert [end - begin for begin, end in found if end > begin] == [size for size in expected if size]
    assert found[-1][1] == rows or not rows


def test_scalars_have_one_element_and_boxes_are_readable() -> None:
    scalar = whole(())
    assert intersect(scalar, scalar) == scalar
    assert first_overlap([scalar, scalar]) == (0, 1)
    assert cover((), [scalar])
    assert show(Box((0, 2), (4, 4))) == "[0:4, 2:6]"
