"""Which checkpoints remain, and what each one serves as: latest, backup, rolling, best, epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Run

HUNDRED_STEPS: dict[str, Any] = {
    "max_steps": 100,
    "checkpoint_freq": 5,
    "keep_checkpoints": 3,
    "steps_per_epoch": 40,
    "eval_freq": 33,
    "eval_batches": 2,
    "lr_decay_steps": 100,
}


@pytest.fixture(scope="module")
def hundred_steps(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """100 steps, a save every 5, an epoch every 40, an evaluation every 30; 3 are to be kept."""
    run = Run(tmp_path_factory.mktemp("tiers") / "run", data)
    return run.train(None, **HUNDRED_STEPS)


def steps_with(run: Run, role: str) -> list[int]:
    return sorted(c["step"] for c in run.listing() if role in c["roles"])


def test_the_newest_three_the_best_and_the_epochs_remain(hundred_steps: Run) -> None:
    evals = {e["step"]: e["val_loss"] for e in hundred_steps.events("eval")}
    best = min(evals, key=lambda step: evals[step])
    listed = hundred_steps.listing()
    assert {c["status"] for c in listed} == {"committed"}
    assert {c["step"] for c in listed} == {95, 99, 100} | {40, 80} | {best}
    assert steps_with(hundred_steps, "rolling") == [95, 99, 100]
    assert steps_with(hundred_steps, "latest") == [100]
    assert steps_with(hundred_steps, "backup") == [99]
    assert steps_with(hundred_steps, "best") == [best]
    assert steps_with(hundred_steps, "epoch") == [40, 80]


def test_an_improvement_saves_at_once_with_its_loss(hundred_steps: Run) -> None:
    evals = hundred_steps.events("eval")
    assert [e["step"] for e in evals] == [33, 66, 99]
    committed = {e["step"]: e for e in hundred_steps.events("save_committed")}
    lowest = float("inf")
    for event in evals:
        if event["val_loss"] < lowest:
            assert event["step"] in committed, "33, 66 and 99 are no multiples of 5"
            lowest = event["val_loss"]
    best = hundred_steps.with_role("best")
    assert best["val_loss"] == lowest
    assert "best" in hundred_steps.reasons()[best["step"]]


def test_an_interval_save_never_carries_an_older_validation_loss(hundred_steps: Run) -> None:
    for checkpoint in hundred_steps.listing():
        evaluated = checkpoint["step"] in (33, 66, 99)
        assert (checkpoint["val_loss"] is not None) == evaluated, checkpoint


def test_epochs_are_numbered_and_can_be_asked_for(hundred_steps: Run, tmp_path: Path) -> None:
    epochs = {c["epoch"]: c["step"] for c in hundred_steps.listing() if "epoch" in c["roles"]}
    assert epochs == {1: 40, 2: 80}
    run = hundred_steps.copy_to(tmp_path / "epoch")
    run.train(None, resume="epoch:1", max_steps=41)
    assert run.restored_step() == 40
    whole = hundred_steps.losses()
    assert run.losses_since_restore() == {41: whole[41]}


def test_resume_best_takes_the_lowest_validation_loss(hundred_steps: Run, tmp_path: Path) -> None:
    best: dict[str, Any] = hundred_steps.with_role("best")
    run = hundred_steps.copy_to(tmp_path / "best")
    run.resume("--from=best", max_steps=best["step"] + 1)
    assert run.restored_step() == best["step"]


def test_steps_are_counted_from_one_and_each_is_reported_once(hundred_steps: Run) -> None:
    assert [e["step"] for e in hundred_steps.events("step")] == list(range(1, 101))


def test_without_retention_pressure_nothing_is_deleted(new_run: Callable[[str], Run]) -> None:
    run = new_run("all")
    run.train(None, max_steps=8, checkpoint_freq=1, keep_checkpoints=100)
    assert [c["step"] for c in sorted(run.listing(), key=lambda c: c["created"])] == list(range(1, 9))
