"""When to evaluate, when to save and why: pure decisions, and one save a step at most."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.format.best import DEFAULT, BestRule

REASONS_IN_ORDER = ("interval", "epoch", "best", "signal", "final")
"""The reasons of the trainer, in the order in which a checkpoint lists them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnd:
    """What is known at the end of a step; `step` counts from 1."""

    step: int
    closed_epoch: bool = False
    improved: bool = False
    signalled: bool = False
    last: bool = False


def save_reasons(end: StepEnd, checkpoint_freq: int) -> tuple[str, ...]:
    """Why to save now: all the reasons at once, so that one save serves them; empty for no save."""
    holds = {
        "interval": due(end.step, checkpoint_freq),
        "epoch": end.closed_epoch,
        "best": end.improved,
        "signal": end.signalled,
        "final": end.last,
    }
    return tuple(reason for reason in REASONS_IN_ORDER if holds[reason])


def due(step: int, freq: int) -> bool:
    """Whether something that happens every `freq` steps happens after `step`; never for 0."""
    return freq > 0 and step % freq == 0


def may_skip(reasons: Collection[str]) -> bool:
    """Whether a busy writer may let this save fall out: only a plain interval save comes round again."""
    return set(reasons) <= {"interval"}


def last_step(max_steps: int | None, num_epochs: int | None, steps_per_epoch: int) -> int:
    """The step after which the run ends: the earlier of both limits, one epoch when there is none."""
    if num_epochs is None and max_steps is None:
        return steps_per_epoch
    limits = [max_steps, None if num_epochs is None else num_epochs * steps_per_epoch]
    return min(limit for limit in limits if limit is not None)


@dataclass(slots=True)
class BestLoss:
    """The best validation loss, or value of another metric, that a checkpoint has or is going to have.

    Kept by rank 0 alone: when a failed save becomes known differs between ranks, so each rank deciding by
    itself would let them part ways.
    """

    committed: float | None = None
    rule: BestRule = DEFAULT
    _promised: dict[int, float] = field(default_factory=dict)

    def improves(self, value: float) -> bool:
        """Whether `value` is better than every one so far; a NaN never is, and infinity never counts."""
        known = [*self._promised.values(), *([] if self.committed is None else [self.committed])]
        return math.isfinite(value) and all(self.rule.beats(value, other) for other in known)

    def promise(self, step: int, value: float) -> None:
        """A save of `step` that carries `value` is under way."""
        self._promised[step] = value

    def settle(self, step: int, *, committed: bool) -> None:
        """The save of `step` has ended: its value counts for good, or never did."""
        value = self._promised.pop(step, None)
        if not committed or value is None:
            return
        if self.committed is None or self.rule.beats(value, self.committed):
            self.committed = value
