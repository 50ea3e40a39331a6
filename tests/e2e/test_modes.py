"""Saving right after an evaluation, compiled or not, and from replicated to sharded, restores exactly.

A no-grad evaluation leaves FSDP2's root unsharded: a capture that looked at the parameters then would see the
full tensors on every rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import Run

AFTER_EVALUATION = {"eval_freq": 3, "eval_batches": 1, "checkpoint_freq": 3, "max_steps": 8}


def resumed_equals_undisturbed(run: Run, folder: Path, nproc: int, **given: object) -> None:
    """Train to step 8; from a copy, go back to step 3, which was saved right after an evaluation."""
    run.train(nproc, **AFTER_EVALUATION, **given)
    whole = run.losses()
    evals = {e["step"]: e["val_loss"] for e in run.events("eval")}
    assert sorted(evals) == [3, 6]
    again = run.copy_to(folder)
    again.train(nproc, resume="step:3", max_steps=8)
    assert again.losses_since_restore() == {step: whole[step] for step in range(4, 9)}
    assert again.events("eval")[-1]["val_loss"] == evals[6]


def test_right_after_an_evaluation(new_run: Callable[[str], Run], tmp_path: Path) -> None:
    resumed_equals_undisturbed(new_run("plain"), tmp_path / "again", 2, dropout=0.1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.timeout(600)
def test_right_after_an_evaluation_compiled(new_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = new_run("compiled")
    run.env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    resumed_equals_undisturbed(run, tmp_path / "again", 2, compile=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
@pytest.mark.timeout(600)
def test_a_compiled_run_resumes_uncompiled(new_run: Callable[[str], Run], tmp_path: Path) -> None:
    """The names in a checkpoint are the same with --compile on and off."""
    run = new_run("compiled")
    run.env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")
    run.train(2, **AFTER_EVALUATION, compile=True)
    whole = run.losses()
    again = run.copy_to(tmp_path / "again")
    again.train(2, resume="step:3", max_steps=8, compile=False)
    for step, loss in again.losses_since_restore().items():
        assert loss == pytest.approx(whole[step], rel=1e-4)


def test_from_replicated_to_sharded(new_run: Callable[[str], Run], tmp_path: Path) -> None:
    run = new_run("replicated")
    run.train(2, **AFTER_EVALUATION, dp_replicate=2)
    whole = run.losses()
    sharded = run.copy_to(tmp_path / "sharded")
    sharded.train(2, resume="step:3", max_steps=8, dp_replicate=1)
    found = sharded.losses_since_restore()
    assert sorted(found) == [4, 5, 6, 7, 8]
    for step, loss in found.items():
        assert loss == pytest.approx(whole[step], rel=1e-5)
