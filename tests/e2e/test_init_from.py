"""`--init_from`: a new run begins with another checkpoint's weights, as far as they fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.harness import PATIENCE_SECS, Run


def test_a_new_run_begins_with_another_runs_weights(
    new_run: Callable[[str], Run], undisturbed_1: Run
) -> None:
    trained = undisturbed_1.with_role("latest")
    run = new_run("warm")
    run.train(None, init_from=trained["path"], max_steps=2, warmup_steps=0, lr=1e-9, eval_freq=1)
    cold = new_run("cold")
    cold.train(None, max_steps=1, warmup_steps=0, lr=1e-9, eval_freq=1)
    assert [event["step"] for event in run.events("step")] == [1, 2], "counted from 1, as any new run"
    first, untrained = run.events("eval")[0]["val_loss"], cold.events("eval")[0]["val_loss"]
    assert first < untrained - 0.01


def test_resuming_the_new_run_does_not_begin_again(new_run: Callable[[str], Run], undisturbed_1: Run) -> None:
    trained = undisturbed_1.with_role("latest")
    run = new_run("warm")
    run.train(None, init_from=trained["path"], max_steps=2, checkpoint_freq=1)
    run.train(None, init_from=trained["path"], resume="latest", max_steps=3)
    assert run.restored_step() == 2


@pytest.mark.parametrize("wrong", ["/nowhere/step-00000001-00000000", "latest"])
def test_what_is_no_checkpoint_is_said(new_run: Callable[[str], Run], wrong: str) -> None:
    job = new_run("wrong").start(None, init_from=wrong, max_steps=1)
    assert job.wait(PATIENCE_SECS) == 2
    text = job.log.read_text()
    assert "Traceback" not in text
    assert wrong in text or "no checkpoint" in text
