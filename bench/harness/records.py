"""Measurements as values: what several ranks saw as one, medians with their spread, and failures. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that could not run or broke down on the way, and is left out from then on."""

    row: str
    stage: str
    error: str


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of some samples. A run has too few repeats for anything finer."""

    middle: float
    low: float
    high: float
    samples: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """None without values; a value of None does not count."""
        known = [value for value in values if value is not None]
        return cls(median(known), min(known), max(known), len(known)) if known else None


def ratio(part: Spread | None, whole: Spread | None) -> float | None:
    """The ratio of two medians of one run."""
    return part.middle / whole.middle if part and whole and whole.middle > 0 else None


def paired_ratio(part: Sequence[float], whole: Sequence[float]) -> float:
    """The median ratio over the repeats: both samples of one repeat share the conditions of the machine."""
    return median(one / other for one, other in zip(part, whole, strict=False))


def shuffled(items: Iterable[T], seed: int, repeat: int) -> list[T]:
    """The order of one repeat, the same on every rank: drift of the machine affects all rows alike."""
    order = list(items)
    random.Random(f"{seed}/{repeat}").shuffle(order)
    return order


def merge(ranks: Sequence[T]) -> T:
    """One record of what every rank saw: the slowest rank's times, and everybody's CPU time and bytes.

    The name of a field tells how it is merged; fields of other names are equal on all ranks, or rank 0's.
    """

    def merged(name: str) -> Any:
        values = [value for one in ranks if (value := getattr(one, name)) is not None]
        if name == "step_secs":
            return tuple(max(secs) for secs in zip(*values, strict=True))
        if name == "written_bytes":
            return tuple(chain.from_iterable(values))
        if name.endswith("cpu_secs"):
            return sum(values)
        if name.endswith("_secs") or name == "growth_bytes":
            return max(values, default=None)
        return values[0] if values else None

    first: Any = ranks[0]
    result: T = replace(first, **{field.name: merged(field.name) for field in fields(first)})
    return result
