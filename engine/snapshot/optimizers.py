"""The state of an optimizer under the canonical names of its parameters."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.dcp.boxes import detached
from engine.errors import UnsavableValueError
from engine.snapshot import values
from engine.snapshot.captured import Captured
from engine.snapshot.modules import ModuleCapture, Slot, in_place, pointer_of


class OptimizerCapture:
    """The canonical names of an optimizer's state and groups.

    State tensors are called `<key>.state.<parameter>.<name>`. What is not a tensor (hyperparameters by
    group, counters) is read anew at each save: a few numbers that schedules change. An optimizer before
    its first step has no state, and none is made for it: not every optimizer's first step from zeros
    equals its first step from nothing.
    """

    def __init__(self, key: str, owner: ModuleCapture, optimizer: Optimizer) -> None:
        self.key = key
        self.owner = owner.key
        self.optimizer = optimizer
        self.tensors: dict[str, torch.Tensor] = {}
        self._names = parameter_names(owner, optimizer)
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._states: list[tuple[torch.Tensor, Any]] = []
        self._entries: list[Slot] = []
        self._counters: list[tuple[str, dict[str, Any], str]] = []
        for parameter, name in self._names.items():
            entry: dict[str, Any] = optimizer.state.get(parameter, {})
            if entry:
                self._states.append((parameter, entry))
            for field_name, value in entry.items():
                if isinstance(value, torch.Tensor):
                    self.tensors[f"{key}.state.{name}.{field_name}"] = detached(value, like=parameter)
                    self._entries.append((entry, field_name, value, pointer_of(value)))
                else:
                    self._counters.append((f"{name}.{field_name}", entry, field_name))

    def unchanged(self) -> bool:
        """Whether every parameter and state tensor is still the same object in the same memory."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self._groups):
            return False
        for group, seen in zip(groups, self._groups, strict=True):
            if len(group["params"]) != len(seen) or any(map(operator.is_not, group["params"], seen)):
                return False
        state = self.optimizer.state
        if sum(map(len, state.values())) != len(self._entries) + len(self._counters):
            return False
        # load_state_dict() gives every parameter a new entry and leaves the old ones as they were.
        if any(state.get(parameter) is not entry for parameter, entry in self._states):
            return False
        return in_place(self._entries)

    def guarded(self, modules: Mapping[str, ModuleCapture]) -> list[str]:
        """The names of everything that only this optimizer's step changes."""
        parameters = (f"{self.owner}.{name}" for name in self._names.values())
        return [*self.tensors, *(name for name in parameters if name in modules[self.owner].tensors)]

    def group_names(self) -> list[list[str]]:
        """The canonical parameter names of each group, in order."""
        return [[self._names[parameter] for parameter in group] for group in self._groups]

    def named_parameters(self) -> Iterable[tuple[torch.Tensor, str]]:
        """The optimizer's parameters with their canonical names, in group order."""
        return self._names.items()

    def collect_values(self, captured: Captured) -> None:
        """Add the groups' hyperparameters, and counters that are not tensors."""
        groups = []
        for group, names in zip(self.optimizer.param_groups, self.group_names(), strict=True):
            groups.append(
                {**{key: value for key, value in group.items() if key != "params"}, "params": names}
            )
        document: dict[str, Any] = {"param_groups": groups}
        if self._counters:
            document["counters"] = {path: entry.get(name) for path, entry, name in self._counters}
        captured.shared[self.key] = values.encode(document, self.key, captured.tensors)


def parameter_names(owner: ModuleCapture, optimizer: Optimizer) -> dict[torch.Tensor, str]:
    """The canonical name of each of the optimizer's parameters, in group order.

    The owner has just been walked, which brings FSDP2 back to its sharded parameters: the optimizer's.
    Raises: UnsavableValueError for a parameter that the module does not save.
    """
    by_identity: dict[int, str] = {}
    for full_name, identity in owner.identities.items():
        if full_name in owner.tensors:
            by_identity.setdefault(identity, full_name.removeprefix(f"{owner.key}."))
    names: dict[torch.Tensor, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = by_identity.get(id(parameter))
            if name is None:
                raise UnsavableValueError(
                    f"parameter {position} of the optimizer's group {number} is not in the module; build the "
                    "optimizer after the module was sharded, and hand over the module it belongs to"
                )
            names[parameter] = name
    return names


def owner_of(optimizer: Optimizer, state: Mapping[str, Any], key: str) -> str:
    """The state key of the module whose parameters the optimizer holds.

    The modules were walked before, which brings FSDP2 back to its sharded parameters: the optimizer's.
    Raises: UnsavableValueError when the state has none.
    """
    for owner, module in state.items():
        if not isinstance(module, nn.Module):
            continue
        own = {id(parameter) for parameter in module.parameters()}
        if all(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return owner
    raise UnsavableValueError(
        f"{key}: the state holds no module with this optimizer's parameters; add the module to the state, "
        "and build the optimizer after the module was sharded"
    )
