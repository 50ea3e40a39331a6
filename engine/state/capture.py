"""What a checkpoint holds: a flat list of named tensors and, beside it, JSON.

Every entry of the state is a module, an optimizer, an object with `state_dict()`, or a plain tensor, dict,
list or JSON value. Modules give their live tensors, under canonical names (the same with and without DDP,
`torch.compile` and other wrappers), and whatever else their `state_dict()` holds. Optimizers are read
directly, under the same names: `get_optimizer_state_dict` would take a step to create missing state.

Walking a module takes milliseconds and usually gives the same answer. The answer is therefore cached, and a
save only checks that the objects behind it are still the same ones (`unchanged`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from engine.errors import HoldfastError, UnsavableValueError
from engine.loaders import make_iterator
from engine.state import rng, values
from engine.state.captured import PER_RANK_PREFIX, RNG_KEY, Captured, OwnNames, per_rank_name
from engine.state.entry_kinds import generator_kind, kind_of, saved_value
from engine.state.modules import ModuleCapture, remove_ties
from engine.state.optimizer_attributes import changed_numbers, check_attributes, numbers_of
from engine.state.optimizer_kinds import check_optimizers_stand_alone, refuse_overlapped, unwrapped
from engine.state.optimizers import OptimizerCapture
from engine.state.parameter_names import ParameterNames
from engine.state.state_dicts import buffer_names, has_own_state_dict
from engine.state.tensor_format import check_savable
from engine.state.wrappers import unwrapped_optimizer

log = logging.getLogger(__name__)


class StateCapture:
    """Captures one state at every save, cheaply while its structure does not change.

    Args:
        state: name -> object. Optimizers need their module in the same state.
        per_rank: keys whose values belong to this rank alone.
        rank: this rank.
        rank0: keys whose values rank 0 alone decides: it saves them, and every rank restores them.
    Raises: UnsavableValueError for keys and entries that cannot be saved.
    """

    def __init__(
        self, state: Mapping[str, Any], per_rank: tuple[str, ...], rank: int, rank0: tuple[str, ...] = ()
    ) -> None:
        for name in state:
            if not name or "." in name or name.startswith("$") or name in (RNG_KEY, PER_RANK_PREFIX):
                raise UnsavableValueError(
                    f"the state key {name!r} cannot be used: keys are plain names without dots, other than "
                    f"{RNG_KEY!r} and {PER_RANK_PREFIX!r}"
                )
            if kind_of(state[name]) is None:
                raise UnsavableValueError(
                    f"the state entry {name!r} is a {type(state[name]).__name__}; entries are objects that "
                    "can be restored in place: modules, optimizers, objects with state_dict and "
                    "load_state_dict, tensors, arrays, dicts, lists, sets, deques or random number "
                    "generators. Put a single value into a dict"
                )
            check_optimizers_stand_alone(name, state[name])
        for name in per_rank:
            if name not in state:
                raise UnsavableValueError(f"per_rank names {name!r}, which is not in the state")
        self._given, self._entries = state, dict(state)
        self.state = {key: unwrapped(unwrapped_optimizer(entry)) for key, entry in state.items()}
        for name in rank0:
            if name not in state or isinstance(state[name], nn.Module | Optimizer) or name in per_rank:
                raise UnsavableValueError(
                    f"rank0 names {name!r}, which is not in the state, is a module or an optimizer, or is "
                    "also in per_rank"
                )
        modules = {key: entry for key, entry in self.state.items() if isinstance(entry, nn.Module)}
        self._first_buffers = {key: buffer_names(module) for key, module in modules.items()}
        optimizers = {key: entry for key, entry in self.state.items() if isinstance(entry, Optimizer)}
        for key, optimizer in optimizers.items():
            refuse_overlapped(key, optimizer)
        self._numbers = {key: numbers_of(optimizer) for key, optimizer in optimizers.items()}
        self.per_rank = frozenset(per_rank)
        self._others: frozenset[str] = frozenset() if rank == 0 else frozenset(rank0)
        """What only rank 0 saves."""
        self._rank = rank
        fixed = [key for key, entry in self.state.items() if isinstance(entry, nn.Module | Optimizer)]
        self.names = OwnNames(rank, self.per_rank.intersection(fixed))
        """The checkpoint's names for modules and optimizers that are declared per rank."""
        self._modules: dict[str, ModuleCapture] = {}
        self._optimizers: dict[str, OptimizerCapture] = {}
        self._fixed = Captured()
        self._walked_since = True

    def capture(self) -> Captured:
        """The state as it is now. Tensors are live: copy them before training goes on.

        Raises: UnsavableValueError naming the key path of a value that is neither tensor nor JSON.
        """
        self._check_given()
        for entry in self.state.values():
            make_iterator(entry)
        # Generators are captured first and restored last: state_dict() of other objects may draw numbers.
        rng_state = rng.capture()
        fixed = self._capture_fixed()
        captured = replace(
            fixed, tensors=dict(fixed.tensors), aliases=dict(fixed.aliases), shared={}, local={}
        )
        for module in self._modules.values():
            self._collect(module, captured)
        if len(captured.tensors) > len(fixed.tensors):  # tensors inside extra state
            captured.buffers |= captured.tensors.keys() - fixed.tensors.keys()
        for optimizer in self._optimizers.values():
            self._collect(optimizer, captured)
        plain = [item for item in self.state.items() if not isinstance(item[1], nn.Module | Optimizer)]
        plain = [(key, entry) for key, entry in plain if key not in self._others]
        for key, entry in sorted(plain, key=lambda item: not generator_kind(item[1])):
            if key in self.per_rank:
                name = per_rank_name(self._rank, key)
                captured.local[key] = encoded_entry(entry, name, captured.tensors)
            else:
                captured.shared[key] = encoded_entry(entry, key, captured.tensors)
        # A save must not change what training draws next, or a resumed run would draw other numbers.
        if not torch.equal(torch.get_rng_state(), rng_state["torch"]):
            torch.set_rng_state(rng_state["torch"])
        name = per_rank_name(self._rank, RNG_KEY)
        captured.local[RNG_KEY] = values.encode(rng_state, name, captured.tensors)
        return captured

    def _check_given(self) -> None:
        """Raise unless the mapping given to the Checkpointer still holds the objects that are saved."""
        for key, entry in self._given.items():
            if key not in self._entries:
                raise UnsavableValueError(
                    f"{key!r} was added to the state after this Checkpointer was made, and would not be "
                    "saved or restored; add it before making the Checkpointer, or make a new one"
                )
            if entry is not self._entries[key]:
                raise UnsavableValueError(
                    f"the state entry {key!r} was replaced after this Checkpointer was made, and the old "
                    "object would be saved or restored; change it in place (values inside a dict that is "
                    "an entry may be replaced), or make a new Checkpointer"
                )

    def _collect(self, entry: ModuleCapture | OptimizerCapture, captured: Captured) -> None:
        if entry.key not in self.per_rank:
            entry.collect_values(captured)
            return
        own = Captured()
        entry.collect_values(own)
        captured.tensors.update((self.names.of(name), tensor) for name, tensor in own.tensors.items())
        for key, document in own.shared.items():
            captured.local[key] = values.with_tensor_names(document, self.names.of)

    def _capture_fixed(self) -> Captured:
        """The tensors of modules and optimizers; walked again only when one of them has changed."""
        if not self._walked_since and self._unchanged():
            return self._fixed
        names = self.refresh()
        for key, one in self._optimizers.items():
            check_attributes(key, one.optimizer, names)
            self._tell_changed_numbers(key, one.optimizer)
        tensors, aliases = self.fixed_tensors()
        guarded = [name for entry in self._optimizers.values() for name in entry.guarded(self._modules)]
        buffers = [name for module in self._modules.values() for name in module.buffers & tensors.keys()]
        own = self.names.of
        tensors = {own(name): tensor for name, tensor in tensors.items()}
        self._fixed = Captured(
            tensors,
            frozenset(tensors),
            frozenset(own(aliases.get(name, name)) for name in guarded),
            frozenset(map(own, buffers)),
            self._fixed.generation + 1,
            {own(alias): own(name) for alias, name in aliases.items()},
            stateless=frozenset(own(name) for one in self._optimizers.values() for name in one.stateless()),
        )
        self._walked_since = False
        return self._fixed

    def _tell_changed_numbers(self, key: str, optimizer: Optimizer) -> None:
        changed = changed_numbers(key, optimizer, self._numbers[key])
        if changed:
            self._numbers[key] = {}  # warn once
        for sentence in changed if self._rank == 0 else ():
            log.warning("%s", sentence)

    @property
    def asks_together(self) -> bool:
        """Whether all ranks must call state_dict() at the same time, because its hooks may gather shards."""
        if self._modules:
            return any(module.may_gather for module in self._modules.values())
        modules = [entry for entry in self.state.values() if isinstance(entry, nn.Module)]
        own = [module for module in modules if has_own_state_dict(module)]
        return any(isinstance(parameter, DTensor) for module in own for parameter in module.parameters())

    def make_ready(self) -> None:
        """Walk modules and optimizers again unless they are unchanged and can be written into.

        Raises: UnsavableValueError when the state holds other objects than the Checkpointer was given.
        """
        self._check_given()
        walked = len(self._modules) + len(self._optimizers) > 0
        if walked and self._unchanged() and all(module.sharded_now for module in self._modules.values()):
            return
        self.refresh()

    def _unchanged(self) -> bool:
        modules = all(module.unchanged() for module in self._modules.values())
        return modules and all(optimizer.unchanged() for optimizer in self._optimizers.values())

    def refresh(self) -> ParameterNames:
        """Walk every module and optimizer again. Returns the names of all parameters."""
        # The cache of `capture` may be of an earlier walk: a restore gives optimizers their state.
        self._walked_since = True
        for key, entry in self.state.items():
            if isinstance(entry, nn.Module):
                self._modules[key] = captured_module(key, entry, self._first_buffers[key])
        names = ParameterNames(self._modules, self.state)
        for key, entry in self.state.items():
            if isinstance(entry, Optimizer):
                self._optimizers[key] = OptimizerCapture(key, entry, names)
        return names

    def fixed_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """(tensors, aliases) of modules and optimizers as last walked, by live name; tied ones once."""
        tensors: dict[str, torch.Tensor] = {}
        for module in self._modules.values():
            tensors.update(module.tensors)
        for optimizer in self._optimizers.values():
            tensors.update(optimizer.tensors)
        aliases = remove_ties(self._modules.values(), tensors)
        return tensors, aliases

    def kinds(self, keys: Iterable[str]) -> dict[str, Literal["module", "optimizer", "value"]]:
        """What kind of entry each of these state keys is."""
        return {
            key: "module" if key in self._modules else "optimizer" if key in self._optimizers else "value"
            for key in keys
        }

    @property
    def modules(self) -> Mapping[str, ModuleCapture]:
        """The modules of the state as last walked, by key."""
        return self._modules

    @property
    def optimizers(self) -> Mapping[str, OptimizerCapture]:
        """The optimizers of the state as last walked, by key."""
        return self._optimizers


def encoded_entry(entry: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON of an entry that is neither a module nor an optimizer; its tensors are added to `tensors`."""
    try:
        value = saved_value(entry)
    except HoldfastError:
        raise
    except Exception as error:
        raise UnsavableValueError(
            f"{path}: state_dict() of {type(entry).__qualname__} failed: {type(error).__name__}: {error}"
        ) from error
    return values.encode(value, path, tensors, keep_order=True)


def captured_module(key: str, module: nn.Module, first_buffers: Mapping[str, bool]) -> ModuleCapture:
    """The module's tensors.

    Raises: UnsavableValueError naming a tensor that cannot be saved, where torch's error names none.
    """
    try:
        return ModuleCapture(key, module, first_buffers)
    except (RuntimeError, ValueError, NotImplementedError):
        names = (*module.named_parameters(remove_duplicate=False), *module.named_buffers())
        for name, tensor in names:
            check_savable(f"{key}.{name}", tensor)
        raise
