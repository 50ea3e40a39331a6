"""How an optimizer under test is built and stepped, and on which model.

A class without a recipe is built as `cls(groups, lr=1e-3)` and stepped with a plain `step()`. `classes_of`
finds the classes by reflection, so that a new one is tested without anybody's help, or fails until it has a
recipe.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

LIBRARIES = ("torch.optim", "pytorch_optimizer", "schedulefree", "heavyball", "torchao.optim")
STEPS = 5
"""Before the save, and again after the restore."""


class Model(nn.Module):
    """Matrices, vectors, a frozen layer, a bfloat16 layer, and a parameter that never has a gradient."""

    def __init__(self, *, rich: bool, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.frozen = nn.Linear(width, width)
        self.frozen.requires_grad_(not rich)
        self.last = nn.Linear(width, width)
        if rich:
            self.idle = nn.Parameter(torch.ones(width, 4))
            self.low = nn.Linear(width, width).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.frozen(self.norm(self.first(x))))
        if hasattr(self, "low"):
            x = x + self.low(x.to(torch.bfloat16)).to(x.dtype)
        return self.last(x)


Build = Callable[[type, nn.Module], Optimizer]
Step = Callable[[Optimizer, nn.Module, Callable[[], torch.Tensor]], None]


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, and everything else with another weight decay."""
    named = list(model.named_parameters())
    matrices = [p for _, p in named if p.ndim == 2]
    return [{"params": matrices}, {"params": [p for _, p in named if p.ndim != 2], "weight_decay": 0.0}]


def matrices_of(model: nn.Module) -> list[torch.Tensor]:
    """The matrices that are trained."""
    return [p for p in model.parameters() if p.ndim == 2 and p.requires_grad]


def default_build(cls: type, model: nn.Module) -> Optimizer:
    """`cls` over two groups with a learning rate."""
    built: Optimizer = cls(groups_of(model), lr=1e-3)
    return built


def default_step(optimizer: Optimizer, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """The usual order: gradients, step, gradients away."""
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()


def closure_step(optimizer: Optimizer, model: nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """For optimizers that ask for the loss themselves."""

    def closure() -> torch.Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            value = loss()
            value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Recipe:
    """How one class is built and stepped.

    rich: whether the model has a frozen layer, a bfloat16 one and a parameter without a gradient.
    width: of every layer; some methods treat small parameters in another way.
    """

    build: Build = default_build
    step: Step = default_step
    rich: bool = True
    width: int = 16


def classes_of(library: str) -> dict[str, type]:
    """Every optimizer class that a library exports, by name."""
    module = importlib.import_module(library)
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
