"""The learning-rate schedule: a pure function of the step, and the object that applies it.

The shape is that of nanoGPT's `get_lr`, counted from step 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LrShape:
    """Linear warm-up to `peak` at step `warmup_steps`, then a cosine down to `floor` at step `decay_steps`.

    Raises:
        ConfigError: the floor is above the peak.
    """

    peak: float
    floor: float
    warmup_steps: int
    decay_steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.peak:
            raise ConfigError(f"--min_lr {self.floor:g} must be between 0 and --lr {self.peak:g}")


def lr_at(step: int, shape: LrShape) -> float:
    """The learning rate of optimizer step `step`, counted from 1.

    If the warm-up is longer than the decay, the rate drops to the floor right after it.
    """
    if step <= shape.warmup_steps:
        return shape.peak * step / shape.warmup_steps
    if step >= shape.decay_steps:
        return shape.floor
    progress = (step - shape.warmup_steps) / (shape.decay_steps - shape.warmup_steps)
    return shape.floor + (shape.peak - shape.floor) * (1 + math.cos(math.pi * progress)) / 2


class HasGroups(Protocol):
    """The part of an optimizer that a schedule uses."""

    param_groups: list[dict[str, Any]]


class LrSchedule:
    """Sets an optimizer's learning rate before each step, and counts the steps.

    The shape comes from the flags, not from the state: a resumed run may have another `--lr`.
    """

    def __init__(self, optimizer: HasGroups, shape: LrShape) -> None:
        self._optimizer = optimizer
        self.shape = shape
        self.last_step = 0

    def advance(self) -> float:
        """Set and return the learning rate of the next step."""
        self.last_step += 1
        rate = lr_at(self.last_step, self.shape)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def state_dict(self) -> dict[str, Any]:
        """JSON: the last step whose rate was set."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.last_step = int(state["last_step"])
