"""Whose state is whose, when an optimizer only numbers its parameters. Pure."""

from __future__ import annotations

from typing import Any

import pytest

from engine.convert.flattened import nested_optimizer
from engine.convert.foreign_optimizer import StateTensor, optimizer_parts, steps_of
from engine.convert.numbering import Parameter, Parameters
from engine.convert.parameter_names import Names, shared_names
from engine.convert.state_tree import TensorRef
from engine.errors import StateError
from engine.format.manifest import TensorInfo

MODEL: Parameters = {
    "a.weight": Parameter((4, 2), (4, 2)),
    "a.bias": Parameter((4,), (4,)),
    "b.weight": Parameter((2, 4), (4, 2), transposed=True),
    "b.bias": Parameter((2,), (2,)),
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
    """Over the order of the numbers: all shapes are equal here."""
    optimizer = saved(*((3, 3),) * 4)
    optimizer["param_groups"][0]["param_names"] = ["_orig_mod.d", "b", "a", "c"]
    assert names(optimizer, EQUAL) == [["d", "b", "a", "c"]]


def test_names_are_taken_as_they_are() -> None:
    optimizer = {
        "state": {"module.a.bias": {"exp_avg": ref(4), "step": 3}},
        "param_groups": [{"lr": ref(), "params": ["module.a.bias"], "odd": object()}],
    }
    found = optimizer_parts(optimizer, MODEL, lambda ref: 7.0, names=Names(prefix="module."))
    assert found.document == {"param_groups": [{"lr": 7.0, "params": ["a.bias"]}]}
    assert found.left_out == ("param_groups.0.odd",)
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
        (saved((4, 2), (4, 2), (2, 4)), "do not match the model's 4"),
        (saved((4, 2), (4,), (2, 4), (3,)), "neither in the model's order nor"),
        ({"state": {}, "param_groups": [{"params": ["c"]}]}, "lacks 1 of its parameters, 'c' first"),
        ({"state": {}, "param_groups": [{"params": [0, 0]}]}, "do not list each parameter exactly once"),
        ({"state": {}, "param_groups": [{"params": [None]}]}, "do not list each parameter exactly once"),
        ({"state": {"b": {}}, "param_groups": [{"params": ["a.bias"]}]}, "in none of its groups"),
    ],
)
def test_what_cannot_be_told_is_refused(optimizer: dict[str, Any], words: str) -> None:
    with pytest.raises(StateError, match=words):
        names(optimizer)


def test_moments_of_a_transposed_square_matrix_are_transposed() -> None:
    """Its shape does not tell: a GPT-2 of transformers has c_proj so."""
    square: Parameters = {"w": Parameter((3, 3), (3, 3), transposed=True)}
    found = optimizer_parts(saved((3, 3), groups=(1,)), square, lambda ref: 0.0)
    assert found.tensors["w.exp_avg"].transposed


def test_factors_of_a_transposed_parameter_are_refused() -> None:
    """Adafactor's row and column would have to change places, which their shapes do not tell."""
    state = {"w": {"exp_avg_sq_row": ref(2), "step": ref()}}
    optimizer = {"state": state, "param_groups": [{"params": ["w"]}]}
    with pytest.raises(StateError, match="the exp_avg_sq_row of w cannot be transposed"):
        optimizer_parts(optimizer, {"w": Parameter((2, 4), (4, 2), transposed=True)}, lambda ref: 0.0)


EQUAL: Parameters = {name: Parameter((3, 3), (3, 3)) for name in ("a", "b", "c", "d")}


def test_groups_of_equal_shapes_could_be_any_part_of_the_model() -> None:
    """A script may put the head's group first: nothing in the file would tell."""
    four = ((3, 3),) * 4
    with pytest.raises(StateError, match="2 groups of numbered parameters match the model's in 2 ways"):
        names(saved(*four, groups=(2, 2)), EQUAL)
    assert names(saved(*four, groups=(4,)), EQUAL) == [["a", "b", "c", "d"]]


def test_one_number_that_could_be_any_of_several_is_not_given_to_the_first() -> None:
    with pytest.raises(StateError, match="do not match the model's 4"):
        names(saved((3, 3), groups=(1,)), EQUAL)


def test_a_group_order_that_only_one_way_fits_is_found() -> None:
    parts: Parameters = {"body": Parameter((4, 4), (4, 4)), "head": Parameter((2, 4), (2, 4))}
    assert names(saved((2, 4), (4, 4), groups=(1, 1)), parts) == [["head"], ["body"]]


def test_without_the_order_only_shapes_that_differ_tell() -> None:
    """safetensors sorts names: layers.10 stands before layers.2 there."""
    found = optimizer_parts(saved((4,), (4, 2), (2,), (2, 4)), MODEL, lambda ref: 0.0, in_order=False)
    assert found.document["param_groups"][0]["params"] == ["a.bias", "a.weight", "b.bias", "b.weight"]
    with pytest.raises(StateError, match="does not keep their order"):
        optimizer_parts(saved(*((3, 3),) * 4), EQUAL, lambda ref: 0.0, in_order=False)


def test_buffers_have_no_number() -> None:
    model = {"w": Parameter((2, 2), (2, 2)), "mean": Parameter((2, 2), (2, 2), is_buffer=True)}
    model["v"] = Parameter((2, 2), (2, 2))
    assert names(saved((2, 2), (2, 2), groups=(2,)), model) == [["w", "v"]]


def test_numbers_that_became_text_are_numbers() -> None:
    optimizer = saved((4, 2), (4,), (2, 4), (2,))
    optimizer["state"] = {str(key): value for key, value in optimizer["state"].items()}
    found = optimizer_parts(optimizer, MODEL, lambda ref: 0.0)
    assert found.tensors["a.weight.exp_avg"].ref is optimizer["state"]["0"]["exp_avg"]


@pytest.mark.parametrize(
    ("steps", "wanted"), [([5, 5.0], 5), ([5, 6], None), ([5, "x"], None), ([], None), ([ref(), 7], 7)]
)
def test_steps_are_what_all_parameters_count(steps: list[Any], wanted: int | None) -> None:
    state = {number: {"step": step} for number, step in enumerate(steps)}
    assert steps_of({"state": state}, lambda ref: 7.0) == wanted


@pytest.mark.parametrize(
    ("given", "wanted", "prefix"),
    [
        (("model.a.w", "model.b"), ("a.w", "b"), "model."),
        (("model.model.a.w", "model.model.b"), ("a.w", "b"), "model.model."),
        (("net._forward_module.a.w", "net._forward_module.b"), ("a.w", "b"), "net."),
        (("_orig_mod.a", "_orig_mod.b"), ("a", "b"), ""),
        (("module.module.a", "module.module.b"), ("a", "b"), "module.module."),
        (("h.0._checkpoint_wrapped_module.x", "y"), ("h.0.x", "y"), ""),
        (("a._orig_mod", "b"), ("a._orig_mod", "b"), ""),  # the name itself, and no part of a wrapper
        (("model.a", "head.b"), ("model.a", "head.b"), ""),  # not shared by all
        (("a.module.b", "a.module.c"), ("a.module.b", "a.module.c"), ""),  # somebody's own part
        (("layers.0", "layers.1"), ("layers.0", "layers.1"), ""),
        (("module",), ("module",), ""),
        (
            ("lm.transformer.wte.weight", "lm.lm_head.weight"),
            ("transformer.wte.weight", "lm_head.weight"),
            "lm.",
        ),
        (("transformer.wte.weight", "transformer.x"), ("transformer.wte.weight", "transformer.x"), ""),
    ],
)
def test_names_without_wrappers(given: tuple[str, ...], wanted: tuple[str, ...], prefix: str) -> None:
    names = shared_names(given)
    assert tuple(map(names.of, given)) == wanted
    assert names.prefix == prefix
    assert bool(names.notes) == (given != wanted)


def test_a_flattened_optimizers_nested_state_stays_with_its_parameter() -> None:
    """Shampoo's state is a dict in a dict: where the parameter's name ends, only the model tells."""
    flat = {
        "state.module.a.weight.blocks.0": 1.0,
        "state.module.a.step": 2,
        "param_groups.module.a.weight.lr": 0.5,
        "param_groups.module.a.lr": ref(),
    }
    found = nested_optimizer(flat, Names(prefix="module."), {"a.weight", "a"}, lambda ref: 0.5)
    assert found == {
        "state": {"module.a.weight": {"blocks.0": 1.0}, "module.a": {"step": 2}},
        "param_groups": [{"lr": 0.5, "params": ["module.a.weight", "module.a"]}],
    }
    assert nested_optimizer({"state.a.step": 1}, Names(), {"a"}, lambda ref: 0.5) is None
