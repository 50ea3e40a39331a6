"""Whether overlapped copies are safe for a state: only optimizer steps that are handed over may change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


def state_device(state: Mapping[str, Any]) -> torch.device:
    """The device that the modules' parameters live on; CPU when there are none."""
    for entry in state.values():
        if isinstance(entry, nn.Module):
            for parameter in entry.parameters():
                return torch.device(parameter.device)
    return torch.device("cpu")


def why_unguarded(state: Mapping[str, Any]) -> str | None:
    """Why a change of the parameters could not be held back until they are copied, or None if it can.

    Every trainable parameter must belong to an optimizer of the state: one that is fused into the backward
    pass steps where no hook of ours runs. A captured step runs no Python at all, a compiled one may not.
    And all must lie on one device, for what is copied on others the stream of that one does not order.
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
        # Torch marks a step that runs hooks so; a class that does not call Optimizer.__init__ lacks it.
        if not getattr(optimizer.step, "hooked", False):
            return f"the step of a {type(optimizer).__name__} runs no hooks"
    return None


def methods_beside_step(optimizer: Optimizer) -> list[str]:
    """Public methods beyond those of torch: train() and eval() of schedulefree, first_step() of SAM.

    No hook of ours runs before those, so nothing would hold them back from weights that are being copied.
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
