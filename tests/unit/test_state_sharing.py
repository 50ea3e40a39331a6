"""Which boxes ranks share, and what follows for each, as tables."""

from __future__ import annotations

from typing import Any

import pytest

from engine.format.layout import Chunk
from engine.save.division import divide
from engine.state.sharing import (
    SMALL,
    Offer,
    groups_to_compare,
    one_sided_state,
    shared_boxes,
    union_of_values,
)
from tests.support.boxes import shards, whole


@pytest.mark.parametrize(
    ("digests", "differing", "buffer", "kept"),
    [
        ([SMALL, SMALL], (), True, True),
        (["x", "x"], (), True, False),
        (["x", "y"], (), True, True),
        (["x", "x"], ("b",), True, True),
        (["x", None], (), False, False),  # a parameter on rank 1
    ],
)
def test_a_buffer_that_two_ranks_hold(
    digests: list[str | None], differing: tuple[str, ...], buffer: bool, kept: bool
) -> None:
    chunk = whole("b", 5)
    offers = [Offer([chunk], {} if digest is None else {0: digest}) for digest in digests]
    shared = shared_boxes(offers, differing)
    assert (shared[chunk].buffer, shared[chunk].kept) == (buffer, kept)
    assert bool(groups_to_compare(shared)) is not kept, "what is each rank's own is not compared"
    names = [[part.chunk.name for part in parts] for parts in divide([[chunk], [chunk]], shared)]
    if kept:
        assert names == [["b"], ["per_rank.00001.b"]]
    elif buffer:
        assert names == [["b"], []], "whole, from the lowest rank"
    else:
        assert all(names), "divided by rows: it has to be equal"


def test_a_shard_of_a_buffer_is_no_rank_s_own() -> None:
    """The replicate dimension of a mesh: no rank holds all of it."""
    first, second = shards("b", (4,), 2)
    offers = [Offer([chunk], {0: SMALL}) for chunk in (first, second, first, second)]
    shared = shared_boxes(offers)
    assert not any(item.buffer for item in shared.values())
    assert [group.ranks for group in groups_to_compare(shared)] == [(0, 2), (1, 3)]


def test_what_one_rank_holds_alone_is_not_compared() -> None:
    assert shared_boxes([Offer([whole("a", 2)]), Offer([whole("b", 2)])]) == {}


def test_groups_are_the_same_whatever_the_order_of_the_offers() -> None:
    chunks: list[Chunk] = [whole("a", 2), whole("b", 2), *shards("c", (4,), 2)]
    one = groups_to_compare(shared_boxes([Offer(chunks), Offer(chunks)]))
    two = groups_to_compare(shared_boxes([Offer(chunks[::-1]), Offer(chunks[::-1])]))
    assert [[item.chunk for item in group.boxes] for group in one] == [chunks]
    assert [[item.chunk for item in group.boxes] for group in two] == [chunks]


@pytest.mark.parametrize(
    ("documents", "union"),
    [
        ([{"a": 1}, {"a": 2, "b": 3}], {"a": 1, "b": 3}),
        ([{"_absent_buffers": ["x"]}, {"_absent_buffers": ["x", "y"]}], {"_absent_buffers": ["x", "y"]}),
        ([{"_update_counts": {"m": 1}}, {"_update_counts": {"n": 2}}], {"_update_counts": {"m": 1, "n": 2}}),
        ([{"$items": [[1, 2]]}, {"a": 1}], {"$items": [[1, 2]]}),
    ],
)
def test_values_of_modules(documents: list[Any], union: Any) -> None:
    assert union_of_values(documents) == union


def test_state_that_a_holder_of_the_parameter_lacks_is_named() -> None:
    with_state = Offer([whole("o.state.a.exp_avg", 2), whole("o.state.a.step", 1), whole("m.a", 2)])
    without = Offer([whole("m.a", 2)], stateless=["o.state.a", "o.state.b"])
    (line,) = one_sided_state([with_state, without, without])
    assert line == "o.state.a exists on rank 0 but not on rank 1"
    assert one_sided_state([without, without]) == []
    elsewhere = Offer([whole("m.b", 2)])  # a pipeline stage that has other parameters
    assert one_sided_state([with_state, elsewhere]) == []
