"""The training loop, its setup and its end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from data.errors import DataError
from engine.checkpointer import Checkpointer
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention
from engine.errors import HoldfastError, SelectorError
from engine.run.cli import is_given, resolve
from engine.run.config import TrainConfig, complete, to_json
from engine.run.console import Console
from engine.run.events import MetricsLog
from engine.run.hook import EventHook
from engine.run.job import Job, build_job, check_data, open_data
from engine.run.preemption import Preemption, grace_within
from engine.run.recorder import HOOK_CLOSE_SECS, Recorder, log_directory
from engine.run.saves import Saves
from engine.run.schedule import BestLoss, LastSave, StepEnd, due, save_reasons
from engine.run.shared_stop import Agreement, Stopped
from engine.run.start import LAUNCH_KEY, Restart, Start, find_start
from engine.run.step import evaluate, train_step
from engine.run.world import World, choose_device, seed_everything

log = logging.getLogger(__name__)

CRASH_WAIT_SECS = 10.0
LEAVING_SECS = 6.0
"""Reserved for the exit: aborting a mirror copy, releasing leases, destroying the process group."""
ENDING_SECS = 2.0
"""The part of it that comes after the last event."""
NO_LIMIT_MS = 10**9
"""Time left on a rank that received no signal."""


def train(
    argv: Sequence[str], session: TrainConfig, agreement: Agreement, preemption: Preemption, world: World
) -> None:
    """Set up a run from the flags, train until its end or a signal, and save a checkpoint.

    Collective; needs the process group. An error before the first step is raised on all ranks.

    Raises:
        HoldfastError, DataError: with a message for the user.
        Stopped: a signal arrived before the first step, or left no time to save.
    """
    restart = Restart.from_environ()
    # Only the agent that saw the failure counts it, and rank 0 may be on another node.
    restart = dataclasses.replace(restart, count=agreement.highest(restart.count))
    start = agreement.from_first(
        lambda: find_start(session, directory_given=is_given(argv, "checkpoint_dir"), restart=restart)
    )
    config = agreement.together(lambda: configure(argv, session, start))
    console = Console(speaks=world.is_first)
    console.say(start.sentence)
    job = _build(config, start, agreement, world)
    console.say(job.describe())
    recorder = Recorder(console, BestLoss(start.best_value(config.best_rule), config.best_rule))
    try:
        ckpt = agreement.together(lambda: _open_checkpointer(config, job, recorder, restart))
        with _closing(ckpt, preemption):
            agreement.together(lambda: _open_records(config, recorder) if world.is_first else None)
            record = agreement.together(lambda: _restore(ckpt, start, job, config.init_from))
            saves = Saves(ckpt, recorder, config.max_save_failures)
            _Loop(job, agreement, preemption, recorder, saves, record).run()
    finally:
        # After the engine's last event, that of the final save.
        recorder.close(time_for_the_command(preemption.secs_left))


@contextmanager
def _closing(ckpt: Checkpointer, preemption: Preemption) -> Iterator[None]:
    """Close the Checkpointer at the end; after a crash, wait only briefly for the save in flight.

    Most crashes are collectives whose peer has died. The save in flight then waits for the dead rank until
    its own deadline, long after torchrun wants this process to exit.
    """
    try:
        yield
    except (HoldfastError, DataError, Stopped) as error:
        ckpt.__exit__(type(error), error, error.__traceback__)
        raise
    except Exception:
        try:
            ckpt.wait(CRASH_WAIT_SECS)
        except (HoldfastError, TimeoutError) as error:
            log.error("%s", error)
        raise
    else:
        ckpt.close(lambda: time_for_the_mirror(preemption.secs_left))


def time_for_the_mirror(grace_left_secs: float | None) -> float | None:
    """After a signal: seconds for mirror copies, the grace time left minus the exit's. None: no limit."""
    return None if grace_left_secs is None else max(0.0, grace_left_secs - LEAVING_SECS)


def time_for_the_command(grace_left_secs: float | None) -> float:
    """Seconds for `--on_event` to catch up at the end: a slow command must not delay the exit."""
    if grace_left_secs is None:
        return HOOK_CLOSE_SECS
    return min(HOOK_CLOSE_SECS, max(0.0, grace_left_secs - ENDING_SECS))


def configure(argv: Sequence[str], session: TrainConfig, start: Start) -> TrainConfig:
    """The run's final configuration: explicit flags, then the checkpoint's, then the defaults."""
    session = dataclasses.replace(session, checkpoint_dir=start.checkpoint_dir)
    return complete(resolve(argv, start.stored, session) if start.selector is not None else session)


def _build(config: TrainConfig, start: Start, agreement: Agreement, world: World) -> Job:
    device = agreement.together(lambda: choose_device(config.device, world))
    seed_everything(config.seed, world, deterministic=config.deterministic, device=device)
    loaders = agreement.together(lambda: open_data(config, world))
    agreement.together(lambda: check_data(config, start, loaders[0]))
    return agreement.together(lambda: build_job(config, world, device, loaders))


def _open_checkpointer(config: TrainConfig, job: Job, recorder: Recorder, restart: Restart) -> Checkpointer:
    return Checkpointer(
        config.checkpoint_dir,
        job.state(),
        retention=Retention(
            rolling=config.keep_checkpoints,
            best=1,
            epochs=True,
            metric=config.best_metric,
            mode=config.best_mode,
        ),
        config={**to_json(config), LAUNCH_KEY: restart.launch},
        busy=config.save_policy,
        check_replicas="full" if config.check_replicas else "sampled",
        check_snapshots=config.check_snapshots,
        seed=config.seed,
        storage_options=config.storage_mapping,
        mirror=config.mirror,
        mirror_freq=config.mirror_freq,
        on_failure="raise",  # Saves counts failures itself, and all ranks vote to stop
        on_event=recorder.from_engine if job.world.is_first else None,
    )


def _open_records(config: TrainConfig, recorder: Recorder) -> None:
    hook = None if config.on_event is None else EventHook(config.on_event)
    recorder.open(MetricsLog(log_directory(config)), hook)


def _restore(ckpt: Checkpointer, start: Start, job: Job, init_from: str | None) -> CheckpointRecord | None:
    if start.selector is None:
        if init_from is not None:
            _warm_start(ckpt, init_from, job)
        return None
    record = ckpt.restore(start.selector)
    if record is None:
        raise SelectorError(
            f"{start.selector} was deleted from {start.checkpoint_dir} during the start; start the run again"
        )
    job.apply_flags()
    return record


def _warm_start(ckpt: Checkpointer, init_from: str, job: Job) -> None:
    """Load the matching weights of another checkpoint; the run itself starts at step 0."""
    record = ckpt.restore(init_from, model_only=True, strict=False)
    if record is None:
        raise SelectorError(f"--init_from {init_from}: no checkpoint there; give the path or URI of one")
    if job.world.is_first:
        log.info("initialised the weights from step %d, %s", record.step, record.path)


class _Loop:
    """Steps, evaluations and saves, from `record` (None: step 0) to the last step or a signal."""

    def __init__(
        self,
        job: Job,
        agreement: Agreement,
        preemption: Preemption,
        recorder: Recorder,
        saves: Saves,
        record: CheckpointRecord | None,
    ) -> None:
        self.job, self.agreement, self.preemption = job, agreement, preemption
        self.recorder, self.saves = recorder, saves
        self.step = record.step if record else 0
        self.tokens = record.tokens if record else 0
        self.prepared = False
        self.last_is_saved = True
        if record is not None:
            saves.already_saved(record.step)

    def run(self) -> None:
        config, say = self.job.config, self.recorder.console.say
        if self.step >= self.job.last_step:
            say(f"nothing to do: the run ends at step {self.job.last_step} (see --max_steps)")
            return
        self.preemption.allow(grace_within(config.grace_secs))
        signum = None
        while self.step < self.job.last_step and signum is None:
            signum = self._one_step()
        self.agreement.together(self.saves.settle, heed_signals=False)
        if signum is not None and not self.last_is_saved:
            lost = f"after step {self.step}, not saved"
            raise Stopped(signum, f"{lost}; --resume latest continues from the newest checkpoint")
        if signum is not None:
            say(f"stopped by signal {signum} after step {self.step}, saved; --resume latest continues")
        else:
            say(f"done: step {self.step}, {self.tokens:,} tokens")

    def _one_step(self) -> int | None:
        """One step and the evaluation and save due after it; returns the signal that ends the run, if any."""
        began = time.perf_counter()
        result = train_step(self.job, self.agreement, must_stop=self.saves.must_stop)
        self.step += 1
        self.tokens += self.job.step_tokens
        self._report(result.loss, result.lr, time.perf_counter() - began)
        if result.vote.stop:
            self.agreement.together(self._stop, heed_signals=False)
        if not self.prepared:
            # The optimizer now has its state, so the snapshot's size is known.
            self.saves.prepare()
            self.prepared = True
        signum, metrics = result.vote.signum, {"train_loss": result.loss}
        improved = False
        if signum is None and due(self.step, self.job.config.eval_freq):
            signum, improved = self._evaluate(metrics)
        end = StepEnd(
            step=self.step,
            closed_epoch=self.job.loader.position == 0,
            improved=improved,
            signalled=signum is not None,
            last=self.step == self.job.last_step,
        )
        reasons = save_reasons(end, self.job.config.checkpoint_freq)
        if signum is not None:
            self.last_is_saved = self._time_for_a_save(signum)
        if reasons and self.last_is_saved:
            self.saves.save(
                self.step, epoch=self.job.loader.epoch, tokens=self.tokens, metrics=metrics, reasons=reasons
            )
        return signum

    def _report(self, loss: float, lr: float, secs: float) -> None:
        event = {
            "event": "step",
            "step": self.step,
            "loss": loss,
            "tokens": self.tokens,
            "step_secs": secs,
            "lr": lr,
        }
        last = self.job.last_step
        self.recorder.step({**event, "step_tokens": self.job.step_tokens}, last, force=self.step == last)

    def _time_for_a_save(self, signum: int) -> bool:
        """Finish the save in flight; returns whether there is time for another, the same on all ranks."""
        say, in_flight = self.recorder.console.say, self.saves.in_flight()
        if in_flight is not None:
            say(f"signal {signum}: finishing the save of step {in_flight}")
        self.saves.finish()
        left = self.preemption.secs_left
        # The rank that was signalled first has the least time; rank 0 knows how long a save takes.
        left_ms = -self.agreement.highest(-NO_LIMIT_MS if left is None else -int(left * 1e3))
        usual_ms = self.agreement.highest(int(self.recorder.usual_save_secs * 1e3))
        last = LastSave(self.step, in_flight, left_ms / 1e3, usual_ms / 1e3)
        say(f"signal {signum}: {last.sentence}")
        return last.choice in ("save", "finish and save")

    def _stop(self) -> None:
        if self.saves.must_stop():
            raise self.saves.reason_to_stop()

    def _evaluate(self, metrics: dict[str, float]) -> tuple[int | None, bool]:
        """(the signal that interrupted it, if any; whether it is the best so far); fills `metrics`."""
        began = time.perf_counter()
        loss, signum = evaluate(self.job, self.agreement)
        if loss is None:
            return signum, False
        # Only rank 0 knows which saves have committed, so only it can tell what is best.
        metrics["val_loss"] = loss
        mine = float(self.job.world.is_first and self.recorder.improves(metrics[self.job.config.best_metric]))
        verdict = torch.tensor(mine, dtype=torch.float64, device=self.job.device)
        best = self.agreement.vote(verdict).total > 0
        self.recorder.evaluated(self.step, loss, best=best, secs=time.perf_counter() - began)
        return None, best
