"""The names of the parameters of a state, under which an optimizer's state is saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.errors import UnsavableValueError
from engine.state.modules import ModuleCapture
from engine.state.values import MAX_DEPTH, too_deep


class ParameterNames:
    """Every name of every parameter of a state, by identity: in its modules, and loose in its values.

    Make it right after the modules were walked: that makes FSDP2 return to the sharded parameters, which are
    the optimizers'.
    """

    def __init__(self, modules: Mapping[str, ModuleCapture], state: Mapping[str, Any]) -> None:
        self._state = state
        self._full: dict[int, list[str]] = {}
        self._members: dict[str, set[int]] = {}
        for key, module in modules.items():
            self._members[key] = set(module.identities.values())
            # A parameter that a state-dict hook drops keeps its name, after the names that are saved.
            for saved in (True, False):
                for name, identity in module.identities.items():
                    if (name in module.tensors) is saved:
                        self._full.setdefault(identity, []).append(name)
        for key, entry in state.items():
            if isinstance(entry, torch.Tensor | dict | list | tuple):
                self._add_loose(key, entry)
        self._asked_objects = False

    def owner(self, parameters: list[torch.Tensor]) -> str:
        """The state key of the first module that has all of the parameters; "" when no module has."""
        for key, members in self._members.items():
            if parameters and all(id(parameter) in members for parameter in parameters):
                return key
        return ""

    def of(self, parameter: torch.Tensor) -> list[str]:
        """Its full names, first the one that its tensor is saved under; [] for an unknown parameter."""
        found = self._full.get(id(parameter))
        if found is None and not self._asked_objects:
            # state_dict() of a user's object may be slow: it is called only when all else has failed.
            self._asked_objects = True
            for key, entry in self._state.items():
                if not isinstance(entry, nn.Module | Optimizer) and hasattr(entry, "state_dict"):
                    self._add_loose(key, entry.state_dict())
            found = self._full.get(id(parameter))
        return found or []

    def _add_loose(self, key: str, value: Any) -> None:
        for path, tensor in loose_tensors(key, value):
            names = self._full.setdefault(id(tensor), [])
            if path not in names:
                names.append(path)


def loose_tensors(path: str, value: Any, depth: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted path, tensor) of each tensor in nested dicts and lists.

    Raises: UnsavableValueError for containers nested too deep, such as a list that contains itself.
    """
    if depth > MAX_DEPTH:
        raise too_deep(path)
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(key, str | int):
                yield from loose_tensors(f"{path}.{key}", inner, depth + 1)
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from loose_tensors(f"{path}.{number}", inner, depth + 1)


def unknown_parameter(key: str, optimizer: Optimizer, parameter: torch.Tensor) -> UnsavableValueError:
    """The error for a parameter that is not in the state."""
    for number, group in enumerate(optimizer.param_groups):
        for position, candidate in enumerate(group["params"]):
            if candidate is parameter:
                return UnsavableValueError(
                    f"{key}: parameter {position} of the optimizer's group {number} "
                    f"(shape {list(parameter.shape)}) is not in the state; add the module or tensor that it "
                    "belongs to, and build the optimizer after sharding the module"
                )
    return UnsavableValueError(
        f"{key}: the optimizer keeps state for a tensor of shape {list(parameter.shape)} that is in none of "
        "its groups; delete it from the optimizer's state, or add the parameter to a group"
    )
