"""A resumed run is the uninterrupted one: stopped by a signal, sent back, or moved to other ranks."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data.loader import TokenLoader
from demo.job import torchrun
from engine.format.forms import without_order
from engine.resume.launcher import FORWARDED
from tests.e2e.conftest import REFERENCE_STEPS
from tests.e2e.harness import TINY, Run, flags


def stop_with(run: Run, nproc: int | None, sig: signal.Signals, **given: object) -> float:
    """Start, signal the process that was started once two steps are done; seconds until all has ended."""
    job = run.start(nproc, **given)
    job.wait_until(lambda: len(run.losses()) >= 2, 60.0)
    sent = time.monotonic()
    job.process.send_signal(sig)
    status = job.wait(60.0)
    took = time.monotonic() - sent
    # torchrun ends with 1 after any signal; without it the trainer says that it stopped in good order.
    assert status == (1 if nproc else 0), job.tail()
    assert job.pids() == []
    return took


SIGNAL_ALONE_STOPS = {"checkpoint_freq": 10_000, "max_steps": 100_000}


def test_sigterm_saves_the_step_reached_and_the_rest_is_bit_for_bit(new_run: Callable[[str], Run]) -> None:
    """Dropout is on, so the random streams count too."""
    run = new_run("stopped")
    assert stop_with(run, None, signal.SIGTERM, dropout=0.1, **SIGNAL_ALONE_STOPS) < 10.0

    reached = max(run.losses())
    (checkpoint,) = run.listing()
    assert checkpoint["step"] == reached
    assert run.reasons() == {reached: ["signal"]}

    run.train(None, resume="latest", max_steps=reached + 4)
    assert run.restored_step() == reached
    whole = new_run("whole").train(None, dropout=0.1, checkpoint_freq=10_000, max_steps=reached + 4).losses()
    assert run.losses() == whole
    assert len(run.events("step")) == len(whole), "no step was done twice"


@pytest.mark.parametrize(("nproc", "sig"), [(2, signal.SIGTERM), (None, signal.SIGINT)], ids=str)
def test_ranks_agree_on_the_step_that_a_signal_saves(
    nproc: int | None, sig: signal.Signals, new_run: Callable[[str], Run]
) -> None:
    run = new_run("stopped")
    assert stop_with(run, nproc, sig, **SIGNAL_ALONE_STOPS) < 10.0
    assert run.reasons() == {max(run.losses()): ["signal"]}
    assert run.committed() == [max(run.losses())]


@pytest.mark.parametrize(
    "through",
    [
        "torchrun",
        pytest.param("the variable", marks=pytest.mark.slow),
        pytest.param("engine.resume", marks=pytest.mark.slow),
        "no launcher",
    ],
)
def test_slurms_signals_save_the_step_reached(
    through: str, undisturbed_2_no_dropout: Run, new_run: Callable[[str], Run], tmp_path: Path
) -> None:
    """Sent to the launcher, as `scancel --signal` does. torchrun alone would die of them."""
    if through == "engine.resume":
        run = undisturbed_2_no_dropout.copy_to(tmp_path / "resumed")
        values = {"checkpoint_dir": run.checkpoints, "log_dir": run.logs, "reshard": 1}
        command = [sys.executable, "-m", "engine.resume", *flags({**values, **SIGNAL_ALONE_STOPS})]
        job = run.launch(command)
    else:
        run = new_run("stopped")
        if through == "the variable":
            run.env["PET_SIGNALS_TO_HANDLE"] = FORWARDED
        launcher = torchrun(1, f"--signals-to-handle={FORWARDED}") if through == "torchrun" else torchrun(1)
        values = {**TINY, "data": run.data, "checkpoint_dir": run.checkpoints, "log_dir": run.logs}
        command = [sys.executable] if through == "no launcher" else launcher
        job = run.launch([*command, "-m", "engine.train", *flags({**values, **SIGNAL_ALONE_STOPS})])
    before = max(run.losses(), default=0)
    job.wait_until(lambda: max(run.losses(), default=0) >= before + 2, 60.0)
    sig = signal.SIGUSR2 if through == "engine.resume" else signal.SIGUSR1
    job.process.send_signal(sig)
    expected = {"no launcher": 0, "engine.resume": 128 + sig}.get(through, 1)
    assert job.wait(60.0) == expected, job.tail()
    assert job.pids() == []
    reached = max(run.losses())
    assert run.reasons()[reached] == ["signal"], job.tail()


def test_the_end_of_a_run_is_a_checkpoint_too(undisturbed_2: Run) -> None:
    assert undisturbed_2.with_role("latest")["step"] == REFERENCE_STEPS
    assert undisturbed_2.committed() == [3, 6, 9, 12], "reasons merge: one save per step"
    assert undisturbed_2.reasons() == {
        3: ["interval"],
        6: ["interval"],
        9: ["interval"],
        12: ["interval", "final"],
    }


def test_stop_and_resume_latest_is_bit_for_bit(undisturbed_2: Run, new_run: Callable[[str], Run]) -> None:
    """Two ranks; one alone is the case of the signal above."""
    run = new_run("stopped")
    run.train(2, dropout=0.1, max_steps=5, checkpoint_freq=100)
    run.train(2, resume="latest", max_steps=REFERENCE_STEPS)
    assert run.restored_step() == 5
    assert min(run.losses_since_restore()) == 6
    assert run.losses() == undisturbed_2.losses()


def test_an_older_checkpoint_reproduces_the_original_and_starts_a_branch(
    undisturbed_2: Run, tmp_path: Path
) -> None:
    whole = undisturbed_2.losses()
    run = undisturbed_2.copy_to(tmp_path / "back")
    run.train(2, resume="step:3", max_steps=8, checkpoint_freq=4)
    assert run.restored_step() == 3
    assert run.losses_since_restore() == {step: whole[step] for step in range(4, 9)}
    # Twelve is a higher step, but eight is what was committed last.
    assert run.with_role("latest")["step"] == 8
    assert run.with_role("backup")["step"] == 4


def test_two_ranks_then_four_then_one_then_three(undisturbed_2_no_dropout: Run, tmp_path: Path) -> None:
    whole = undisturbed_2_no_dropout.losses()
    run = undisturbed_2_no_dropout.copy_to(tmp_path / "moved")

    run.resume("--from=step:3", "--reshard=4", max_steps=6)
    assert run.restored_step() == 3
    run.train(None, resume="latest", max_steps=9)
    assert run.restored_step() == 6
    run.train(3, resume="latest", max_steps=REFERENCE_STEPS)
    assert run.restored_step() == 9

    moved = run.losses()
    assert sorted(moved) == sorted(whole)
    for step, loss in whole.items():
        assert moved[step] == pytest.approx(loss, rel=1e-4), f"step {step}"
    tokens = {e["step"]: e["tokens"] for e in run.events("step")}
    assert tokens == {e["step"]: e["tokens"] for e in undisturbed_2_no_dropout.events("step")}
    worlds = [c["world_size"] for c in sorted(run.listing(), key=lambda c: c["created"])]
    assert worlds[-3:] == [4, 1, 3]


def test_every_world_size_reads_the_same_tokens_after_a_checkpoint(undisturbed_2_no_dropout: Run) -> None:
    """The data position of each real checkpoint, taken up by 1, 2, 3 and 4 ranks."""

    def loaders(world_size: int) -> list[TokenLoader]:
        given = {name: TINY[name] for name in ("seq_len", "global_batch", "seed")}
        data = undisturbed_2_no_dropout.data
        return [TokenLoader(data, **given, rank=rank, world_size=world_size) for rank in range(world_size)]

    def next_global_batch(ranks: list[TokenLoader]) -> list[list[int]]:
        return [row for rank in ranks for row in rank.next_batch()[0].tolist()]

    undisturbed = loaders(1)
    batches = [next_global_batch(undisturbed) for _ in range(REFERENCE_STEPS + 2)]
    for path in sorted(Path(undisturbed_2_no_dropout.checkpoints).glob("*/manifest.json")):
        manifest = json.loads(path.read_bytes())
        for world_size in (1, 2, 3, 4):
            ranks = loaders(world_size)
            for rank in ranks:
                rank.load_state_dict(without_order(manifest["objects"]["loader"]))
            step = manifest["step"]
            assert [next_global_batch(ranks) for _ in range(2)] == batches[step : step + 2]
