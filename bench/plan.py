"""What is measured in which order: everything interleaved at random, alike on every rank. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.records import NONE, RAW

Kind = Literal["window", "idle", "floor"]

NONE_WINDOWS = 4
"""Windows without a save per repeat: every other row is compared with them, so they get more samples."""
COPY_PASSES = 3
WRITE_PASSES = 3
RAW_WINDOWS = 2
"""Windows in which the bytes of a save are written, and nothing else is done for it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to measure: a training window or an idle save of a row, or one pass of a floor."""

    kind: Kind
    row: str
    repeat: int


def order_of(rows: Sequence[str], repeat: int, seed: int) -> list[Item]:
    """Everything of one repeat, shuffled by (seed, repeat): drift of the machine hits all rows alike."""
    items = [Item("window", NONE, repeat)] * NONE_WINDOWS
    items += [Item(kind, row, repeat) for row in rows for kind in ("window", "idle")]
    items += [Item("floor", "copy", repeat)] * COPY_PASSES + [Item("floor", "write", repeat)] * WRITE_PASSES
    items += [Item("window", RAW, repeat)] * RAW_WINDOWS
    random.Random(f"{seed}/{repeat}").shuffle(items)
    return items


@dataclass(slots=True)
class WindowLength:
    """Decides when a window is long enough. Every rank asks with the same answers, so all agree.

    At least `minimum` steps, and never less than `quiet` steps after the save has been stored on all
    ranks, so that what a save leaves behind for the disk is charged to it.
    """

    minimum: int
    quiet: int = 2
    steps: int = 0
    calm: int = 0

    def after_step(self, *, in_flight: bool) -> bool:
        """Count a step, with some rank's save `in_flight` or none. Returns whether to go on."""
        self.steps += 1
        self.calm = 0 if in_flight else self.calm + 1
        return self.steps < self.minimum or self.calm < self.quiet
