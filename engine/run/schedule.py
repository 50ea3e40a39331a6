"""When to evaluate, when to save and why. Pure decisions; at most one save per step."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.format.best import DEFAULT, BestRule

REASONS_IN_ORDER = ("interval", "epoch", "best", "signal", "final")
"""The trainer's reasons to save, in the order in which a checkpoint lists them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """The state at the end of a step; `step` counts from 1."""

    step: int
    closed_epoch: bool = False
    improved: bool = False
    signalled: bool = False
    last: bool = False


def save_reasons(end: StepEnd, checkpoint_freq: int) -> tuple[str, ...]:
    """All reasons to save now, so that one save serves them all; empty for no save."""
    holds = {
        "interval": due(end.step, checkpoint_freq),
        "epoch": end.closed_epoch,
        "best": end.improved,
        "signal": end.signalled,
        "final": end.last,
    }
    return tuple(reason for reason in REASONS_IN_ORDER if holds[reason])


def due(step: int, freq: int) -> bool:
    """Whether an action that runs every `freq` steps runs after `step`; never if `freq` is 0."""
    return freq > 0 and step % freq == 0


def may_skip(reasons: Collection[str]) -> bool:
    """Whether this save may be skipped while another one runs: only a plain interval save will recur."""
    return set(reasons) <= {"interval"}


def last_step(max_steps: int | None, num_epochs: int | None, steps_per_epoch: int) -> int:
    """The step after which the run ends: the earlier of both limits, or one epoch without a limit."""
    if num_epochs is None and max_steps is None:
        return steps_per_epoch
    limits = [max_steps, None if num_epochs is None else num_epochs * steps_per_epoch]
    return min(limit for limit in limits if limit is not None)


@dataclass(slots=True)
class BestLoss:
    """The best value of a metric, such as the validation loss, among saved checkpoints and saves in flight.

    Only rank 0 keeps it: ranks learn of a failed save at different times and would decide differently.
    """

    committed: float | None = None
    rule: BestRule = DEFAULT
    _promised: dict[int, float] = field(default_factory=dict)

    def improves(self, value: float) -> bool:
        """Whether `value` is finite and better than all values so far."""
        known = [*self._promised.values(), *([] if self.committed is None else [self.committed])]
        return math.isfinite(value) and all(self.rule.beats(value, other) for other in known)

    def promise(self, step: int, value: float) -> None:
        """A save of `step` with `value` has been announced."""
        self._promised[step] = value

    def settle(self, step: int, *, committed: bool) -> None:
        """The save of `step` has ended: keep its value if it committed, else forget it."""
        value = self._promised.pop(step, None)
        if not committed or value is None:
            return
        if self.committed is None or self.rule.beats(value, self.committed):
            self.committed = value
