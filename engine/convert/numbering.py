"""Assigns names to the parameters of an optimizer that only numbers them. Pure.

`Optimizer.state_dict()` numbers parameters by their position over all groups, without their names. The
numbers are used only if a single assignment is possible: a wrong one that matches every shape would swap
moments between layers without an error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.convert.state_tree import TensorRef
from engine.errors import StateError

Shape = tuple[int, ...]

_MOST_GROUPS = 4
"""Up to this many groups, all orders are tried; above it, only the given one."""

_BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked", "inv_freq", "masked_bias"})


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter's shape in the source and here: the same or transposed.

    is_buffer: its name or type shows that no optimizer has it.
    """

    stored: Shape
    ours: Shape
    transposed: bool = False
    is_buffer: bool = False


Parameters = Mapping[str, Parameter]
"""By our names, in the module's order if that is known."""


def is_buffer(name: str, dtype: str) -> bool:
    """Whether name or dtype show that a tensor of a state dict is not a parameter."""
    return name.rpartition(".")[2] in _BUFFERS or dtype[:1] not in ("F", "B", "C") or dtype == "BOOL"


def numbers_parameters(optimizer: Mapping[str, Any]) -> bool:
    """Whether an optimizer's groups number their parameters without recording names."""
    groups = optimizer["param_groups"]
    return not any("param_names" in g or isinstance(key, str) for g in groups for key in g["params"])


def order_decides(optimizer: Mapping[str, Any], parameters: Parameters) -> bool:
    """Whether only the order of the numbers tells which moments belong to which parameter."""
    keys = [key for group in optimizer["param_groups"] for key in group["params"]]
    shapes = {key: _moments(optimizer["state"].get(key)) for key in keys}
    return any(shapes.values()) and _by_shape(shapes, parameters) is None


def numbered(optimizer: Mapping[str, Any], parameters: Parameters, *, in_order: bool) -> dict[Any, str]:
    """The parameter's name for each number. StateError if it is ambiguous.

    in_order: `parameters` are in the module's order, which torch.save keeps and safetensors does not.
    """
    groups = [list(group["params"]) for group in optimizer["param_groups"]]
    keys = [key for group in groups for key in group]
    shapes = {key: _moments(optimizer["state"].get(key)) for key in keys}
    orders = _orders(parameters, [len(group) for group in groups]) if in_order else iter(())
    fits = []
    for order in orders:
        names = dict(zip(keys, order, strict=True))
        if names not in fits and all(_fit(shapes[key], parameters[names[key]]) for key in keys):
            fits.append(names)
    if len(fits) == 1:
        return fits[0]
    by_shape = _by_shape(shapes, parameters)
    if by_shape is not None:
        return by_shape
    if fits:
        raise StateError(
            f"its {len(groups)} groups of numbered parameters match the model's in {len(fits)} ways, and "
            "nothing tells which is right"
        )
    if not in_order:
        raise StateError(
            f"it numbers its {len(keys)} parameters, several have the same shape, and its format does not "
            "keep their order: save the model with torch.save (Accelerate: safe_serialization=False)"
        )
    raise StateError(
        f"its {len(keys)} numbered parameters do not match the model's {len(parameters)}, neither in the "
        "model's order nor with matrices before vectors"
    )


def _orders(parameters: Parameters, sizes: Sequence[int]) -> Iterator[list[str]]:
    """Orders in which scripts number parameters: the module's, and matrices separate from vectors.

    With several groups, also every order of the groups along the module.
    """
    names = list(parameters)
    trained = [name for name in names if not parameters[name].is_buffer]
    for some in (names, trained):
        if len(some) != sum(sizes):
            continue
        matrices = [name for name in some if len(parameters[name].stored) >= 2]
        vectors = [name for name in some if len(parameters[name].stored) < 2]
        if list(sizes) == [len(matrices), len(vectors)]:
            yield matrices + vectors
        if list(sizes) == [len(vectors), len(matrices)]:
            yield vectors + matrices
        for order in _group_orders(len(sizes)):
            blocks: dict[int, list[str]] = {}
            begin = 0
            for group in order:
                blocks[group] = some[begin : begin + sizes[group]]
                begin += sizes[group]
            yield [name for group in range(len(sizes)) for name in blocks[group]]


def _group_orders(count: int) -> Iterator[tuple[int, ...]]:
    if count > _MOST_GROUPS:
        return iter([tuple(range(count))])
    return itertools.permutations(range(count))


def _by_shape(shapes: Mapping[Any, set[Shape] | None], parameters: Parameters) -> dict[Any, str] | None:
    """The names, if each number's moments have a shape that only one parameter has; else None."""
    owners: dict[Shape, list[str]] = {}
    trained = {name: parameter for name, parameter in parameters.items() if not parameter.is_buffer}
    for name, parameter in trained.items():
        owners.setdefault(parameter.stored, []).append(name)
    names = {}
    for key, found in shapes.items():
        own = owners.get(next(iter(found)), []) if found is not None and len(found) == 1 else []
        if len(own) != 1:
            return None
        names[key] = own[0]
    return names if len(set(names.values())) == len(names) else None


def _moments(entry: Any) -> set[Shape] | None:
    """The shapes of a parameter's state, without single numbers; None if there are none."""
    values = entry.values() if isinstance(entry, Mapping) else ()
    shapes = {value.info.shape for value in values if isinstance(value, TensorRef)}
    return {shape for shape in shapes if math.prod(shape) != 1} or None


def _fit(found: set[Shape] | None, parameter: Parameter) -> bool:
    return found is None or found == {parameter.stored}
