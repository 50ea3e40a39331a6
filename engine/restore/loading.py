"""Hand a module what its state_dict() held besides live tensors, after these were filled in place."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_any

from engine.errors import RestoreFailedError
from engine.state.metrics import UPDATE_COUNTS, set_update_counts
from engine.state.optimizer_state_dicts import first_difference
from engine.state.state_dicts import (
    EXTRA_STATE,
    StateDict,
    has_own_loading,
    is_extra_state,
    live_tensors,
    module_to_ask,
    overrides_loading,
    read_state_dict,
)
from engine.state.wrappers import NamedModule, named_modules, spelled_as

log = logging.getLogger(__name__)


def load_values(
    key: str,
    module: nn.Module,
    document: Mapping[Any, Any],
    loose: Mapping[str, torch.Tensor],
    *,
    strict: bool,
) -> None:
    """Give a module its saved values, through load_state_dict() where code of its own takes part.

    loose: saved tensors that match no live tensor.
    Raises: RestoreFailedError naming the module when it does not accept them.
    """
    module = module_to_ask(module)
    tree = named_modules(module)
    document = dict(document)
    counts = document.pop(UPDATE_COUNTS, {})
    only_extra = all(is_extra_state(name) for name in document) and not loose
    try:
        if only_extra and not any(has_own_loading(named.module) for named in tree):
            _set_extra_state(tree, document)
            return
        with torch.no_grad():
            # Values of state_dict() may be rounded, and loading them would round the live tensors.
            exact = _copies(tree) if tree_any(_is_tensor, document) else {}
            now = read_state_dict(key, module)
            unused = _load(module, _whole(now, tree, {**document, **loose}), strict=strict)
            if strict and (unknown := unused - set(now.key_of.values())):
                raise ValueError(f"unexpected keys: {', '.join(sorted(unknown)[:5])}")
            _fill(named_modules(module), {**exact, **loose})
            set_update_counts(tree, counts)
            untaken = {name: value for name, value in document.items() if now.key_of.get(name) in unused}
            if untaken:
                _tell_untaken(key, module, untaken)
    except Exception as error:
        raise RestoreFailedError(
            f"{key}: load_state_dict() of {type(module).__qualname__} did not accept what was saved, and "
            f"the state is now undefined: {type(error).__name__}: {error}"
        ) from error


def set_to_none(module: nn.Module, names: set[str]) -> None:
    """Set buffers to None that were None when saved."""
    for named in named_modules(module) if names else ():
        for name in named.module._buffers:
            if named.name + name in names:
                named.module._buffers[name] = None


def has_own_loader(name: str, tree: Sequence[NamedModule]) -> bool:
    """Whether code outside torch may load what was saved under a canonical name."""
    return overrides_loading(tree[0].module) or has_own_loading(_innermost(name, tree).module)


def _innermost(name: str, tree: Sequence[NamedModule]) -> NamedModule:
    # The last of the longest names: a wrapper has the name of the module inside and comes before it.
    return max(
        (len(named.name), number, named) for number, named in enumerate(tree) if name.startswith(named.name)
    )[2]


def _whole(now: StateDict, tree: Sequence[NamedModule], saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """The state dict to load: the live tensors, which have been filled, and the saved values."""
    whole: dict[Any, Any] = {now.key_of[name]: now.tensors[name] for name in now.live_key_of}
    # A value that is left out keeps its live value.
    whole |= {now.key_of[n]: value for n, value in now.values.items() if n != UPDATE_COUNTS}
    for name, value in saved.items():
        spelled = now.key_of.get(name)
        if spelled is None and isinstance(name, str):
            named = _innermost(name, tree)
            spelled = named.prefix + name[len(named.name) :]
        whole[name if spelled is None else spelled] = value
    return whole


def _load(module: nn.Module, whole: Mapping[Any, Any], *, strict: bool) -> set[str]:
    """Load a state dict. Returns the keys that nothing has loaded."""
    if overrides_loading(module):
        takes_strict = "strict" in inspect.signature(module.load_state_dict).parameters
        module.load_state_dict(whole, **({} if strict or not takes_strict else {"strict": False}))
        return set()
    # Missing keys do no harm: the live tensors have been filled.
    return {spelled_as(module, name) for name in module.load_state_dict(whole, strict=False).unexpected_keys}


def _tell_untaken(key: str, module: nn.Module, saved: Mapping[Any, Any]) -> None:
    """Warn of values that a hook adds to state_dict() and no hook loads, if the live ones differ.

    Most are computed from the weights for another program, and are equal.
    """
    live = read_state_dict(key, module).values
    for name, value in saved.items():
        difference = first_difference(f"{key}.{name}", value, live.get(name))
        if difference:
            log.warning(
                "%s: not restored, because load_state_dict() of %s ignores it",
                difference,
                type(module).__qualname__,
            )


def _copies(tree: Sequence[NamedModule]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in live_tensors(tree).items()}


def _fill(tree: Sequence[NamedModule], exact: Mapping[str, torch.Tensor]) -> None:
    live = live_tensors(tree)
    for name, value in exact.items():
        if name in live and live[name].shape == value.shape:
            live[name].detach().copy_(value)


def _set_extra_state(tree: Sequence[NamedModule], saved: Mapping[str, Any]) -> None:
    for named in tree:
        key = named.name + EXTRA_STATE
        # A wrapper (DDP, torch.compile) has the canonical name of the module inside.
        has_some = type(named.module).get_extra_state is not nn.Module.get_extra_state
        if has_some and key in saved:
            named.module.set_extra_state(saved[key])


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)
