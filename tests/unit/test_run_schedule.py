"""When to save and why, how long a run is, what counts as best, and whether to save after a signal."""

from __future__ import annotations

from typing import Any

import pytest

from engine.format.manifest import REASONS
from engine.run.schedule import (
    REASONS_IN_ORDER,
    BestLoss,
    Choice,
    LastSave,
    StepEnd,
    due,
    last_step,
    may_skip,
    save_reasons,
)


@pytest.mark.parametrize(
    ("end", "freq", "expected"),
    [
        ({"step": 3}, 3, ("interval",)),
        ({"step": 4}, 3, ()),
        ({"step": 4}, 0, ()),
        ({"step": 4, "closed_epoch": True}, 3, ("epoch",)),
        ({"step": 4, "improved": True}, 0, ("best",)),
        ({"step": 4, "signalled": True}, 0, ("signal",)),
        ({"step": 4, "last": True}, 0, ("final",)),
        ({"step": 6, "last": True}, 3, ("interval", "final")),
        (
            {"step": 6, "closed_epoch": True, "improved": True, "signalled": True, "last": True},
            3,
            ("interval", "epoch", "best", "signal", "final"),
        ),
    ],
    ids=str,
)
def test_reasons_merge_into_one_save(end: dict[str, Any], freq: int, expected: tuple[str, ...]) -> None:
    assert save_reasons(StepEnd(**end), freq) == expected


def test_the_reasons_are_the_formats() -> None:
    assert set(REASONS_IN_ORDER) < set(REASONS)


@pytest.mark.parametrize(
    ("reasons", "skips"),
    [
        (("interval",), True),
        (("interval", "best"), False),
        (("signal",), False),
        (("epoch",), False),
        (("final",), False),
    ],
    ids=str,
)
def test_only_an_interval_save_may_fall_out(reasons: tuple[str, ...], skips: bool) -> None:
    assert may_skip(reasons) is skips


@pytest.mark.parametrize(("step", "freq", "expected"), [(250, 250, True), (249, 250, False), (5, 0, False)])
def test_due(step: int, freq: int, expected: bool) -> None:
    assert due(step, freq) is expected


@pytest.mark.parametrize(
    ("max_steps", "num_epochs", "expected"),
    [(None, None, 40), (7, None, 7), (None, 3, 120), (100, 3, 100), (500, 3, 120)],
)
def test_the_earlier_limit_ends_the_run(max_steps: int | None, num_epochs: int | None, expected: int) -> None:
    assert last_step(max_steps, num_epochs, steps_per_epoch=40) == expected


@pytest.mark.parametrize(
    ("committed", "loss", "expected"),
    [
        (None, 5.0, True),
        (4.0, 3.9, True),
        (4.0, 4.0, False),
        (4.0, 4.1, False),
        (None, float("nan"), False),
        (4.0, float("nan"), False),
        (None, float("inf"), False),
        (None, float("-inf"), False),
    ],
)
def test_what_improves(committed: float | None, loss: float, expected: bool) -> None:
    assert BestLoss(committed).improves(loss) is expected


def test_a_promised_loss_counts_until_its_save_fails() -> None:
    best = BestLoss(4.0)
    best.promise(10, 3.0)
    assert not best.improves(3.5)
    best.settle(10, committed=False)
    assert best.improves(3.5), "no checkpoint holds 3.0"


def test_a_committed_loss_counts_for_good() -> None:
    best = BestLoss(4.0)
    best.promise(10, 3.0)
    best.settle(10, committed=True)
    assert best.committed == 3.0
    assert not best.improves(3.5)


def test_a_worse_commit_does_not_raise_the_bar() -> None:
    best = BestLoss(3.0)
    best.promise(10, 5.0)
    best.settle(10, committed=True)
    assert best.committed == 3.0
    best.settle(11, committed=True)
    assert best.committed == 3.0, "an interval save without a validation loss"


@pytest.mark.parametrize(
    ("in_flight", "secs_left", "usual_secs", "choice"),
    [
        (None, 25.0, 3.0, "save"),
        (None, 3.0, 3.0, "save"),
        (None, 2.9, 3.0, "leave"),
        (None, 0.0, 3.0, "leave"),
        (6, 25.0, 3.0, "finish and save"),
        (6, 3.0, 3.0, "finish and save"),
        (6, 2.9, 3.0, "finish"),
        (6, 0.0, 3.0, "finish"),
        (None, 0.1, 0.0, "save"),
        (6, 0.1, 0.0, "finish and save"),
    ],
    ids=str,
)
def test_time_left_and_the_usual_time_decide(
    in_flight: int | None, secs_left: float, usual_secs: float, choice: Choice
) -> None:
    assert LastSave(7, in_flight, secs_left, usual_secs).choice == choice


@pytest.mark.parametrize(
    ("in_flight", "secs_left", "sentence"),
    [
        (None, 25.0, "saving step 7 (25.0 s left, a save takes 3.0 s)"),
        (6, 25.0, "the save of step 6 has ended, saving step 7 (25.0 s left, a save takes 3.0 s)"),
        (6, 2.0, "the save of step 6 has ended, no time to save step 7 (2.0 s left, a save takes 3.0 s)"),
        (None, 2.0, "no time to save step 7 (2.0 s left, a save takes 3.0 s)"),
    ],
)
def test_the_console_says_which_and_why(in_flight: int | None, secs_left: float, sentence: str) -> None:
    assert LastSave(7, in_flight, secs_left, 3.0).sentence == sentence
