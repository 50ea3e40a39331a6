"""Whether copies may overlap with training, and the stream that they then run on.

They may if only the steps of the state's own optimizers change what is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from engine.save.staging_copy import CopyStream, CudaStream


def overlap_stream(
    setting: bool | str, device: torch.device, why_not: Callable[[], str | None]
) -> tuple[CopyStream | None, str]:
    """The side stream to copy on, or None if copies do not overlap; and the reason.

    Args:
        setting: "auto", or False to copy before `save` returns.
        why_not: returns why parameter changes cannot be delayed until the copy is done, or None.
    """
    if setting is False:
        return None, "overlap is switched off"
    if device.type != "cuda":
        return None, "the state is in host memory"
    reason = why_not()
    if reason is not None:
        return None, reason
    return CudaStream(device), "copies overlap with training"


def state_device(state: Mapping[str, Any]) -> torch.device:
    """The device of the modules' parameters; the CPU when there are none."""
    for entry in state.values():
        if isinstance(entry, nn.Module):
            for parameter in entry.parameters():
                return torch.device(parameter.device)
    return torch.device("cpu")


def why_unguarded(state: Mapping[str, Any]) -> str | None:
    """Why parameter changes cannot be delayed until the parameters are copied, or None if they can.

    Every trainable parameter must belong to an optimizer of the state, and its `step` must run our hook. An
    optimizer fused into the backward pass runs no hook, a captured step runs no Python at all, and a compiled
    one may not. All parameters must be on one device: its stream does not order copies on other devices.
    """
    modules = [entry for entry in state.values() if isinstance(entry, nn.Module)]
    if len({parameter.device for module in modules for parameter in module.parameters()}) > 1:
        return "the parameters lie on several devices"
    optimizers = [entry for entry in state.values() if isinstance(entry, Optimizer)]
    owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for key, entry in state.items():
        if isinstance(entry, nn.Module):
            for name, parameter in entry.named_parameters():
                if parameter.requires_grad and id(parameter) not in owned:
                    return f"{key}.{name} is trainable but belongs to no optimizer in the state"
    for optimizer in optimizers:
        if any(group.get("capturable") for group in optimizer.param_groups):
            return "an optimizer's step is captured in a CUDA graph"
        others = methods_beside_step(optimizer)
        if others:
            return (
                f"a {type(optimizer).__name__} has methods besides step() that may change weights: "
                f"{', '.join(others)}"
            )
        if "torch._dynamo" in getattr(type(optimizer).step, "__module__", "") or hasattr(
            optimizer.step, "_torchdynamo_orig_callable"
        ):
            return "an optimizer's step is compiled"
        # torch sets this on a step that runs hooks; a class that skips Optimizer.__init__ lacks it.
        if not getattr(optimizer.step, "hooked", False):
            return f"the step of a {type(optimizer).__name__} runs no hooks"
    return None


def methods_beside_step(optimizer: Optimizer) -> list[str]:
    """Public methods that torch's Optimizer lacks: train() and eval() of schedulefree, first_step() of SAM.

    No hook runs before them, so they could change weights during the copy.
    """
    return sorted(
        {
            name
            for base in type(optimizer).__mro__
            if not base.__module__.startswith("torch.optim")
            for name, value in vars(base).items()
            if callable(value) and not name.startswith("_") and not hasattr(Optimizer, name)
        }
        - {"step"}
    )
