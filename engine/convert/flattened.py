"""Rebuilds an optimizer from `get_optimizer_state_dict(flatten_optimizer_state_dict=True)`. Pure.

torchtitan saves it so, with the keys "state.<parameter>.<field>" and "param_groups.<parameter>.<setting>".
The groups are not recorded; here parameters with equal settings share one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from engine.convert.parameter_names import Names
from engine.convert.state_tree import TensorRef

_STATE = "state."
_GROUPS = "param_groups."


def nested_optimizer(
    flat: Mapping[Any, Any], names: Names, parameters: Collection[str], scalar: Callable[[TensorRef], Any]
) -> dict[str, Any] | None:
    """The optimizer with "state" and "param_groups", by parameter names; None if it is not one.

    scalar: the value of a setting that was saved as a tensor of one element.
    A key whose parameter the model lacks keeps its name, for the caller to refuse.
    """
    keys = [key for key in flat if isinstance(key, str)]
    if len(keys) != len(flat) or not any(key.startswith(_GROUPS) for key in keys):
        return None
    if not all(key.startswith((_STATE, _GROUPS)) for key in keys):
        return None
    state: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key.startswith(_STATE):
            parameter, field = _split(key[len(_STATE) :], names, parameters)
            state.setdefault(parameter, {})[field] = value
            continue
        parameter, field = _split(key[len(_GROUPS) :], names, parameters)
        one = isinstance(value, TensorRef) and math.prod(value.info.shape) == 1
        settings.setdefault(parameter, {})[field] = scalar(value) if one else value
    groups: list[dict[str, Any]] = []
    for parameter, own in settings.items():
        group = next((group for group in groups if _same(group, own)), None)
        if group is None:
            groups.append(group := {**own, "params": []})
        group["params"].append(parameter)
    return {"state": state, "param_groups": groups}


def _split(rest: str, names: Names, parameters: Collection[str]) -> tuple[str, str]:
    """(parameter, field): the longest prefix that names a parameter; a field may have dots, too."""
    begin = rest
    while "." in begin:
        begin = begin.rpartition(".")[0]
        if names.of(begin) in parameters:
            return begin, rest[len(begin) + 1 :]
    parameter, _, field = rest.rpartition(".")
    return parameter, field


def _same(group: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    if group.keys() - {"params"} != own.keys():
        return False
    return all(_equal(group[key], value) for key, value in own.items())


def _equal(one: Any, two: Any) -> bool:
    return type(one) is type(two) and bool(one == two)
