"""What a checkpoint holds: a flat list of named tensors and, beside it, JSON.

Every entry of the state is one of: a module, an optimizer, anything with `state_dict()`, or a plain tensor,
dict, list or JSON value. Modules go through DCP's `get_model_state_dict`, which gives canonical
names (also under `torch.compile` and DDP) and brings FSDP2 back to its sharded parameters: after a no-grad
evaluation its root is left unsharded, and `named_parameters()` would hand out full plain tensors.
Optimizers are read directly, under the same names: `get_optimizer_state_dict` would take a step to create
missing state.

Walking a module takes milliseconds and gives the same answer each time. The answer is therefore kept, and
a save only checks that the objects behind it are still the same ones (`unchanged`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from engine.errors import UnsavableValueError
from engine.snapshot import rng, values

RNG_KEY = "rng"
PER_RANK_PREFIX = "per_rank"
EXTRA_STATE = "_extra_state"
"""The last part of the name of what a module's get_extra_state() returns."""


@dataclass(slots=True)
class Captured:
    """One moment's state of one rank.

    tensors: every tensor once, by canonical name; DTensors stay DTensors. Not copied: live memory.
    fixed: the names that belong to modules and optimizers: the same objects as in every capture of the
        same `generation`. The others may be new objects each time.
    guarded: the names that only an optimizer's step changes: its parameters and its state.
    aliases: further names of tensors in `tensors` (tied weights), alias -> name.
    shared: JSON of the values that are the same on all ranks, by state key.
    local: JSON of this rank's own values, by state key.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    guarded: frozenset[str] = frozenset()
    generation: int = 0
    aliases: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)


def per_rank_name(rank: int, key: str) -> str:
    """The prefix of the names of one rank's own tensors: they are never merged with another rank's."""
    return f"{PER_RANK_PREFIX}.{rank:05d}.{key}"


class StateCapture:
    """Captures the same state object again and again, cheaply when its structure has not changed.

    Args:
        state: name -> object. Optimizers need their module in the same state.
        per_rank: names whose values belong to this rank alone.
        rank: this rank.
    Raises: UnsavableValueError for names that cannot work.
    """

    def __init__(self, state: Mapping[str, Any], per_rank: tuple[str, ...], rank: int) -> None:
        for name in state:
            if not name or "." in name or name.startswith("$") or name in (RNG_KEY, PER_RANK_PREFIX):
                raise UnsavableValueError(
                    f"the state key {name!r} cannot be used: keys are plain names without dots, other than "
                    f"{RNG_KEY!r} and {PER_RANK_PREFIX!r}"
                )
            if not (
                hasattr(state[name], "state_dict") or isinstance(state[name], torch.Tensor | dict | list)
            ):
                raise UnsavableValueError(
                    f"the state entry {name!r} is a {type(state[name]).__name__}; entries are modules, "
                    "optimizers, objects with state_dict and load_state_dict, tensors, dicts or lists: what "
                    "can be restored in place"
                )
        for name in per_rank:
            if name not in state or isinstance(state[name], nn.Module | Optimizer):
                raise UnsavableValueError(
                    f"per_rank names {name!r}, which is not in the state or is a module or an optimizer"
                )
        self.state = dict(state)
        self.per_rank = frozenset(per_rank)
        self._rank = rank
        self._modules: dict[str, ModuleCapture] = {}
        self._optimizers: dict[str, OptimizerCapture] = {}
        self._fixed = Captured()
        self._walked_since = True

    def capture(self) -> Captured:
        """The state as it is now. Tensors are live: copy them before training goes on.

        Raises: UnsavableValueError naming the key path of a value that is neither tensor nor JSON.
        """
        # First out, last in: state_dict() of other objects may draw random numbers.
        rng_state = rng.capture()
        fixed = self._capture_fixed()
        captured = Captured(
            dict(fixed.tensors), fixed.fixed, fixed.guarded, fixed.generation, dict(fixed.aliases)
        )
        for module in self._modules.values():
            module.collect_values(captured)
        for optimizer in self._optimizers.values():
            optimizer.collect_values(captured)
        for key, entry in self.state.items():
            if isinstance(entry, nn.Module | Optimizer):
                continue
            if key in self.per_rank:
                name = per_rank_name(self._rank, key)
                captured.local[key] = values.encode(plain_value(entry), name, captured.tensors)
            else:
                captured.shared[key] = values.encode(plain_value(entry), key, captured.tensors)
        name = per_rank_name(self._rank, RNG_KEY)
        captured.local[RNG_KEY] = values.encode(rng_state, name, captured.tensors)
        return captured

    def _capture_fixed(self) -> Captured:
        """The tensors of modules and optimizers; walked anew only when one of them has changed."""
        unchanged = not self._walked_since
        unchanged = unchanged and all(module.unchanged() for module in self._modules.values())
        if unchanged and all(optimizer.unchanged() for optimizer in self._optimizers.values()):
            return self._fixed
        self.refresh()
        tensors, aliases = self.fixed_tensors()
        guarded = [name for entry in self._optimizers.values() for name in entry.guarded(self._modules)]
        self._fixed = Captured(
            tensors,
            frozenset(tensors),
            frozenset(aliases.get(name, name) for name in guarded),
            self._fixed.generation + 1,
            aliases,
        )
        self._walked_since = False
        return self._fixed

    def refresh(self) -> None:
        """Walk every module and optimizer anew."""
        # What was kept for `capture` may be of another walk: a restore gives optimizers their state.
        self._walked_since = True
        for key, entry in self.state.items():
            if isinstance(entry, nn.Module):
                self._modules[key] = ModuleCapture(key, entry)
        for key, entry in self.state.items():
            if isinstance(entry, Optimizer):
                owner = owner_of(entry, self.state, key)
                self._optimizers[key] = OptimizerCapture(key, owner, self.state[owner], entry)

    def fixed_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """(tensors, aliases) of modules and optimizers as last walked, tied ones once."""
        tensors: dict[str, torch.Tensor] = {}
        for module in self._modules.values():
            tensors.update(module.tensors)
        for optimizer in self._optimizers.values():
            tensors.update(optimizer.tensors)
        aliases = _take_ties_out(self._modules.values(), tensors)
        return tensors, aliases

    @property
    def modules(self) -> Mapping[str, ModuleCapture]:
        """The modules of the state as last walked, by key."""
        return self._modules

    @property
    def optimizers(self) -> Mapping[str, OptimizerCapture]:
        """The optimizers of the state as last walked, by key."""
        return self._optimizers


class ModuleCapture:
    """The canonical names of a module's parameters and buffers, and the tensors behind them."""

    def __init__(self, key: str, module: nn.Module) -> None:
        self.key = key
        self.tensors: dict[str, torch.Tensor] = {}
        self._extra: dict[str, Any] = {}
        # state_dict() brings FSDP2 back to its sharded parameters before it reads them.
        for name, value in get_model_state_dict(module).items():
            # Extra state is made anew by each call of get_extra_state(), also where it is a tensor.
            if isinstance(value, torch.Tensor) and name.rpartition(".")[2] != EXTRA_STATE:
                self.tensors[f"{key}.{name}"] = value.detach()
            else:
                self._extra[name] = value
        self._slots = _slots(module)
        self._children = [
            (child._modules, *entry) for child in module.modules() for entry in child._modules.items()
        ]
        self._sizes = _sizes(module)
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        self.identities = {f"{key}.{canonical(module, name)}": id(tensor) for name, tensor in named}

    def unchanged(self) -> bool:
        """Whether the same tensors stand in the same places: one pass of identity checks.

        FSDP2 swaps each parameter between a sharded DTensor and an unsharded plain tensor and always comes
        back to the same DTensor, whose memory is what was captured.
        """
        if self._extra or any(len(holder) != size for holder, size in self._sizes):
            return False
        if any(holder.get(name) is not child for holder, name, child in self._children):
            return False
        with torch.no_grad():
            for holder, name, seen, pointer in self._slots:
                now = holder.get(name)
                if now is not seen and (isinstance(now, DTensor) or not isinstance(seen, DTensor)):
                    return False
                if _pointer(seen) != pointer:
                    return False
        return True

    def collect_values(self, captured: Captured) -> None:
        """Add this module's extra state: what of its state dict is not a tensor."""
        if self._extra:
            captured.shared[self.key] = values.encode(self._extra, self.key, captured.tensors)


class OptimizerCapture:
    """The canonical names of an optimizer's state and groups.

    State tensors are called `<key>.state.<parameter>.<name>`. What is not a tensor (hyperparameters by
    group, counters) is read anew at each save: a few numbers that schedules change. An optimizer before
    its first step has no state, and none is made for it: not every optimizer's first step from zeros
    equals its first step from nothing.
    """

    def __init__(self, key: str, owner: str, module: nn.Module, optimizer: Optimizer) -> None:
        self.key = key
        self.owner = owner
        self.optimizer = optimizer
        self.tensors: dict[str, torch.Tensor] = {}
        self._names = parameter_names(module, optimizer)
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        self._states: list[tuple[torch.Tensor, Any]] = []
        self._entries: list[tuple[dict[str, Any], str, Any, int]] = []
        self._counters: list[tuple[str, dict[str, Any], str]] = []
        for parameter, name in self._names.items():
            entry: dict[str, Any] = optimizer.state.get(parameter, {})
            if entry:
                self._states.append((parameter, entry))
            for field_name, value in entry.items():
                if isinstance(value, torch.Tensor):
                    self.tensors[f"{key}.state.{name}.{field_name}"] = value.detach()
                    self._entries.append((entry, field_name, value, _pointer(value)))
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
        with torch.no_grad():
            return all(
                entry.get(name) is seen and _pointer(seen) == pointer
                for entry, name, seen, pointer in self._entries
            )

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


def parameter_names(module: nn.Module, optimizer: Optimizer) -> dict[torch.Tensor, str]:
    """The canonical name of each of the optimizer's parameters, in group order.

    Raises: UnsavableValueError for a parameter that the module does not have.
    """
    # Brings FSDP2 back to its sharded parameters, which are the ones the optimizer holds.
    saved = get_model_state_dict(module)
    by_identity = {parameter: canonical(module, name) for name, parameter in module.named_parameters()}
    names: dict[torch.Tensor, str] = {}
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = by_identity.get(parameter)
            if name is None or name not in saved:
                raise UnsavableValueError(
                    f"parameter {position} of the optimizer's group {number} is not in the module; build the "
                    "optimizer after the module was sharded, and hand over the module it belongs to"
                )
            names[parameter] = name
    return names


def canonical(module: nn.Module, name: str) -> str:
    """A parameter's name without the wrappers of DDP and torch.compile, as DCP's state dicts have it."""
    parts = []
    current: Any = module
    for part in name.split("."):
        wrapped = isinstance(current, DistributedDataParallel) and part == "module"
        if not wrapped and part != "_orig_mod":
            parts.append(part)
        current = getattr(current, part)
    return ".".join(parts)


def owner_of(optimizer: Optimizer, state: Mapping[str, Any], key: str) -> str:
    """The state key of the module whose parameters the optimizer holds.

    Raises: UnsavableValueError when the state has none.
    """
    for owner, module in state.items():
        if not isinstance(module, nn.Module):
            continue
        get_model_state_dict(module)
        own = {id(parameter) for parameter in module.parameters()}
        if all(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            return owner
    raise UnsavableValueError(
        f"{key}: the state holds no module with this optimizer's parameters; add the module to the state, "
        "and build the optimizer after the module was sharded"
    )


def plain_value(entry: Any) -> Any:
    """What is saved of an entry that is neither module nor optimizer."""
    return entry.state_dict() if hasattr(entry, "state_dict") else entry


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], str, torch.Tensor | None, int]]:
    """(holder, key, tensor, pointer) for every parameter and persistent buffer."""
    slots: list[tuple[dict[str, Any], str, torch.Tensor | None, int]] = []
    with torch.no_grad():
        for child in module.modules():
            for name, parameter in child._parameters.items():
                slots.append((child._parameters, name, parameter, _pointer(parameter)))
            for name, buffer in child._buffers.items():
                if name not in child._non_persistent_buffers_set:
                    slots.append((child._buffers, name, buffer, _pointer(buffer)))
    return slots


def _sizes(module: nn.Module) -> list[tuple[Mapping[str, Any], int]]:
    """How many parameters, buffers and children every module has: what was added later shows in it."""
    holders = [
        holder for child in module.modules() for holder in (child._parameters, child._buffers, child._modules)
    ]
    return [(holder, len(holder)) for holder in holders]


def _pointer(tensor: torch.Tensor | None) -> int:
    """The address of the local memory. To be called without gradients: `to_local` then makes no view."""
    if tensor is None:
        return 0
    return tensor.to_local().data_ptr() if isinstance(tensor, DTensor) else tensor.data_ptr()


def _take_ties_out(modules: Iterable[ModuleCapture], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Keep each tied parameter under its first name only. Returns the other names, alias -> name.

    By identity of the parameter: by address would miss ties on a rank whose local shard is empty.
    """
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for module in modules:
        for name, identity in module.identities.items():
            if name in tensors and first.setdefault(identity, name) != name:
                aliases[name] = first[identity]
    for alias in aliases:
        del tensors[alias]
    return aliases
