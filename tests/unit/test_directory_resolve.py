"""One answer, one error and one warning for a selector, whoever asks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from engine.directory.listing import Listed
from engine.directory.resolve import checkpoint_at, log_passed_over, resolve
from engine.directory.selectors import parse_selector
from engine.errors import SelectorError
from tests.support.records import record
from tests.support.tiny_checkpoint import write_checkpoint

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}


def listed(*, damaged: tuple[int, ...] = (), partial: tuple[str, ...] = ()) -> list[Listed]:
    """Checkpoints 1 to 4, committed in this order, the second the best; and attempts without a manifest."""
    records = [record(number, loss=loss) for number, loss in LOSSES.items()]
    found = [
        Listed(r.id, "damaged", r, 100, f"block {r.sequence} has changed")
        if r.sequence in damaged
        else Listed(r.id, "committed", r, 100)
        for r in records
    ]
    return found + [Listed(name, "partial", None, 0, "no manifest") for name in partial]


@pytest.mark.parametrize(
    ("selector", "damaged", "chosen", "passed_over"),
    [
        ("latest", (), 4, []),
        ("latest", (1, 2), 4, []),
        ("latest", (1, 3, 4), 2, [3, 4]),
        ("best", (), 2, []),
        ("best", (2, 4), 3, [2]),
        ("best", (2, 3), 1, [2, 3]),
        ("best:val_loss:max", (4, 2), 1, [4]),
        ("backup", (4,), 2, []),
        ("backup", (3,), 2, []),
        ("step:1", (2, 4), 1, []),
    ],
)
def test_the_choice_and_what_was_passed_over(
    selector: str, damaged: tuple[int, ...], chosen: int, passed_over: list[int]
) -> None:
    found = resolve(listed(damaged=damaged), parse_selector(selector), "/runs/a")
    assert found.record.sequence == chosen
    assert [item.record.sequence for item in found.passed_over if item.record is not None] == passed_over


def test_the_error_lists_what_is_whole_and_says_why_the_rest_cannot_be_used() -> None:
    with pytest.raises(SelectorError) as caught:
        resolve(
            listed(damaged=(4,), partial=("step-00000005-00000005",)), parse_selector("step:9"), "/runs/a"
        )
    text = str(caught.value)
    assert text.startswith("no checkpoint matches 'step:9'")
    assert "Available: step:3 (latest); step:2 (backup, best); step:1" in text
    assert "/runs/a also has 1 damaged and 1 partial: " in text
    assert "step-00000004-00000004 is damaged (block 4 has changed)" in text
    assert "step-00000005-00000005 is partial (no manifest)" in text


def test_of_many_that_cannot_be_used_three_are_named() -> None:
    with pytest.raises(SelectorError, match=r"also has 4 damaged and 0 partial: .*; and 1 more$") as caught:
        resolve(listed(damaged=(1, 2, 3, 4)), parse_selector("latest"), "/runs/a")
    assert str(caught.value).count("is damaged (") == 3


def test_where_all_are_whole_the_error_ends_with_them() -> None:
    with pytest.raises(SelectorError, match=r"step:1$"):
        resolve(listed(), parse_selector("step:9"), "/runs/a")


def test_the_warning_names_each_and_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    log_passed_over(resolve(listed(damaged=(4,)), parse_selector("latest"), "/runs/a").passed_over)
    assert caplog.messages == ["skipping step-00000004-00000004, which is damaged: block 4 has changed"]


def test_a_path_names_a_checkpoint_or_the_error_says_where_none_is(tmp_path: Path) -> None:
    id = write_checkpoint(tmp_path / "run", step=30)
    found = checkpoint_at(str(tmp_path / "run" / id))
    assert (found.parent, found.name, found.manifest.step) == (str(tmp_path / "run"), id, 30)
    with pytest.raises(SelectorError, match=f"no checkpoint at {tmp_path}/run/other: it has no manifest"):
        checkpoint_at(str(tmp_path / "run" / "other"))
