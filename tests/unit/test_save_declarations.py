"""Keys that the ranks declare differently, as a table."""

from __future__ import annotations

import pytest

from engine.save.declarations import conflict, declarations, mixed_read_only

SHARED = declarations(["loader", "model"], (), ())
PER_RANK = declarations(["loader", "model"], ("loader",), ())
RANK0 = declarations(["loader", "model"], (), ("loader",))
WITHOUT = declarations(["model"], (), ())


@pytest.mark.parametrize(
    "by_rank",
    [
        [SHARED],
        [RANK0],
        [SHARED, SHARED],
        [PER_RANK, PER_RANK],
        [RANK0, RANK0],
        [WITHOUT, PER_RANK],
        [WITHOUT, SHARED, WITHOUT],
        [RANK0, WITHOUT],
    ],
)
def test_ranks_that_declare_a_key_alike_agree(by_rank: list[dict[str, str]]) -> None:
    assert conflict(by_rank) == ""


@pytest.mark.parametrize(
    ("by_rank", "words"),
    [
        ([SHARED, PER_RANK], "rank 0 has it in neither per_rank nor rank0, rank 1 in per_rank"),
        ([PER_RANK, PER_RANK, SHARED], "rank 0 has it in per_rank, rank 2 in neither"),
        ([WITHOUT, PER_RANK, SHARED], "rank 1 has it in per_rank, rank 2 in neither"),
        ([SHARED, RANK0], "rank 1 in rank0"),
        ([RANK0, PER_RANK], "rank 0 has it in rank0, rank 1 in per_rank"),
        ([WITHOUT, RANK0], "in rank0 on rank 1, and rank 0 does not have it"),
    ],
)
def test_a_key_that_ranks_declare_differently_is_named(by_rank: list[dict[str, str]], words: str) -> None:
    found = conflict(by_rank)
    assert "'loader'" in found
    assert words in found


@pytest.mark.parametrize("by_rank", [[True], [False], [True, True, True], [False, False]])
def test_ranks_are_read_only_together(by_rank: list[bool]) -> None:
    assert mixed_read_only(by_rank) == ""


@pytest.mark.parametrize(
    ("by_rank", "words"),
    [
        ([True, False, False], "True on rank 0 and False on rank 1"),
        ([False, False, True], "True on rank 2 and False on rank 0"),
    ],
)
def test_a_rank_that_alone_is_read_only_is_named(by_rank: list[bool], words: str) -> None:
    assert words in mixed_read_only(by_rank)
