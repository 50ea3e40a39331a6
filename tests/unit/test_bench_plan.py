"""The order of measurements, and when a window ends."""

from __future__ import annotations

from collections import Counter

import pytest

from bench.cases.save.session import (
    COPY_PASSES,
    NONE_WINDOWS,
    RAW_WINDOWS,
    WRITE_PASSES,
    items_of,
)
from bench.cases.save.window import WindowLength
from bench.harness.records import shuffled

ROWS = ["torch.save", "dcp.async_save", "holdfast"]


def test_a_repeat_measures_everything() -> None:
    counts = Counter(items_of(ROWS))
    assert counts == {
        ("window", "none"): NONE_WINDOWS,
        ("floor", "copy"): COPY_PASSES,
        ("floor", "write"): WRITE_PASSES,
        ("window", "raw write"): RAW_WINDOWS,
        **{(kind, row): 1 for kind in ("window", "idle") for row in ROWS},
    }


def test_every_repeat_has_its_own_order_and_every_rank_the_same() -> None:
    items = items_of(ROWS)
    orders = [shuffled(items, 1, repeat) for repeat in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(Counter(order) == Counter(items) for order in orders)
    assert shuffled(items, 1, 2) == orders[2]
    assert shuffled(items, 5, 2) != orders[2]


@pytest.mark.parametrize(
    ("in_flight", "steps"),
    [
        ([], 4),  # nothing to wait for: the minimum
        ([True], 4),  # stored in the first step: two calm ones are within the minimum
        ([True] * 3, 5),
        ([True] * 9, 11),
        ([False, True], 4),  # calm is counted from the end of the save
    ],
)
def test_a_window_lasts_two_steps_longer_than_its_save(in_flight: list[bool], steps: int) -> None:
    length = WindowLength(4)
    flags = iter(in_flight)
    while length.after_step(in_flight=next(flags, False)):
        pass
    assert length.steps == steps
