"""A foreign optimizer's state under our names: parameters by number become parameters by name. Pure.

`Optimizer.state_dict()` numbers parameters by their position over all groups, and does not say which they
are. Two orders are usual: the model's own, and the model's matrices before its vectors (weight decay). The
one that fits every shape is taken; if none does, there is no telling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.convert.recognise import canonical_name
from engine.convert.state_tree import TensorRef
from engine.errors import StateError
from engine.format.manifest import TensorInfo

Shape = tuple[int, ...]

Parameters = Mapping[str, tuple[Shape, Shape]]
"""Our parameter name -> (shape in the source, shape here, which may be its transpose), in source order."""


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of the state: from the source, possibly to be transposed, or a plain number."""

    info: TensorInfo
    ref: TensorRef | None = None
    transposed: bool = False
    number: float = 0.0


@dataclass(frozen=True, slots=True)
class OptimizerParts:
    """tensors: "<parameter>.<field>" -> tensor. document: groups and counters, as capturing gives them."""

    tensors: Mapping[str, StateTensor]
    document: Mapping[str, Any]


@dataclass(slots=True)
class _Sorted:
    tensors: dict[str, StateTensor] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)


def optimizer_parts(
    optimizer: Mapping[str, Any], parameters: Parameters, scalar: Callable[[TensorRef], float]
) -> OptimizerParts:
    """Sort a saved optimizer.

    Args:
        optimizer: "state" and "param_groups", keyed by number or by name.
        scalar: the value of a tensor of one element.
    Raises: StateError when its parameters cannot be told or are not the model's.
    """
    names = _names(optimizer, parameters)
    groups = []
    for group in optimizer["param_groups"]:
        values = {
            str(key): scalar(value) if isinstance(value, TensorRef) else value
            for key, value in group.items()
            if key not in ("params", "param_names") and _fits(value)
        }
        groups.append({**values, "params": [names[param] for param in group["params"]]})
    found = _Sorted()
    for key, entry in optimizer["state"].items():
        if key not in names or not isinstance(entry, Mapping):
            raise StateError(f"its state names {str(key)[:80]!r}, which is in none of its groups")
        for field_name, value in entry.items():
            _sort(found, names[key], str(field_name), value, parameters)
    document: dict[str, Any] = {"param_groups": groups}
    if found.counters:
        document["counters"] = found.counters
    return OptimizerParts(found.tensors, document)


def _sort(found: _Sorted, name: str, field_name: str, value: Any, parameters: Parameters) -> None:
    stored, ours = parameters[name]
    path = f"{name}.{field_name}"
    if isinstance(value, TensorRef):
        transposed = stored != ours and value.info.shape == stored
        shape = ours if transposed else value.info.shape
        found.tensors[path] = StateTensor(TensorInfo(value.info.dtype, shape), value, transposed)
    elif field_name == "step" and isinstance(value, int | float):
        # Counted in a number before torch 1.12; torch itself turns it into this tensor when it loads it.
        found.tensors[path] = StateTensor(TensorInfo("F32", ()), number=float(value))
    elif isinstance(value, int | float | str | bool) or value is None:
        found.counters[path] = value
    else:
        raise StateError(f"the {field_name} of {name} is a {type(value).__name__}, which is not understood")


def _names(optimizer: Mapping[str, Any], parameters: Parameters) -> dict[Any, str]:
    """Key in the state and the groups -> parameter name."""
    groups = optimizer["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if any(not isinstance(key, int | str) for key in keys) or len(set(keys)) != len(keys):
        raise StateError("its groups do not name each of their parameters once")
    if all(isinstance(key, str) for key in keys):
        names = {key: canonical_name(key) for key in keys}
        unknown = [key for key, name in names.items() if name not in parameters]
        if unknown:
            raise StateError(f"the model lacks {len(unknown)} of its parameters, {unknown[0]!r} first")
        return names
    recorded = [name for group in groups for name in group.get("param_names", [])]
    orders = [[canonical_name(str(name)) for name in recorded], *_usual_orders(parameters)]
    for order in orders:
        if len(order) == len(keys) and _agrees(dict(zip(keys, order, strict=True)), optimizer, parameters):
            return dict(zip(keys, order, strict=True))
    raise StateError(
        f"its {len(keys)} numbered parameters do not fit the model's {len(parameters)}, neither in the "
        "model's order nor with matrices before vectors"
    )


def _usual_orders(parameters: Parameters) -> list[list[str]]:
    names = list(parameters)
    matrices = [name for name in names if len(parameters[name][0]) >= 2]
    return [[*matrices, *(name for name in names if name not in set(matrices))], names]


def _agrees(names: Mapping[Any, str], optimizer: Mapping[str, Any], parameters: Parameters) -> bool:
    """Whether every tensor of the state is a single number or has its parameter's shape."""
    if not all(name in parameters for name in names.values()):
        return False
    for key, entry in optimizer["state"].items():
        shapes = _shapes(entry)
        if key not in names or any(shape != parameters[names[key]][0] for shape in shapes):
            return False
    return True


def _shapes(entry: Any) -> Sequence[Shape]:
    values = entry.values() if isinstance(entry, Mapping) else ()
    shapes = [value.info.shape for value in values if isinstance(value, TensorRef)]
    return [shape for shape in shapes if math.prod(shape) != 1]


def _fits(value: Any) -> bool:
    """Whether a hyperparameter is one that a checkpoint can hold."""
    if isinstance(value, TensorRef):
        return math.prod(value.info.shape) == 1
    if isinstance(value, list | tuple):
        return all(_fits(item) and not isinstance(item, TensorRef) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
