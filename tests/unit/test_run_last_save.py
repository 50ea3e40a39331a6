"""What is saved after a signal: the table, and the words for it."""

from __future__ import annotations

import pytest

from engine.run.last_save import Choice, LastSave


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
