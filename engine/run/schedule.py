"""When to evaluate, when to save and why, and whether to save after a signal. Pure decisions."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

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


Choice = Literal["save", "finish and save", "finish", "leave"]


@dataclass(frozen=True, slots=True)
class LastSave:
    """The decision after a signal, once the save in flight has ended.

    Args:
        step: the current step, not saved yet.
        in_flight: the step whose save was in flight when the signal arrived, if any.
        secs_left: seconds until the process must exit.
        usual_secs: how long a save usually takes; 0 if unknown, and then a save is tried.
    """

    step: int
    in_flight: int | None
    secs_left: float
    usual_secs: float

    @property
    def choice(self) -> Choice:
        """No margin on top of the usual time: an interrupted save does no harm."""
        if self.secs_left < self.usual_secs:
            return "leave" if self.in_flight is None else "finish"
        return "save" if self.in_flight is None else "finish and save"

    @property
    def sentence(self) -> str:
        """The decision and its reason, for the console."""
        figures = f"{self.secs_left:.1f} s left, a save takes {self.usual_secs:.1f} s"
        ended = "" if self.in_flight is None else f"the save of step {self.in_flight} has ended, "
        match self.choice:
            case "save" | "finish and save":
                return f"{ended}saving step {self.step} ({figures})"
            case _:
                return f"{ended}no time to save step {self.step} ({figures})"


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
