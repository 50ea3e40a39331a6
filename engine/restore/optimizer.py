"""Give an optimizer the state tensors to read into, and its groups their saved hyperparameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer

from engine.errors import DamagedError
from engine.snapshot.optimizers import OptimizerCapture


def ensure_state(module: nn.Module, optimizer: Optimizer) -> bool:
    """Create the state tensors of a fresh optimizer, as a step with zero gradients leaves them.

    DCP's `get_optimizer_state_dict` does it, with a learning rate of zero; it discards gradients and does
    nothing when there are some, so they are put aside meanwhile.
    Returns: whether it did; an optimizer that has state keeps it.
    """
    if any(optimizer.state.values()):
        return False
    with _gradients_aside(optimizer):
        get_optimizer_state_dict(module, optimizer)
    return True


@contextmanager
def _gradients_aside(optimizer: Optimizer) -> Iterator[None]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def parameters_without_state(
    capture: OptimizerCapture, saved: Iterable[str], document: Mapping[str, Any]
) -> set[str]:
    """The parameters that had no optimizer state when the checkpoint was taken (before a first step, frozen).

    Args:
        saved: all saved tensor names, aliases included.
        document: the optimizer's saved values; state that is not a tensor is among them.
    """
    prefix = f"{capture.key}.state."
    with_state = {name.removeprefix(prefix).rpartition(".")[0] for name in saved if name.startswith(prefix)}
    with_state |= {name.rpartition(".")[0] for name in document.get("counters", ())}
    return {name for names in capture.group_names() for name in names if name not in with_state}


def group_differences(capture: OptimizerCapture, document: Mapping[str, Any]) -> list[str]:
    """One sentence for each live group whose parameters were not in one group together when saved."""
    saved_groups = _saved_groups(capture.key, document)
    lines = []
    for number, names in enumerate(capture.group_names()):
        homes = {saved_groups[name][0] for name in names if name in saved_groups}
        if len(homes) > 1:
            lines.append(
                f"{capture.key}: the parameters of group {number} were in groups {sorted(homes)} when saved"
            )
    return lines


def apply_groups(capture: OptimizerCapture, document: Mapping[str, Any]) -> None:
    """Set every group's hyperparameters, and the counters that are not tensors, to the saved ones.

    A hyperparameter that is a tensor here (a capturable learning rate) stays that tensor.
    """
    saved_groups = _saved_groups(capture.key, document)
    for group, names in zip(capture.optimizer.param_groups, capture.group_names(), strict=True):
        _, saved = next((saved_groups[name] for name in names if name in saved_groups), (0, {}))
        for key, value in saved.items():
            if key == "params":
                continue
            live = group.get(key)
            if isinstance(live, torch.Tensor):
                with torch.no_grad():
                    live.copy_(torch.as_tensor(value))
            else:
                group[key] = value
    counters = document.get("counters", {})
    for parameter, name in capture.named_parameters():
        entry = capture.optimizer.state.get(parameter)
        for field_name in list(entry or ()):
            if f"{name}.{field_name}" in counters:
                assert entry is not None
                entry[field_name] = counters[f"{name}.{field_name}"]


def drop_state(capture: OptimizerCapture, names: set[str]) -> None:
    """Forget the state of the parameters that had none when saved."""
    for parameter, name in capture.named_parameters():
        if name in names:
            capture.optimizer.state.pop(parameter, None)


def _saved_groups(key: str, document: Mapping[str, Any]) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Parameter name -> (group number, group), as saved."""
    groups = document.get("param_groups")
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise DamagedError(f"the saved values of {key} are not those of an optimizer")
    return {str(name): (number, group) for number, group in enumerate(groups) for name in group["params"]}
