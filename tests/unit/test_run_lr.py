"""The learning rate of each step, and its state."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.run.lr import LrSchedule, LrShape, lr_at

SHAPE = LrShape(peak=1.0, floor=0.1, warmup_steps=4, decay_steps=12)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.25), (2, 0.5), (4, 1.0), (8, 0.55), (12, 0.1), (13, 0.1), (10_000, 0.1)],
)
def test_warm_up_then_cosine_then_the_floor(step: int, expected: float) -> None:
    assert lr_at(step, SHAPE) == pytest.approx(expected)


def test_it_falls_between_warm_up_and_decay() -> None:
    rates = [lr_at(step, SHAPE) for step in range(4, 13)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)


@pytest.mark.parametrize(
    ("warmup", "decay", "step", "expected"),
    [
        (0, 10, 1, pytest.approx(0.978, abs=1e-3)),
        (0, 1, 1, 0.1),
        (100, 20, 50, 0.5),
        (100, 20, 100, 1.0),
        (100, 20, 101, 0.1),
    ],
)
def test_odd_shapes(warmup: int, decay: int, step: int, expected: Any) -> None:
    """No warm-up; a decay that is over at once; a warm-up that outlasts the decay."""
    assert lr_at(step, LrShape(1.0, 0.1, warmup, decay)) == expected


def test_a_floor_above_the_peak_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--min_lr 0\.2 .* --lr 0\.1"):
        LrShape(0.1, 0.2, 0, 1)


class Groups:
    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0}, {"lr": 0.0}]


def test_it_sets_every_group_before_a_step() -> None:
    optimizer = Groups()
    schedule = LrSchedule(optimizer, SHAPE)
    assert [schedule.advance() for _ in range(3)] == [0.25, 0.5, 0.75]
    assert [group["lr"] for group in optimizer.param_groups] == [0.75, 0.75]


def test_a_restored_schedule_goes_on_with_the_shape_of_the_flags() -> None:
    first = LrSchedule(Groups(), SHAPE)
    first.advance()
    state = json.loads(json.dumps(first.state_dict()))
    again = LrSchedule(Groups(), LrShape(2.0, 0.1, 4, 12))
    again.load_state_dict(state)
    assert again.advance() == 1.0
