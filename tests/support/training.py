"""Small training states, and what it takes to say that one equals another to the bit."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

INPUTS = 6


def model(seed: int = 0, width: int = 5) -> nn.Sequential:
    """Two layers, with buffers and dropout between them."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 3)
    )


def train(
    network: nn.Module, optimizer: Optimizer, steps: int = 1, *, schedule: Any = None, rows: int = 8
) -> list[float]:
    """Steps on random rows. The losses depend on every bit of model, optimizer, schedule and generators."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network(torch.randn(rows, INPUTS)).square().mean()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step(*([loss.item()] if hasattr(schedule, "patience") else []))
        losses.append(loss.item())
    return losses


def photograph(state: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of everything that a checkpoint of this state should bring back."""
    return {key: _copied(_values(entry)) for key, entry in state.items()}


def differences(one: Any, two: Any, path: str = "") -> list[str]:
    """The key paths at which two photographs differ in type, dtype, shape or bits."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return [] if same_bits(one, two) else [path]
    if type(one) is not type(two):
        return [f"{path}: {type(one).__name__} and {type(two).__name__}"]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{path}: keys {set(one) ^ set(two)}"]
        return [line for key in one for line in differences(one[key], two[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(two):
            return [f"{path}: {len(one)} and {len(two)} items"]
        pairs = enumerate(zip(one, two, strict=True))
        return [line for at, (a, b) in pairs for line in differences(a, b, f"{path}.{at}")]
    return [] if one == two or (one != one and two != two) else [f"{path}: {one!r} and {two!r}"]


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal to the bit: NaN equals itself, -0.0 does not equal 0.0."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    return bool(torch.equal(_bytes(one), _bytes(two)))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _values(entry: Any) -> Any:
    return entry.state_dict() if hasattr(entry, "state_dict") else entry


def _copied(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor().detach().clone()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        copied = {key: _copied(inner) for key, inner in value.items()}
        return Counter(copied) if isinstance(value, Counter) else copied
    if isinstance(value, list | tuple):
        return type(value)(_copied(inner) for inner in value)
    return copy.deepcopy(value)
