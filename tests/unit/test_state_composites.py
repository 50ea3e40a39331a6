"""Tensors made of tensors: what is stored, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from engine.errors import DamagedError, StateMismatchError, UnsavableValueError
from engine.format.forms import version_needed
from engine.state import values
from engine.state.composites import is_composite, parts_of


def two(begin: int) -> TwoTensor:
    return TwoTensor(torch.arange(begin, begin + 4.0), torch.arange(begin, begin + 4.0).neg())


def stored() -> tuple[Any, dict[str, torch.Tensor]]:
    tensors: dict[str, torch.Tensor] = {}
    return values.encode({"moment": two(3)}, "optimizer", tensors), tensors


def test_the_parts_are_tensors_of_the_checkpoint_and_the_class_is_named() -> None:
    document, tensors = stored()
    assert sorted(tensors) == ["optimizer.moment.a", "optimizer.moment.b"]
    assert version_needed(document) == 2
    assert values.tensor_names(document) == ["optimizer.moment.a", "optimizer.moment.b"]
    back = values.decode(document, tensors.__getitem__)["moment"]
    assert type(back) is TwoTensor
    assert torch.equal(back.a, torch.arange(3, 7.0))
    assert torch.equal(back.b, -torch.arange(3, 7.0))
    assert back.shape == (4,)


def test_a_composite_tensor_may_be_made_of_composite_tensors() -> None:
    tensors: dict[str, torch.Tensor] = {}
    document = values.encode(TwoTensor(two(0), two(8)), "x", tensors)
    assert sorted(tensors) == ["x.a.a", "x.a.b", "x.b.a", "x.b.b"]
    back = values.decode(document, tensors.__getitem__)
    assert torch.equal(back.b.a, torch.arange(8, 12.0))


def test_plain_tensors_are_not_composite() -> None:
    assert is_composite(two(0))
    assert list(parts_of(two(0))) == ["a", "b"]
    assert not is_composite(torch.ones(2))
    assert not is_composite(torch.nn.Parameter(torch.ones(2)))
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    assert not is_composite(nested)


def test_a_class_that_no_other_process_could_find_is_refused_at_save() -> None:
    class Hidden(TwoTensor):
        pass

    hidden = Hidden(torch.ones(2), torch.ones(2))
    with pytest.raises(UnsavableValueError, match=r"x\.y: the class .*Hidden is not found"):
        values.encode({"y": hidden}, "x", {})


def test_a_class_that_is_not_here_is_said_before_anything_is_read() -> None:
    document, tensors = stored()
    document["moment"]["$composite"]["type"] = "torchao.future:Int3Tensor"
    (line,) = values.missing_classes(document)
    assert "Int3Tensor" in line
    assert "torchao.future" in line
    with pytest.raises(StateMismatchError, match="import that module before restoring"):
        values.decode(document, tensors.__getitem__)


class Trap:
    """What a forged checkpoint might name: no tensor, and yet it has the method."""

    @staticmethod
    def __tensor_unflatten__(*_: Any) -> torch.Tensor:
        pytest.fail("it was called")


@pytest.mark.parametrize(
    "kind", ["builtins:dict", "os:system", "torch:Tensor", "torch.nn:Linear", f"{__name__}:Trap"]
)
def test_only_tensor_classes_are_ever_called(kind: str) -> None:
    document, tensors = stored()
    document["moment"]["$composite"]["type"] = kind
    with pytest.raises(StateMismatchError):
        values.decode(document, tensors.__getitem__)


@pytest.mark.parametrize(
    "changed",
    [
        {"parts": {}},
        {"parts": {"a": 1, "b": 2}},
        {"shape": ["4"]},
        {"stride": [-1]},
        {"type": 7},
        {"more": 1},
    ],
    ids=str,
)
def test_a_forged_form_is_damage(changed: dict[str, Any]) -> None:
    document, tensors = stored()
    document["moment"]["$composite"].update(changed)
    with pytest.raises(DamagedError):
        values.decode(document, tensors.__getitem__)


def test_parts_that_the_class_does_not_take_are_said_in_words() -> None:
    document, tensors = stored()
    del document["moment"]["$composite"]["parts"]["b"]
    with pytest.raises(StateMismatchError, match="does not accept its parts"):
        values.decode(document, tensors.__getitem__)
