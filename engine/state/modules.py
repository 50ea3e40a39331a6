"""The tensors of a module under canonical names, and a cheap check that they are still the same ones."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from engine.errors import UnsavableValueError
from engine.state import values
from engine.state.captured import Captured
from engine.state.composites import describe, is_composite, leaves_of
from engine.state.local_boxes import detached, geometry
from engine.state.metrics import UPDATE_COUNTS
from engine.state.state_dicts import (
    buffer_names,
    encode_values,
    has_own_state_dict,
    read_state_dict,
)
from engine.state.wrappers import refuse_unsavable

Slot = tuple[dict[str, Any], str, torch.Tensor | None, int]
"""Where a module holds a tensor: (dict that holds it, key there, tensor, address of its local memory)."""

LATE_BUFFERS = "_late_buffers"
"""Among a module's values: its buffers that were registered during training; a fresh module lacks them."""

ABSENT_BUFFERS = "_absent_buffers"
"""Among a module's values: its persistent buffers that are None; a fresh module may have tensors there."""

COMPOSITES = "_composites"
"""Among a module's values: class, shape and context of its composite tensors (`engine.state.composites`)."""

NOTES = frozenset({ABSENT_BUFFERS, LATE_BUFFERS, COMPOSITES, UPDATE_COUNTS})
"""Names among a module's values that are not keys of its state_dict()."""

_PLAIN_TYPES = (nn.Parameter, torch.Tensor)


class ModuleCapture:
    """The canonical names of a module's parameters and buffers, and the tensors behind them.

    first_buffers: the names of its buffers when the Checkpointer was made.
    """

    def __init__(self, key: str, module: nn.Module, first_buffers: Container[str] | None = None) -> None:
        refuse_unsavable(key, module)
        self.key = key
        self.module = module
        self.state = read_state_dict(key, module)
        self.value_names = self.state.key_of.keys() - self.state.live_key_of.keys()
        buffers_now = buffer_names(module)
        self._absent = [name for name, is_there in buffers_now.items() if not is_there]
        self._late = [name for name in buffers_now if first_buffers is not None and name not in first_buffers]
        # Its holders are not dicts and return new objects at every access.
        self._scripted = any(isinstance(child, torch.jit.ScriptModule) for child in module.modules())
        self._asks_each_time = bool(self.state.values) or has_own_state_dict(module)
        named = {f"{key}.{name}": tensor for name, tensor in self.state.tensors.items()}
        self._composites = {name: tensor for name, tensor in named.items() if is_composite(tensor)}
        parts = [
            part for name, tensor in self._composites.items() for part in leaves_of(named.pop(name), name)
        ]
        named |= {name: tensor for name, _, _, tensor in parts}
        self.may_gather = self._asks_each_time and any(isinstance(t, DTensor) for t in named.values())
        self.tensors = {name: t if is_lazy(t) else detached(t) for name, t in named.items()}
        self.identities = {name: id(tensor) for name, tensor in named.items()}
        buffers = {id(buffer) for buffer in module.buffers()}
        self.buffers = {name for name, identity in self.identities.items() if identity in buffers}
        self._slots = _slots(module)
        self._slots += [(holder, name, part, pointer_of(part)) for _, holder, name, part in parts]
        self._children = [
            (child._modules, *entry) for child in module.modules() for entry in child._modules.items()
        ]
        self._holders = _holders(module)
        self._sizes = [*map(len, self._holders)]
        self._boxes = [(tensor, geometry(tensor)) for tensor in named.values() if geometry(tensor)]

    def unchanged(self) -> bool:
        """Whether the module still holds the same tensors in the same memory: one pass of identity checks.

        FSDP2 swaps each parameter between a sharded DTensor and an unsharded plain tensor and always returns
        to the same DTensor, whose memory was captured. That is enough for a save; a restore also needs
        `sharded_now`. A module with a state_dict() of its own is asked again.
        """
        if self._scripted or (self._asks_each_time and not self._state_dict_unchanged()):
            return False
        if [*map(len, self._holders)] != self._sizes:
            return False
        if any(holder.get(name) is not child for holder, name, child in self._children):
            return False
        if any(geometry(tensor) != seen for tensor, seen in self._boxes):
            return False
        return same_tensors(self._slots, may_be_unsharded=True)

    def _state_dict_unchanged(self) -> bool:
        before, self.state = self.state, read_state_dict(self.key, self.module)
        self.value_names = self.state.key_of.keys() - self.state.live_key_of.keys()
        now = self.state.tensors
        return before.tensors.keys() == now.keys() and all(now[n] is t for n, t in before.tensors.items())

    @property
    def sharded_now(self) -> bool:
        """Whether no parameter is swapped for another tensor. FSDP2's unsharded tensors are copies, which
        would stay in use after a restore into the shards.
        """
        return all(holder.get(name) is seen for holder, name, seen, _ in self._slots)

    def collect_values(self, captured: Captured) -> None:
        """Add what state_dict() holds besides live tensors: extra state, and what hooks and overrides add."""
        if self._absent:
            self.state.values[ABSENT_BUFFERS] = self._absent
        if self._late:
            self.state.values[LATE_BUFFERS] = self._late
        if self._composites:
            self.state.values[COMPOSITES] = self.composites()
        if self.state.values:
            captured.shared[self.key] = encode_values(
                self.key, self.state, captured.aliases, captured.tensors
            )
            self.state.values = {}  # may be copies of the whole model; the next save asks again

    def composites(self) -> dict[str, Any]:
        """Class, shape and context of each composite tensor, by the tensor's name in the module."""
        return {
            name.removeprefix(f"{self.key}."): describe(tensor, name, _encoded)
            for name, tensor in self._composites.items()
        }


def _encoded(value: Any, path: str) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    document = values.encode(value, path, tensors)
    if tensors:
        raise UnsavableValueError(f"{path}: holds a tensor that is not one of its parts")
    return document


def remove_ties(modules: Iterable[ModuleCapture], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Keep each tied parameter under its first name only. Returns the other names, alias -> name.

    Ties are found by the parameter's identity: addresses would miss them on a rank with an empty local shard.
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


def pointer_of(tensor: torch.Tensor | None) -> int:
    """The address of the local memory. Call it under no_grad: `to_local` then makes no view."""
    if tensor is None or is_lazy(tensor):
        return 0
    return tensor.to_local().data_ptr() if isinstance(tensor, DTensor) else tensor.data_ptr()


def same_tensors(slots: Iterable[Slot], *, may_be_unsharded: bool = False) -> bool:
    """Whether every slot still holds the same tensor in the same memory.

    may_be_unsharded: a plain tensor in place of a DTensor counts as the same.
    """
    with torch.no_grad():
        for holder, name, seen, pointer in slots:
            now = holder.get(name)
            if now is not seen and not (
                may_be_unsharded and isinstance(seen, DTensor) and not isinstance(now, DTensor)
            ):
                return False
            # This runs for every tensor at every save: plain ones need no Python call.
            address = pointer_of(seen) if seen is None or type(seen) not in _PLAIN_TYPES else seen.data_ptr()
            if address != pointer:
                return False
    return True


def _slots(module: nn.Module) -> list[Slot]:
    """Every parameter and persistent buffer."""
    slots: list[Slot] = []
    with torch.no_grad():
        for child in module.modules():
            for name, parameter in child._parameters.items():
                slots.append((child._parameters, name, parameter, pointer_of(parameter)))
            for name, buffer in child._buffers.items():
                if name not in child._non_persistent_buffers_set:
                    slots.append((child._buffers, name, buffer, pointer_of(buffer)))
    return slots


def _holders(module: nn.Module) -> list[Mapping[Any, Any]]:
    """The dicts that hold parameters, buffers, children and hooks: later additions change their lengths."""
    return [
        holder
        for child in module.modules()
        for holder in (
            *(child._parameters, child._buffers, child._modules),
            *(child._state_dict_hooks, child._state_dict_pre_hooks),
        )
    ]
