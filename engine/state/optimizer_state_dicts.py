"""State dicts that optimizers make themselves: what they hold beyond torch's own form, and comparing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

LIVE_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Settings of how a step runs, not of what it computes: a restore keeps the live optimizer's."""

_BASE = ("state", "param_groups")
_PARAMETER = "<parameter {}>"
_IDENTITY = "<id of parameter {}>"


def beyond_base(optimizer: Optimizer, state_dict: Mapping[Any, Any]) -> tuple[dict[Any, Any], bool]:
    """(what a state dict holds beyond the optimizer's state and groups, whether that is all of it).

    It is all of it when the state dict does not have torch's form or differs from the optimizer's state.
    """
    if not all(name in state_dict for name in _BASE) or not _agrees(optimizer, state_dict):
        return dict(state_dict), True
    return {name: value for name, value in state_dict.items() if name not in _BASE}, False


def _agrees(optimizer: Optimizer, state_dict: Mapping[Any, Any]) -> bool:
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if not isinstance(saved, list) or len(saved) != len(groups):
        return False
    number: dict[Any, int] = {}
    for group in groups:
        for parameter in group["params"]:
            number.setdefault(parameter, len(number))
    if any(
        list(saved_group.get("params", ())) != [number[parameter] for parameter in group["params"]]
        for saved_group, group in zip(saved, groups, strict=True)
    ):
        return False
    live = {
        number.get(key, key) if isinstance(key, torch.Tensor) else key: value
        for key, value in optimizer.state.items()
    }
    state = state_dict["state"]
    return (
        isinstance(state, Mapping)
        and state.keys() == live.keys()
        and all(_are_equal(state[key], live[key]) for key in live)
    )


def _are_equal(one: Any, two: Any) -> bool:
    if one is two:
        return True
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_are_equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and type(one) is type(two):
        return len(one) == len(two) and all(map(_are_equal, one, two))
    plain = not isinstance(one, torch.Tensor) and type(one) is type(two)
    return plain and isinstance(one, str | int | float) and one == two


def with_names(value: Any, names: Mapping[torch.Tensor, str]) -> Any:
    """The value with parameters, and their `id()`s, replaced by text where they are keys of a dict."""
    by_id = {id(parameter): name for parameter, name in names.items()}
    return _with_keys(value, lambda key: name_of_key(key, by_id))


def name_of_key(key: Any, by_id: Mapping[int, str]) -> Any:
    """The text for a parameter or its `id()`; any other key unchanged."""
    if isinstance(key, torch.Tensor):
        return _PARAMETER.format(by_id[id(key)]) if id(key) in by_id else key
    return _IDENTITY.format(by_id[key]) if type(key) is int and key in by_id else key


def with_parameters(value: Any, parameters: Mapping[str, torch.Tensor]) -> Any:
    """Undo `with_names`."""
    keys: dict[str, Any] = {_PARAMETER.format(name): parameter for name, parameter in parameters.items()}
    keys |= {_IDENTITY.format(name): id(parameter) for name, parameter in parameters.items()}
    return _with_keys(value, lambda key: keys.get(key, key) if isinstance(key, str) else key)


def _with_keys(value: Any, replaced: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        pairs = [(key, replaced(key), inner) for key, inner in value.items()]
        if type(value) is dict or any(new is not key for key, new, _ in pairs):
            return {new: _with_keys(inner, replaced) for _, new, inner in pairs}
    if type(value) in (list, tuple):
        return type(value)(_with_keys(inner, replaced) for inner in value)
    return value


def first_difference(path: str, saved: Any, live: Any) -> str:
    """One sentence on the first place where a live value differs from the saved one; "" when all is equal.

    Keys, types, dtypes and bits count; `LIVE_FLAGS` in parameter groups do not. An empty dict equals a
    missing one: looking up a parameter without state creates an empty entry.
    """
    if isinstance(saved, torch.Tensor) and isinstance(live, torch.Tensor):
        return "" if _same_tensor(saved, live) else f"{path} is {_words(live)}, saved as {_words(saved)}"
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        ignored = LIVE_FLAGS if "params" in saved else frozenset[str]()
        keys, live_keys = (
            [key for key, value in each.items() if key not in ignored and not _is_empty(value)]
            for each in (saved, live)
        )
        odd = {*keys} ^ {*live_keys}
        if odd:
            return f"{path} differs in the keys {sorted(map(str, odd))[:5]}"
        pairs = [(f"{path}.{key}", saved[key], live[key]) for key in keys]
    elif isinstance(saved, list | tuple) and isinstance(live, list | tuple) and len(saved) == len(live):
        pairs = [(f"{path}.{at}", one, two) for at, (one, two) in enumerate(zip(saved, live, strict=True))]
    elif type(saved) is type(live) and _equal(saved, live):
        return ""
    else:
        return f"{path} is {_words(live)}, saved as {_words(saved)}"
    return next((found for pair in pairs if (found := first_difference(*pair))), "")


def _is_empty(value: Any) -> bool:
    return isinstance(value, Mapping) and not value


def _same_tensor(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one is two:
        return True
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    local, other = (t.to_local() if isinstance(t, DTensor) else t.detach() for t in (one, two))
    if local.shape != other.shape:
        return False
    same = local.eq(other.to(local.device))
    if local.is_floating_point():
        same |= local.isnan() & other.to(local.device).isnan()
    return bool(same.all())


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(two)
    return bool(np.all(one == two))


def _words(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return f"{value!r}"[:80]
