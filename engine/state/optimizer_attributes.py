"""Tensors and numbers in an optimizer's attributes, which neither torch nor Holdfast saves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.optim import Optimizer

from engine.errors import UnsavableValueError
from engine.state.optimizer_kinds import local_part, saves_itself, state_of
from engine.state.parameter_names import ParameterNames, loose_tensors

_SAVED = ("param_groups", "state", "defaults")


def check_attributes(key: str, optimizer: Optimizer, names: ParameterNames) -> None:
    """Refuse an optimizer whose attributes hold tensors that would be lost: slow weights, a history.

    An optimizer with a state_dict of its own saves what it needs. Integer tensors of one element are flags
    for kernels.
    Raises: UnsavableValueError naming the attribute.
    """
    if saves_itself(optimizer) or local_part(optimizer) is not None:
        return
    kept = [item for item in _in_attributes(optimizer) if item[1].is_floating_point() or item[1].numel() > 1]
    if not kept:
        return
    saved = {_memory(tensor) for tensor in _known(optimizer)}
    for attribute, tensor in kept:
        if _memory(tensor) in saved or names.of(tensor):
            continue
        top = attribute.partition(".")[0]
        raise UnsavableValueError(
            f"{key}: the {type(optimizer).__name__} keeps a tensor of shape {list(tensor.shape)} in its "
            f"attribute {attribute}, outside its state, so it would be lost; add it to the state yourself, "
            f"{{'{key}_{top.strip('_')}': optimizer.{top}}}, or give the optimizer a state_dict() and a "
            "load_state_dict()"
        )


def numbers_of(optimizer: Optimizer) -> dict[str, float]:
    """The numbers in an optimizer's public attributes; {} for one with a state_dict of its own."""
    if saves_itself(optimizer) or local_part(optimizer) is not None:
        return {}
    found = ((name, value) for name, value in vars(optimizer).items() if not name.startswith("_"))
    return {name: value for name, value in found if type(value) in (int, float)}


def changed_numbers(key: str, optimizer: Optimizer, before: Mapping[str, float]) -> list[str]:
    """One sentence for each number that training has changed: perhaps a count of steps."""
    return [
        f"{key}: the attribute {name} of the {type(optimizer).__name__} has changed from {before[name]} to "
        f"{value}, and attributes are not saved; if it matters, keep it in the optimizer's state or groups, "
        "or give the optimizer a state_dict() and a load_state_dict()"
        for name, value in numbers_of(optimizer).items()
        if name in before and before[name] != value
    ]


def _in_attributes(optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in vars(optimizer).items():
        if name not in _SAVED:
            yield from loose_tensors(name, value)


def _known(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        for _, tensor in loose_tensors("", {name: group[name] for name in group if name != "params"}):
            yield tensor
    for entry in state_of(optimizer).values():
        for _, tensor in loose_tensors("", entry):
            yield tensor


def _memory(tensor: torch.Tensor) -> int:
    """What identifies a tensor's memory: views are saved with the tensor that they view."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):  # the tensor has no storage of its own
        return id(tensor)
