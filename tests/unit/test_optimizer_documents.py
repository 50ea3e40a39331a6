"""The parts of saving and restoring optimizers that are plain decisions, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from engine.errors import DamagedError, StateError
from engine.restore.optimizer_matching import Group, assign, class_difference, match_names
from engine.state import optimizer_layouts as layouts
from engine.state.optimizer_document import (
    OptimizerDocument,
    merge_documents,
    parse,
    split_path,
    value_tensors,
)

Json = Any


def document(*groups: Json, **more: Any) -> Json:
    return OptimizerDocument(groups=groups, class_name="AdamW", **more).to_json()


def group(*names: str, **values: Any) -> Json:
    return {"params": list(names), **values}


def test_a_document_that_needs_nothing_new_is_one_of_the_first_version() -> None:
    assert document(group("a", lr=1)) == {"param_groups": [group("a", lr=1)], "class": "AdamW"}


def test_a_document_comes_back() -> None:
    whole = OptimizerDocument(
        groups=[group("a", lr=1)],
        class_name="SAM",
        sharded=True,
        counters={"a.n": 1},
        layouts={"a.x": {"device": "cpu"}},
        entries={"b": [1]},
        extra=[("key", 2)],
        inner={"base": document(group("a"))},
        own={"total": 3},
        own_whole=True,
    )
    assert parse("optimizer", whole.to_json()) == whole


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"param_groups": 1},
        {"param_groups": [1]},
        {"param_groups": [{"lr": 1}]},
        {"param_groups": [], "more": 1},
        {"param_groups": [], "more": {"$mapping": {"pairs": [["extra", [1]]]}}},
        {"param_groups": [], "counters": [1]},
        {"param_groups": [], "counters": [[1]]},
        {"param_groups": [{"params": "ab"}]},
    ],
)
def test_what_no_save_wrote_is_damage(value: Json) -> None:
    with pytest.raises(DamagedError, match="not those of an optimizer"):
        parse("optimizer", value)


def test_state_that_its_own_state_dict_refers_to_is_no_part_of_a_value() -> None:
    def tensor(name: str) -> Json:
        return {"$tensor": name}

    inner = document(group("a"), own={"x": tensor("o.inner.base.own.x"), "y": tensor("o.state.a.m")})
    told = document(
        group("a", lr=tensor("o.param_groups.0.lr")),
        counters={"a.h": [tensor("o.state.a.h.0")]},
        own={"slow": tensor("o.state.a.slow"), "copy": tensor("o.own.copy")},
        inner={"base": inner},
    )
    expected = ["o.param_groups.0.lr", "o.state.a.h.0", "o.own.copy", "o.inner.base.own.x"]
    assert value_tensors("o", told) == expected
    assert value_tensors("v", {"a": tensor("v.a")}) == ["v.a"]


def test_documents_of_stages_are_put_together() -> None:
    inner = [document(group(name, lr=1)) for name in "ab"]
    first = document(
        group("a", lr=1),
        group("x", lr=2),
        counters={"a.n": 1},
        layouts={"a.s": {"device": "cpu"}},
        entries={"a": 1},
        extra=[["all", 1]],
        inner={"base": inner[0]},
    )
    second = document(
        group("b", lr=1), counters={"b.n": 2}, entries={"b": 2}, extra=[["all", 1]], inner={"base": inner[1]}
    )
    assert merge_documents("optimizer", [first, second]) == document(
        group("a", "b", lr=1),
        group("x", lr=2),
        counters={"a.n": 1, "b.n": 2},
        layouts={"a.s": {"device": "cpu"}},
        entries={"a": 1, "b": 2},
        extra=[("all", 1)],
        inner={"base": document(group("a", "b", lr=1))},
    )
    assert merge_documents("optimizer", [first, first]) == first


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (document(group("a", lr=2)), "the hyperparameters of a differ between rank"),
        (document(group("b", lr=1), counters={"a.n": 2}), r"a\.n is 1 on one rank and 2"),
        (document(group("b", lr=1), extra=[["all", 2]], counters={"a.n": 1}), "its state differs"),
        (document(group("b", lr=1), own={"total": 2}), "state_dict"),
    ],
)
def test_documents_that_contradict_each_other_are_refused(other: Json, words: str) -> None:
    with pytest.raises(StateError, match=words):
        merge_documents("optimizer", [document(group("a", lr=1), counters={"a.n": 1}), other])


@pytest.mark.parametrize(
    ("live", "owner", "saved", "aliases", "expected"),
    [
        ({"w": ["m.w"]}, "m", ["w"], {}, {"w": "w"}),
        ({"w": ["m.w"]}, "m", ["m.w"], {}, {"w": "m.w"}),
        ({"m.w": ["m.w"], "t": ["t"]}, "", ["m.w", "t"], {}, {"m.w": "m.w", "t": "t"}),
        # Saved within one module, and here beside a loose tensor.
        ({"m.w": ["m.w"], "t": ["t"]}, "", ["w"], {}, {"m.w": "w"}),
        # Whose it is, is not known.
        ({"a.w": ["a.w"], "b.w": ["b.w"]}, "", ["w"], {}, {}),
        # Tied when saved.
        ({"a": ["m.a"], "b": ["m.b"]}, "m", ["a"], {"m.b": "m.a"}, {"a": "a", "b": "a"}),
        # Tied here.
        ({"a": ["m.a", "m.b"]}, "m", ["a", "b"], {}, {"a": "a"}),
        ({"w": ["m.w"]}, "m", [], {}, {}),
    ],
)
def test_which_saved_parameter_a_live_one_is(
    live: dict[str, list[str]],
    owner: str,
    saved: Sequence[str],
    aliases: dict[str, str],
    expected: dict[str, str],
) -> None:
    assert match_names(live, owner, saved, aliases) == expected


@pytest.mark.parametrize(
    ("path", "names", "expected"),
    [
        ("a.b.exp", {"a.b"}, ("a.b", "exp")),
        ("a.b.exp", {"a"}, ("a", "b.exp")),
        ("a.b.exp", {"a", "a.b"}, ("a.b", "exp")),
        ("a.b.exp", set(), ("a.b", "exp")),
    ],
)
def test_a_field_may_have_dots(path: str, names: set[str], expected: tuple[str, str]) -> None:
    assert split_path(path, names) == expected


@pytest.mark.parametrize(
    ("live", "saved", "values", "conflicts"),
    [
        # In another order.
        ([("b", 9), ("a", 9)], [("a", 1), ("b", 2)], [2, 1], []),
        # Merged: alike and not.
        ([("ab", 9)], [("a", 1), ("b", 1)], [1], []),
        ([("ab", 9)], [("a", 1), ("b", 2)], [1], ["lr of group 0 was 1 for a and 2 for b"]),
        # Split: the parts alike here, and not.
        ([("a", 9), ("b", 9)], [("ab", 1)], [1, 1], []),
        ([("a", 1), ("b", 9)], [("ab", 1)], [1, 1], ["lr of group 1 (b) is 9 here and was 1"]),
        # A third part that is not a part.
        ([("a", 1), ("c", 9)], [("a", 1), ("c", 2)], [1, 2], []),
        # Unknown when saved.
        ([("a", 9), ("z", 8)], [("a", 1)], [1, None], []),
    ],
)
def test_each_group_gets_what_its_parameters_had(
    live: list[tuple[str, int]], saved: list[tuple[str, int]], values: list[int], conflicts: list[str]
) -> None:
    def groups(told: list[tuple[str, int]]) -> list[Group]:
        return [Group(list(names), {"lr": lr, "foreach": True}) for names, lr in told]

    found = assign("optimizer", groups(live), groups(saved), lambda name: True)
    assert [group.get("lr") for group in found.values] == values
    assert all("foreach" not in group for group in found.values)
    assert len(found.conflicts) == len(conflicts)
    for line, words in zip(found.conflicts, conflicts, strict=True):
        assert words in line
        assert 'exclude=("optimizer.param_groups.lr",) keeps the live values' in line


HALF, SINGLE, DOUBLE = (torch.zeros((), dtype=d) for d in (torch.float16, torch.float32, torch.float64))


@pytest.mark.parametrize(
    ("live", "saved", "refused"),
    [
        (SINGLE, 0.25, ""),
        (SINGLE, 0.1, "torch.float32"),
        (DOUBLE, 0.1, ""),
        (HALF, 2**-30, "torch.float16"),
        (HALF, 1e5, "torch.float16"),
        (SINGLE, float("nan"), ""),
        (SINGLE, 2**24 + 1, "torch.float32"),
        (torch.tensor(3), 0.5, "torch.int64"),
        (torch.tensor(3), 7, ""),
        (torch.zeros((), dtype=torch.uint8), 300, "torch.uint8"),
        # These are not filled: the saved value takes their place.
        (torch.zeros(1), 0.1, ""),
        (0.5, 0.1, ""),
        (SINGLE, "a", ""),
    ],
)
def test_a_number_that_a_live_tensor_would_round_is_refused(live: Any, saved: Any, refused: str) -> None:
    found = assign("opt", [Group(["a"], {"lr": live})], [Group(["a"], {"lr": saved})], lambda name: True)
    if not refused:
        assert found.conflicts == []
        return
    (line,) = found.conflicts
    assert f"opt: lr of group 0 was {saved} when saved, which its {refused} tensor here would round" in line
    assert 'exclude=("opt.param_groups.lr",) keeps the live values' in line


@pytest.mark.parametrize(
    ("live", "taken", "told"),
    [
        (Group([], {"lr": 9}, ["y", "z"]), {"lr"}, "opt: group 1 keeps its live values, because y, z"),
        (Group(["a"], {"lr": 9}, ["z"]), {"lr"}, ""),  # it has those of "a"
        (Group([], {"lr": 9}), {"lr"}, ""),
        (Group([], {"lr": 9}, ["z"]), set(), ""),  # nobody wants the saved ones
        (Group([], {"foreach": True}, ["z"]), {"foreach"}, ""),
    ],
)
def test_a_group_that_keeps_its_live_values_is_told(live: Group, taken: set[str], told: str) -> None:
    saved = [Group(["a"], {"lr": 1, "foreach": False})]
    found = assign("opt", [Group(["a"], {"lr": 2}), live], saved, taken.__contains__)
    assert [note[: len(told)] for note in found.notes] == [told] * bool(told)


def test_a_group_without_parameters_takes_the_place_of_another_such_only() -> None:
    saved = [Group(["a"], {"lr": 1}), Group([], {"lr": 2})]
    found = assign("opt", [Group([], {"lr": 9}), Group(["a"], {"lr": 9})], saved, lambda name: True)
    assert found.values == [{"lr": 2}, {"lr": 1}]
    found = assign("opt", [Group([], {"lr": 9}, ["z"]), Group(["a"], {"lr": 9})], saved, lambda name: True)
    assert found.values == [{}, {"lr": 1}]


def test_a_value_that_is_left_out_is_no_conflict() -> None:
    live, saved = [Group(["a", "b"], {"lr": 9})], [Group(["a"], {"lr": 1}), Group(["b"], {"lr": 2})]
    found = assign("optimizer", live, saved, lambda name: name != "lr")
    assert (found.values, found.conflicts) == ([{}], [])


@pytest.mark.parametrize(
    ("saved", "differs"),
    [
        ({"betas": 1, "lr": 1}, False),
        ({"momentum": 0, "lr": 1}, True),
        ({"betas": 1, "momentum": 0, "lr": 1}, False),
        ({"lr": 1, "name": "mine"}, False),
    ],
)
def test_a_class_that_was_not_written_down_is_told_by_its_hyperparameters(
    saved: dict[str, Any], differs: bool
) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    told = OptimizerDocument(groups=[group("a", **saved)])
    assert bool(class_difference("optimizer", optimizer, told)) == differs


META = torch.zeros(4, 3, device="meta")
"""Stands for a parameter that is not on the CPU."""


@pytest.mark.parametrize(
    ("field", "value", "flags", "layout"),
    [
        ("exp_avg", torch.zeros(4, 3, device="meta"), {}, {}),
        ("exp_avg", torch.zeros(4, 3), {}, {"device": "cpu"}),
        ("row", torch.zeros(4, device="meta"), {}, {}),
        ("step", torch.zeros(()), {}, {}),
        ("step", torch.zeros((), device="meta"), {}, {"device": "parameter"}),
        ("step", torch.zeros((), device="meta"), {"capturable": True}, {}),
        ("step", torch.zeros((), device="meta"), {"fused": True}, {}),
        ("mu_product", torch.zeros(()), {}, {"device": "cpu"}),
    ],
)
def test_where_a_state_tensor_lies_comes_back(
    field: str, value: torch.Tensor, flags: dict[str, Any], layout: dict[str, str]
) -> None:
    assert layouts.describe(field, value, META, flags) == layout
    found = layouts.allocate(torch.float32, tuple(value.shape), field, META, flags, layout)
    assert (found.device, found.shape, found.dtype) == (value.device, value.shape, value.dtype)


def test_a_live_optimizer_that_counts_on_the_device_gets_its_counts_there() -> None:
    found = layouts.allocate(torch.float32, (), "step", META, {"capturable": True}, {"device": "cpu"})
    assert found.device.type == "meta"
