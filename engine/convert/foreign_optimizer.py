"""Converts a foreign optimizer's state to our names: numbered parameters become named ones. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.convert.numbering import Parameters, numbered
from engine.convert.parameter_names import Names
from engine.convert.state_tree import TensorRef
from engine.errors import StateError
from engine.format.manifest import TensorInfo


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One tensor of the state: from the source, perhaps transposed, or a plain number."""

    info: TensorInfo
    ref: TensorRef | None = None
    transposed: bool = False
    number: float = 0.0


@dataclass(frozen=True, slots=True)
class OptimizerParts:
    """tensors: "<parameter>.<field>" -> tensor. document: groups and counters, in the form of a capture.

    left_out: paths of values that a checkpoint cannot store.
    """

    tensors: Mapping[str, StateTensor]
    document: Mapping[str, Any]
    left_out: tuple[str, ...] = ()


@dataclass(slots=True)
class _Sorted:
    tensors: dict[str, StateTensor] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)


def optimizer_parts(
    optimizer: Mapping[str, Any],
    parameters: Parameters,
    scalar: Callable[[TensorRef], Any],
    *,
    names: Names | None = None,
    in_order: bool = True,
) -> OptimizerParts:
    """Sort a saved optimizer.

    Args:
        optimizer: "state" and "param_groups", keyed by number or by name.
        scalar: the value of a tensor of one element.
        names: maps the checkpoint's parameter names to ours.
        in_order: whether `parameters` are in the module's order.
    Raises: StateError if its parameters are ambiguous or not the model's.
    """
    optimizer = _with_numbers(optimizer)
    owners = _owners(optimizer, parameters, names or Names(), in_order)
    groups, left = [], []
    for number, group in enumerate(optimizer["param_groups"]):
        values = {}
        for key, value in group.items():
            if key in ("params", "param_names"):
                continue
            if _fits(value):
                values[str(key)] = scalar(value) if isinstance(value, TensorRef) else value
            else:
                left.append(f"param_groups.{number}.{key}")
        groups.append({**values, "params": [owners[param] for param in group["params"]]})
    found = _Sorted()
    for key, entry in optimizer["state"].items():
        if key not in owners or not isinstance(entry, Mapping):
            raise StateError(f"its state has {str(key)[:80]!r}, which is in none of its groups")
        for field_name, value in entry.items():
            _sort(found, owners[key], str(field_name), value, parameters)
    document: dict[str, Any] = {"param_groups": groups}
    if found.counters:
        document["counters"] = found.counters
    left += [str(key) for key in optimizer if key not in ("state", "param_groups")]
    return OptimizerParts(found.tensors, document, tuple(left))


def steps_of(optimizer: Mapping[str, Any], scalar: Callable[[TensorRef], Any]) -> int | None:
    """The optimizer's step count, if all its parameters agree on it; else None."""
    counts = set()
    for entry in optimizer["state"].values():
        value = entry.get("step") if isinstance(entry, Mapping) else None
        if isinstance(value, TensorRef) and math.prod(value.info.shape) == 1:
            value = scalar(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
            return None
        counts.add(int(value))
    return counts.pop() if len(counts) == 1 else None


def _sort(found: _Sorted, name: str, field_name: str, value: Any, parameters: Parameters) -> None:
    parameter = parameters[name]
    path = f"{name}.{field_name}"
    if isinstance(value, TensorRef):
        transposed = parameter.transposed and value.info.shape == parameter.stored
        if parameter.transposed and not transposed and math.prod(value.info.shape) != 1:
            raise StateError(
                f"the {field_name} of {name} cannot be transposed: its shape is not its parameter's"
            )
        shape = parameter.ours if transposed else value.info.shape
        found.tensors[path] = StateTensor(TensorInfo(value.info.dtype, shape), value, transposed)
    elif field_name == "step" and isinstance(value, int | float) and not isinstance(value, bool):
        # A plain number before torch 1.12; torch converts it to this tensor on load.
        found.tensors[path] = StateTensor(TensorInfo("F32", ()), number=float(value))
    elif isinstance(value, int | float | str | bool) or value is None:
        found.counters[path] = value
    else:
        raise StateError(f"the {field_name} of {name} is a {type(value).__name__}, which is not supported")


def _with_numbers(optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
    """DCP stores parameter numbers as text in the state, and as numbers in the groups."""
    keys = {key for group in optimizer["param_groups"] for key in group["params"]}
    if not keys or not all(type(key) is int for key in keys):
        return optimizer
    state = {
        int(key) if isinstance(key, str) and key.isdecimal() else key: entry
        for key, entry in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def _owners(
    optimizer: Mapping[str, Any], parameters: Parameters, names: Names, in_order: bool
) -> dict[Any, str]:
    """Key in the state and the groups -> parameter name."""
    groups = optimizer["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if any(not isinstance(key, int | str) for key in keys) or len(set(keys)) != len(keys):
        raise StateError("its groups do not list each parameter exactly once")
    if all(isinstance(key, str) for key in keys):
        return _known({key: names.of(key) for key in keys}, parameters)
    recorded = [str(name) for group in groups for name in group.get("param_names", [])]
    if len(recorded) == len(keys):
        return _known({key: names.of(name) for key, name in zip(keys, recorded, strict=True)}, parameters)
    return numbered(optimizer, parameters, in_order=in_order)


def _known(owners: dict[Any, str], parameters: Parameters) -> dict[Any, str]:
    unknown = [name for name in owners.values() if name not in parameters]
    if unknown:
        raise StateError(f"the model lacks {len(unknown)} of its parameters, {unknown[0]!r} first")
    return owners


def _fits(value: Any) -> bool:
    """Whether a checkpoint can store this hyperparameter."""
    if isinstance(value, TensorRef):
        return math.prod(value.info.shape) == 1
    if isinstance(value, list | tuple):
        return all(_fits(item) and not isinstance(item, TensorRef) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
