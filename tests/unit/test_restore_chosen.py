"""Names that a rank has no place for are an error when no rank has one."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import LateRanksError
from engine.ranks.coordination import Channel
from engine.restore.chosen import nowhere, unexpected_on_all
from tests.support.channels import ImpatientStore, on_ranks


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ([], set()),
        ([["a", "b"]], {"a", "b"}),
        ([["a", "b"], ["b", "c"]], {"b"}),
        ([["a"], []], set()),
        ([["a"], ["a"], ["a", "b"]], {"a"}),
    ],
)
def test_nowhere(lists: list[list[str]], found: set[str]) -> None:
    assert nowhere(lists) == found


def test_all_ranks_hear_of_it_and_one_that_has_failed_counts_for_nothing() -> None:
    mine: list[Any] = [("a", "b"), None, ("b",)]
    found = on_ranks(3, lambda channel: unexpected_on_all(channel, "k", mine[channel.rank], 30, "it"))
    assert found == [{"b"}] * 3


def test_a_late_rank_leaves_nobody_waiting() -> None:
    store = ImpatientStore()
    Channel(1, 3, store).gather("k/unexpected", b"[]", 0)
    for rank in (0, 1, 2):  # the late one hears of it, too, when it comes
        with pytest.raises(LateRanksError, match="rank 2 did not report within 7 s in the restore"):
            unexpected_on_all(Channel(rank, 3, store, store.clock), "k", (), 7, "the restore")
