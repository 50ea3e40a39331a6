"""What a module's state_dict() returns, compared with the tensors that the module has.

Hooks and overrides may return copies, other names, more or fewer keys. A checkpoint always holds the live
parameters and buffers: a copy may be outdated or rounded, and reading into it would not change the live
weights. A key whose value is a live tensor belongs to that tensor; the values of all other keys are saved as
values and handed to load_state_dict().
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from engine.errors import UnsavableValueError
from engine.state import values
from engine.state.metrics import metric_values
from engine.state.tensor_format import bytes_of, check_savable
from engine.state.wrappers import NamedModule, named_modules, wrapped_by

EXTRA_STATE = "_extra_state"
"""The last part of the key of what a module's get_extra_state() returns."""

HANDED_OUT = "$state_dict"
"""The prefix of a tensor that state_dict() returns under the name of another tensor."""

_PLAIN_TYPES = (nn.Parameter, torch.Tensor)
_SAVING = ("state_dict", "_save_to_state_dict")
_OWN_CODE = ("torch", "lightning.fabric.wrappers", "lightning_fabric.wrappers")
"""Packages whose hooks and overrides return the live tensors in every call if they do so in one."""


@dataclass(slots=True)
class StateDict:
    """A module's state: live tensors by name, and what else its state_dict() holds.

    tensors: canonical name -> parameter or persistent buffer; tied ones under each of their names.
    key_of: canonical name -> key of state_dict(), for every key.
    live_key_of: the same for the keys whose value is a live tensor.
    values: canonical name -> value, for all other keys.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    live_key_of: dict[str, str] = field(default_factory=dict)
    values: dict[Any, Any] = field(default_factory=dict)
    key_of: dict[Any, Any] = field(default_factory=dict)


def module_to_ask(root: nn.Module) -> nn.Module:
    """The module whose state_dict() and load_state_dict() are called: the one inside all wrappers.

    A wrapper's state_dict() passes arguments that an override inside may not accept, and no wrapper calls an
    inner load_state_dict(). A wrapper with code of its own is called itself.
    """
    inside = wrapped_by(root)
    return root if inside is None or _takes_part(root) or has_own_loading(root) else module_to_ask(inside)


def read_state_dict(key: str, root: nn.Module) -> StateDict:
    """Call a module's state_dict(), and tell its live tensors from the other values.

    The call also makes FSDP2 return to its sharded parameters: after a no-grad evaluation its root stays
    unsharded, and named_parameters() would return full plain tensors.
    Raises: UnsavableValueError when a tensor that state_dict() leaves out has no name of its own, or a
        checkpoint cannot hold the kind of a tensor.
    """
    root = module_to_ask(root)
    with torch.no_grad():
        try:
            handed_out: Any = root.state_dict()
        except Exception as error:
            raise UnsavableValueError(
                f"{key}: state_dict() of {type(root).__qualname__} failed: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(handed_out, Mapping):
            raise UnsavableValueError(
                f"{key}: state_dict() of {type(root).__qualname__} returns a {type(handed_out).__name__}, "
                "not a dict"
            )
        tree = named_modules(root)
        if metrics := metric_values(tree):
            handed_out = {**handed_out, **metrics}
        live = live_tensors(tree)
        for name, tensor in live.items():
            if not is_lazy(tensor):  # a restore may give it its shape
                check_savable(f"{key}.{name}", tensor)
        by_memory: dict[Hashable, str] = {}
        found = StateDict()
        prefixes = _prefixes(tree)
        covered: set[int] = set()
        unclear: dict[str, Any] = {}
        for spelled, value in handed_out.items():
            name = _canonical(spelled, prefixes) if isinstance(spelled, str) else spelled
            found.key_of[name] = spelled
            own = None
            # Each call of get_extra_state() makes new extra state, also where it is a tensor.
            if isinstance(value, torch.Tensor) and not is_extra_state(name):
                own = live.get(name)
                if own is None or not _same(value, own):
                    by_memory = by_memory or _by_memory(live)
                    own = _elsewhere(value, live, by_memory)
            if own is None:
                unclear[name] = value
            else:
                covered.add(id(own))
                found.tensors[name] = own
                found.live_key_of[name] = spelled
        for name, tensor in live.items():
            if id(tensor) not in covered:
                _keep_left_out(key, name, tensor, found)
        for name, value in unclear.items():
            if name in found.tensors and _is_copy(value, found.tensors[name]):
                found.live_key_of[name] = found.key_of[name]
            else:
                found.values[name] = value
    return found


def encode_values(
    key: str, state: StateDict, aliases: Mapping[str, str], tensors: dict[str, torch.Tensor]
) -> Any:
    """JSON of what state_dict() holds besides live tensors; its tensors are added to `tensors` by name.

    A live tensor inside a nested value is referred to by its own name. A tensor that the module returns under
    the name of a live one gets another name.
    """
    mine: dict[str, torch.Tensor] = {}
    if all(isinstance(name, str) and not name.startswith("$") for name in state.values):
        # The order of a state dict's own keys means nothing; the order inside its values may.
        document: Any = {
            name: values.encode(value, f"{key}.{name}", mine, keep_order=True)
            for name, value in state.values.items()
        }
    else:
        document = values.encode(state.values, key, mine, keep_order=True)
    with torch.no_grad():
        by_memory = _by_memory(state.tensors) if mine else {}
        names: dict[str, str] = {}
        for path, tensor in mine.items():
            memory = _memory(tensor)
            if memory is not None and memory in by_memory:
                name = f"{key}.{by_memory[memory]}"
                names[path] = aliases.get(name, name)
                continue
            inside = path.removeprefix(f"{key}.")
            names[path] = f"{key}.{HANDED_OUT}.{inside}" if inside in state.tensors else path
            tensors[names[path]] = tensor
    return values.with_tensor_names(document, names.__getitem__)


def is_extra_state(name: Any) -> bool:
    """Whether it is the name of what a module's get_extra_state() returns."""
    return isinstance(name, str) and name.rpartition(".")[2] == EXTRA_STATE


def has_own_state_dict(root: nn.Module) -> bool:
    """Whether code outside torch takes part in state_dict(): it may return other values at each call."""
    return any(_takes_part(module) for module in root.modules())


def overrides_loading(module: nn.Module) -> bool:
    """Whether load_state_dict() itself is not torch's."""
    return not _is_torchs(_function(module, "load_state_dict"))


def has_own_loading(module: nn.Module) -> bool:
    """Whether code outside torch takes part in loading this module itself, not its children."""
    if overrides_loading(module) or not _is_torchs(_function(module, "_load_from_state_dict")):
        return True
    # torch wraps pre-hooks in an object and keeps the function in its attribute `hook`.
    pre = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    hooks = [*pre, *module._load_state_dict_post_hooks.values()]
    return any(not _is_torchs(hook) for hook in hooks)


def live_tensors(tree: Iterable[NamedModule]) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer by canonical name; tied ones under each of their names."""
    found: dict[str, torch.Tensor] = {}
    for named in tree:
        module = named.module
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(named.name + name, parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found.setdefault(named.name + name, buffer)
    return found


def buffer_names(root: nn.Module) -> dict[str, bool]:
    """Canonical name of each persistent buffer -> whether it is a tensor and not None."""
    return {
        named.name + name: buffer is not None
        for named in named_modules(root)
        for name, buffer in named.module._buffers.items()
        if name not in named.module._non_persistent_buffers_set
    }


def _keep_left_out(key: str, name: str, tensor: torch.Tensor, found: StateDict) -> None:
    """Keep a tensor that state_dict() leaves out, or returns a copy of: a rebuilt module needs it."""
    if name in found.tensors:
        raise UnsavableValueError(
            f"{key}.{name}: state_dict() returns another tensor of the module under this name, and leaves "
            "this one out; give each a name of its own"
        )
    found.tensors[name] = tensor


def _same(value: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether a value is a live tensor or a view of all of it, as `detach` makes one."""
    if value is own:
        return True
    dense = value.layout is torch.strided and not value.is_nested
    plain = type(value) in _PLAIN_TYPES and type(own) in _PLAIN_TYPES and dense
    if plain and (address := value.data_ptr()):
        return (
            address == own.data_ptr()
            and value.shape == own.shape
            and value.dtype == own.dtype
            and value.stride() == own.stride()
            and value.is_conj() == own.is_conj()
            and value.is_neg() == own.is_neg()
        )
    memory = _memory(value)
    if memory is None:  # no elements to compare, so nothing can be lost
        return value.layout == own.layout and _memory(own) is None and value.shape == own.shape
    return memory == _memory(own)


def _by_memory(tensors: Mapping[str, torch.Tensor]) -> dict[Hashable, str]:
    """Memory of each tensor -> the first name of a tensor in that memory."""
    found: dict[Hashable, str] = {}
    for name, tensor in tensors.items():
        found.setdefault(_memory(tensor), name)
    return found


def _elsewhere(
    value: torch.Tensor, live: Mapping[str, torch.Tensor], by_memory: Mapping[Hashable, str]
) -> torch.Tensor | None:
    """The live tensor of another name that has the same memory as the value."""
    memory = _memory(value)
    if memory is None:
        return next((tensor for tensor in live.values() if tensor is value), None)
    return live[by_memory[memory]] if memory in by_memory else None


def _memory(tensor: torch.Tensor) -> Hashable:
    """Where a tensor's elements are and how they are laid out; None for empty, sparse and meta tensors."""
    if is_lazy(tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    if tensor.is_nested or tensor.is_quantized or tensor.numel() == 0:
        return None
    lazily = (tensor.is_conj(), tensor.is_neg())
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        kind = (tensor.shape, tensor.placements, tensor.device_mesh)
        return (kind, _memory(local) if local.numel() else (local.shape, local.dtype))
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        return (type(tensor), tensor.shape, *(_memory(getattr(tensor, name)) for name in names))
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), *lazily)


def _is_copy(value: Any, live: torch.Tensor) -> bool:
    """Whether a value equals a copy of the live tensor, perhaps in a smaller dtype."""
    if not isinstance(value, torch.Tensor) or value.shape != live.shape:
        return False
    if isinstance(value, DTensor):
        if not isinstance(live, DTensor) or _spread(value) != _spread(live):
            return False
        value, live = value.to_local(), live.to_local()
    elif isinstance(live, DTensor):  # gathered, perhaps: every rank compares its own part
        chunks = live.__create_chunk_list__()  # type: ignore[no-untyped-call]
        if len(chunks) != 1:
            return False
        for dim, (begin, size) in enumerate(zip(chunks[0].offsets, chunks[0].sizes, strict=True)):
            value = value.narrow(dim, begin, size)
        live = live.to_local()
        if value.shape != live.shape:
            return False
    plain = all(type(t) in (torch.Tensor, nn.Parameter) and t.layout is torch.strided for t in (value, live))
    if not plain or value.is_quantized or live.is_quantized:
        return False
    return torch.equal(_bytes(live.to(value.device, value.dtype)), _bytes(value))


def _spread(tensor: DTensor) -> Any:
    return tensor.placements, tensor.device_mesh


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # A NaN does not equal itself, but its bytes do.
    return bytes_of(tensor.detach().resolve_conj().resolve_neg().contiguous())


def _prefixes(tree: Iterable[NamedModule]) -> dict[str, str]:
    """Prefix of each module's keys in state_dict() -> its canonical prefix."""
    return {named.prefix: named.name for named in tree}


def _canonical(spelled: str, prefixes: Mapping[str, str]) -> str:
    """The key without wrappers, by the longest module prefix that it begins with."""
    end = spelled.rfind(".")
    while end >= 0:
        prefix = spelled[: end + 1]
        if prefix in prefixes:
            return prefixes[prefix] + spelled[end + 1 :]
        end = spelled.rfind(".", 0, end)
    return spelled


def _takes_part(module: nn.Module) -> bool:
    kind = type(module)
    if kind.get_extra_state is not nn.Module.get_extra_state:
        return True
    hooks = [*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()]
    if any(not _is_torchs(hook) for hook in hooks):
        return True
    return any(not _is_torchs(_function(module, name)) for name in _SAVING)


def _function(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name) or getattr(type(module), name)


def _is_torchs(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    home = getattr(function, "__module__", None) or type(function).__module__
    return home in _OWN_CODE or home.startswith("torch.")
