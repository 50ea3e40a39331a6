"""One value for each state key from all ranks' values, which are asked for only if needed."""

from __future__ import annotations

from typing import Any

import pytest

from engine.ranks.coordination import Channel
from engine.save.shared_values import ASKING, answer, ask, first_difference, merge, values_to_ask
from engine.state.optimizer_document import merge_documents
from tests.support.channels import MemoryStore, on_ranks


@pytest.mark.parametrize(
    ("shared", "wanted"),
    [
        ([{"a": "1"}, {"a": "1"}], {}),
        ([{}, {}], {}),
        ([{"a": "1"}, {"a": "2"}], {0: ["a"], 1: ["a"]}),
        ([{"a": "1"}, {"a": "2"}, {"a": "1"}, {"a": "2"}], {0: ["a"], 1: ["a"]}),
        ([{"a": "1"}, {}], {}),
        ([{}, {"a": "1"}, {"a": "1"}], {1: ["a"]}),
        ([{"a": "1", "b": "1"}, {"a": "2", "b": "1"}], {0: ["a"], 1: ["a"]}),
    ],
)
def test_one_rank_of_each_digest_is_asked(shared: list[dict[str, str]], wanted: dict[int, list[str]]) -> None:
    assert values_to_ask(shared) == wanted


def test_values_reach_rank_0_and_nothing_is_left_in_the_store() -> None:
    store = MemoryStore()

    def work(channel: Channel) -> Any:
        objects = {"a": channel.rank, "b": [channel.rank]}
        if channel.rank == 0:
            return ask(
                channel,
                "save/1",
                {0: ["a"], 2: ["a", "b"]},
                answer(ASKING + b'{"0":["a"]}', 0, {}, objects),
                30,
            )
        wanted = channel.broadcast("save/1/outcome", None, 30)
        assert wanted.startswith(ASKING)
        channel.gather("save/1/values", answer(wanted, channel.rank, {"b": "module"}, objects), 0)
        return None

    told, *_ = on_ranks(3, work, store)
    assert told == [{"a": ("value", 0)}, {}, {"a": ("value", 2), "b": ("module", [2])}]
    assert store.values == {}


def group(*names: str, **values: Any) -> dict[str, Any]:
    return {**values, "params": list(names)}


@pytest.mark.parametrize(
    ("kind", "given", "merged"),
    [
        ("value", [{"n": 1}, {"n": 1}], {"n": 1}),
        ("module", [{"a": 1, "b": 2}, {"b": 3, "c": 4}], {"a": 1, "b": 2, "c": 4}),
        (
            "optimizer",
            [
                {"param_groups": [group("a", lr=1), group("b", lr=2)], "counters": {"a.n": 1}},
                {"param_groups": [group("c", lr=1), group("b", lr=2)], "counters": {"c.n": 2}},
            ],
            {
                "param_groups": [group("a", "c", lr=1), group("b", lr=2)],
                "counters": {"a.n": 1, "c.n": 2},
            },
        ),
    ],
)
def test_what_goes_together(kind: Any, given: list[Any], merged: Any) -> None:
    told = [{"k": (kind, value)} for value in given]
    found, problems = merge({"k": given[0], "other": 5}, told, merge_documents)
    assert found == {"k": merged, "other": 5}
    assert problems == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            [("value", {"n": [1, {"x": 2}]}), ("value", {"n": [1, {"x": 3}]})],
            "k.n[1].x differs on rank 1: 3 there, 2 on rank 0",
        ),
        ([("value", {"n": 1}), ("value", {})], "k.n differs on rank 1: nothing there, 1 on rank 0"),
        ([("value", 1), ("value", 1.0)], "k differs on rank 1: 1.0 there, 1 on rank 0"),
        ([("value", [1]), ("value", [1, 2])], "k differs on rank 1: [1, 2] there, [1] on rank 0"),
        ([("value", 1), ("module", {})], "k is a value on rank 0 and a module on rank 1"),
        (
            [
                ("optimizer", {"param_groups": [group("a", lr=1)]}),
                ("optimizer", {"param_groups": [group("a", lr=2)]}),
            ],
            "k.param_groups[0].lr differs on rank 1: 2 there, 1 on rank 0",
        ),
        (
            [
                ("optimizer", {"param_groups": [group("a", lr=1)]}),
                ("optimizer", {"param_groups": [group("a", "b", lr=2)]}),
            ],
            "k: the hyperparameters of a ",
        ),
    ],
)
def test_what_does_not(given: list[tuple[Any, Any]], words: str) -> None:
    _, (problem,) = merge({}, [{"k": one} for one in given], merge_documents)
    assert problem.startswith(words)


def test_the_first_difference_of_equal_values_is_none() -> None:
    value = {"a": [1, None, {"$tensor": "a.0"}], "b": {"c": "x"}}
    assert first_difference("p", value, value) == ("", None, None)
