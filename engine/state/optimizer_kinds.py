"""Kinds of optimizers: with state dicts of their own, around other optimizers, sharded over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import UnsavableValueError

_DEPTH = 4
"""How deep optimizers are looked for in nested dicts and lists."""

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""Where torch keeps the hooks that users register on state dicts; it has no public way to list them."""


def state_of(optimizer: Optimizer) -> MutableMapping[Any, Any]:
    """The mapping that holds this rank's state of the optimizer."""
    held = local_part(optimizer) or optimizer
    state: MutableMapping[Any, Any] = held.state
    return state


def local_part(optimizer: Optimizer) -> Optimizer | None:
    """The optimizer over this rank's own parameters inside a ZeroRedundancyOptimizer; None for any other.

    The class is recognised by name, because importing it loads torch's TorchScript optimizers.
    """
    zero = any(
        base.__name__ == "ZeroRedundancyOptimizer" and base.__module__.startswith("torch.distributed.optim")
        for base in type(optimizer).__mro__
    )
    if not zero:
        return None
    inner = getattr(optimizer, "optim", None)
    if not isinstance(inner, Optimizer):
        raise UnsavableValueError(
            "a ZeroRedundancyOptimizer with overlap_with_ddp=True keeps no optimizer whose state could be "
            "saved; build it without overlap_with_ddp"
        )
    return inner


def refuse_overlapped(key: str, optimizer: Optimizer) -> None:
    """Raises: UnsavableValueError naming the key of a ZeroRedundancyOptimizer with overlap_with_ddp."""
    try:
        local_part(optimizer)
    except UnsavableValueError as error:
        raise UnsavableValueError(f"{key}: {error}") from None


def class_name(optimizer: Optimizer) -> str:
    """The name of the class whose state it is: for a ZeroRedundancyOptimizer, the optimizer inside."""
    return type(local_part(optimizer) or optimizer).__name__


def saves_itself(optimizer: Optimizer) -> bool:
    """Whether `state_dict` is not torch's own, or has hooks."""
    return local_part(optimizer) is None and _overrides(optimizer, "state_dict", _HOOKS[:2])


def loads_itself(optimizer: Optimizer) -> bool:
    """Whether `load_state_dict` or `state_dict` is not torch's own, or has hooks."""
    if local_part(optimizer) is not None:
        return False
    return saves_itself(optimizer) or _overrides(optimizer, "load_state_dict", _HOOKS[2:])


def _overrides(optimizer: Optimizer, method: str, hooks: tuple[str, ...]) -> bool:
    if method in vars(optimizer) or getattr(type(optimizer), method) is not getattr(Optimizer, method):
        return True
    return any(getattr(optimizer, name, None) for name in hooks)


def inner_optimizers(key: str, optimizer: Optimizer) -> dict[str, Optimizer]:
    """Optimizers in this one's attributes that have state of their own, by attribute.

    Raises: UnsavableValueError for one whose parameters the outer one does not have, unless the outer one's
        own state_dict() saves it.
    """
    if local_part(optimizer) is not None:
        return {}
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found: dict[str, Optimizer] = {}
    for name, inner in _optimizers_in(vars(optimizer)):
        if inner is optimizer or inner.state is optimizer.state or any(inner is o for o in found.values()):
            continue
        if all(id(parameter) in own for group in inner.param_groups for parameter in group["params"]):
            found[name] = inner
        elif not saves_itself(optimizer):
            raise UnsavableValueError(
                f"{key}: its attribute {name} is a {type(inner).__name__} over tensors that are not its own "
                f"parameters, and {type(optimizer).__name__} has no state_dict that saves it; put both "
                "optimizers, and the modules or tensors that they step, into the state"
            )
    return found


def _optimizers_in(attributes: Mapping[str, Any]) -> Iterator[tuple[str, Optimizer]]:
    for name, value in attributes.items():
        if isinstance(value, Optimizer):
            yield name, value
        elif isinstance(value, list | tuple):
            yield from (
                (f"{name}.{at}", item) for at, item in enumerate(value) if isinstance(item, Optimizer)
            )
        elif isinstance(value, dict):
            pairs = ((at, item) for at, item in value.items() if isinstance(at, str | int))
            yield from ((f"{name}.{at}", item) for at, item in pairs if isinstance(item, Optimizer))


def keeps_optimizers(entry: Any) -> bool:
    """Whether an object that is not an optimizer has optimizers in its attributes."""
    plain = isinstance(entry, Optimizer | nn.Module) or not hasattr(entry, "state_dict")
    return not plain and any(True for _ in _optimizers_in(getattr(entry, "__dict__", {})))


def unwrapped(entry: Any) -> Any:
    """The optimizer inside an object that looks like one and steps it (apex's LARC); else the entry."""
    if isinstance(entry, Optimizer) and not hasattr(entry, "param_groups"):
        return _Opaque(entry)
    if isinstance(entry, Optimizer | nn.Module | dict | torch.Tensor) or not hasattr(entry, "param_groups"):
        return entry
    inner = [value for value in getattr(entry, "__dict__", {}).values() if isinstance(value, Optimizer)]
    same = len(inner) == 1 and _parameters(entry.param_groups) == _parameters(inner[0].param_groups)
    return inner[0] if same else entry


class _Opaque:
    """An optimizer by its class only, with a state_dict() and neither groups nor state.

    One is pytorch_optimizer's SafeFP16Optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.state_dict = optimizer.state_dict
        self.load_state_dict = optimizer.load_state_dict


def _parameters(groups: Any) -> list[int]:
    return [id(parameter) for group in groups for parameter in group["params"]]


def check_optimizers_stand_alone(path: str, entry: Any, depth: int = 0) -> None:
    """Refuse optimizers inside a dict or list, and results of `optimizer.state_dict()`, which go stale."""
    if depth and isinstance(entry, Optimizer):
        raise UnsavableValueError(
            f"{path} is an optimizer inside a dict or list; give each optimizer a key of its own in the "
            f"state: {{{path.replace('.', '_')!r}: optimizer}}"
        )
    if depth > _DEPTH or not isinstance(entry, Mapping | list | tuple):
        return
    if isinstance(entry, Mapping):
        groups = entry.get("param_groups")
        if "state" in entry and isinstance(groups, list) and all(isinstance(g, Mapping) for g in groups):
            raise UnsavableValueError(
                f"{path} is the state_dict() of an optimizer, which goes stale as training goes on and "
                "cannot be restored; put the optimizer itself into the state: "
                f"{{{path.rpartition('.')[2]!r}: optimizer}}"
            )
    items = entry.items() if isinstance(entry, Mapping) else enumerate(entry)
    for name, inner in items:
        check_optimizers_stand_alone(f"{path}.{name}", inner, depth + 1)
