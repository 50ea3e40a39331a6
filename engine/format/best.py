"""Which checkpoint is best: by which metric, and whether high or low is good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Mode = Literal["min", "max"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True, slots=True)
class BestRule:
    """The deciding metric, and whether its lowest (min) or highest (max) value is best."""

    metric: str = "val_loss"
    mode: Mode = "min"

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric or not self.metric.isprintable():
            raise ValueError(f"metric {str(self.metric)[:80]!r}: it must be the name of a metric")
        if self.mode not in MODES:
            raise ValueError(f"mode {str(self.mode)[:80]!r}: it must be min or max")

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """The metric's value; None if it is missing or not finite: such a checkpoint is never best."""
        value = metrics.get(self.metric)
        return value if value is not None and math.isfinite(value) else None

    def badness(self, value: float) -> float:
        """A sort key: the best value sorts first."""
        return value if self.mode == "min" else -value

    def beats(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`."""
        return self.badness(value) < self.badness(other)

    @property
    def label(self) -> str:
        """The metric's name in messages."""
        return "val loss" if self.metric == "val_loss" else self.metric

    @property
    def selector(self) -> str:
        """The selector of the best by this rule, independent of the rule stored in the checkpoints."""
        return f"best:{self.metric}:{self.mode}"

    def to_json(self) -> dict[str, Any]:
        """As in the manifest."""
        return {"metric": self.metric, "mode": self.mode}


DEFAULT = BestRule()
"""The rule of a run that sets none; a manifest omits it."""
