"""Whose state is whose, when an optimizer only numbers its parameters. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from engine.convert.optimizer import Parameters, StateTensor, optimizer_parts
from engine.convert.recognise import canonical_name
from engine.convert.state_tree import TensorRef
from engine.errors import StateError
from engine.format.manifest import TensorInfo

MODEL: Parameters = {
    "a.weight": ((4, 2), (4, 2)),
    "a.bias": ((4,), (4,)),
    "b.weight": ((2, 4), (4, 2)),  # stored as the transpose of ours
    "b.bias": ((2,), (2,)),
}


def ref(*shape: int) -> TensorRef:
    return TensorRef("x", TensorInfo("F32", shape))


def saved(*shapes: tuple[int, ...], groups: tuple[int, ...] = (4,), **more: Any) -> dict[str, Any]:
    """An optimizer's state dict: one moment per parameter, in the order of its numbers."""
    numbers = list(range(len(shapes)))
    cut, param_groups = 0, []
    for size in groups:
        param_groups.append({"lr": 0.1, "betas": (0.9, 0.95), **more, "params": numbers[cut : cut + size]})
        cut += size
    state = {n: {"exp_avg": ref(*shape), "step": ref()} for n, shape in enumerate(shapes)}
    return {"state": state, "param_groups": param_groups}


def names(optimizer: dict[str, Any], parameters: Parameters = MODEL) -> list[list[str]]:
    found = optimizer_parts(optimizer, parameters, lambda ref: 7.0)
    return [group["params"] for group in found.document["param_groups"]]


def test_the_models_own_order() -> None:
    assert names(saved((4, 2), (4,), (2, 4), (2,))) == [["a.weight", "a.bias", "b.weight", "b.bias"]]


def test_matrices_before_vectors() -> None:
    optimizer = saved((4, 2), (2, 4), (4,), (2,), groups=(2, 2))
    assert names(optimizer) == [["a.weight", "b.weight"], ["a.bias", "b.bias"]]


def test_recorded_names_win() -> None:
    optimizer = saved((2,), (4,), (2, 4), (4, 2))
    optimizer["param_groups"][0]["param_names"] = ["_orig_mod.b.bias", "a.bias", "b.weight", "a.weight"]
    assert names(optimizer) == [["b.bias", "a.bias", "b.weight", "a.weight"]]


def test_names_are_taken_as_they_are() -> None:
    optimizer = {
        "state": {"module.a.bias": {"exp_avg": ref(4), "step": 3}},
        "param_groups": [{"lr": ref(), "params": ["module.a.bias"], "odd": object()}],
    }
    found = optimizer_parts(optimizer, MODEL, lambda ref: 7.0)
    assert found.document == {"param_groups": [{"lr": 7.0, "params": ["a.bias"]}]}
    assert found.tensors["a.bias.step"] == StateTensor(TensorInfo("F32", ()), number=3.0)


def test_state_of_a_transposed_parameter_is_transposed() -> None:
    found = optimizer_parts(saved((4, 2), (4,), (2, 4), (2,)), MODEL, lambda ref: 0.0)
    moment = found.tensors["b.weight.exp_avg"]
    assert (moment.transposed, moment.info.shape) == (True, (4, 2))
    assert not found.tensors["a.weight.exp_avg"].transposed


def test_parameters_without_state_are_fine() -> None:
    optimizer = saved((4, 2), (4,), (2, 4), (2,))
    del optimizer["state"][2]
    assert "b.weight.exp_avg" not in optimizer_parts(optimizer, MODEL, lambda ref: 0.0).tensors


def test_counters_that_are_no_tensors_are_kept() -> None:
    optimizer = saved((4, 2), (4,), (2, 4), (2,))
    optimizer["state"][1]["kind"] = "x"
    found = optimizer_parts(optimizer, MODEL, lambda ref: 0.0)
    assert found.document["counters"] == {"a.bias.kind": "x"}


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (saved((4, 2), (4,), (2, 4)), "do not fit the model's 4"),
        (saved((4,), (4, 2), (2, 4), (2,)), "neither in the model's order nor"),
        ({"state": {}, "param_groups": [{"params": ["c"]}]}, "lacks 1 of its parameters, 'c' first"),
        ({"state": {}, "param_groups": [{"params": [0, 0]}]}, "each of their parameters once"),
        ({"state": {}, "param_groups": [{"params": [None]}]}, "each of their parameters once"),
        ({"state": {"b": {}}, "param_groups": [{"params": ["a.bias"]}]}, "in none of its groups"),
    ],
)
def test_what_cannot_be_told_is_refused(optimizer: dict[str, Any], words: str) -> None:
    with pytest.raises(StateError, match=words):
        names(optimizer)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("_orig_mod.transformer.wte.weight", "transformer.wte.weight"),
        ("module.module.a", "a"),
        ("h.0._checkpoint_wrapped_module.x", "h.0.x"),
        ("a.module.b", "a.module.b"),
        ("module", "module"),
    ],
)
def test_names_without_wrappers(given: str, wanted: str) -> None:
    assert canonical_name(given) == wanted
