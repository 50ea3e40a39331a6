"""Where events go: metrics.jsonl, the console and `--on_event`. Only rank 0's says anything."""

from __future__ import annotations

import os
import statistics
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from engine.run.config import TrainConfig
from engine.run.console import Console
from engine.run.events import Event, MetricsLog
from engine.run.hook import EventHook
from engine.run.schedule import BestLoss
from engine.storage.uris import split_uri

HOOK_CLOSE_SECS = 15.0
RECENT_SAVES = 5


class Recorder:
    """Takes the trainer's events and the engine's, the latter also from the engine's background thread.

    The engine's events know the step; why it was saved and with which metrics is added here, so that a
    command behind `--on_event` can tell a best model from an interval save.
    """

    def __init__(self, console: Console, best: BestLoss | None = None) -> None:
        self.console = console
        self.best = best or BestLoss()
        self._metrics: MetricsLog | None = None
        self._hook: EventHook | None = None
        self._saves: dict[int, Mapping[str, Any]] = {}
        self._took_secs: deque[float] = deque(maxlen=RECENT_SAVES)
        self._lock = threading.Lock()

    def open(self, metrics: MetricsLog, hook: EventHook | None) -> None:
        """Begin to write, once the directory is known to be this run's: another run's log is not ours."""
        self._metrics, self._hook = metrics, hook

    def announce_save(self, step: int, reasons: tuple[str, ...], metrics: Mapping[str, float]) -> None:
        """Say, before it starts, why `step` is saved: the events of that save will carry it."""
        with self._lock:
            self._saves[step] = {"reasons": list(reasons), "metrics": dict(metrics)}
            if (value := metrics.get(self.best.rule.metric)) is not None:
                self.best.promise(step, value)

    def save_skipped(self, step: int) -> None:
        """The save that was announced did not take place."""
        with self._lock:
            self._saves.pop(step, None)
            self.best.settle(step, committed=False)

    def from_engine(self, event: Mapping[str, Any]) -> None:
        """Take an event of the Checkpointer."""
        kind, step = event["event"], event.get("step", -1)
        ended = kind in ("save_committed", "save_failed")
        with self._lock:
            known = self._saves.pop(step, {}) if ended else self._saves.get(step, {})
            if ended:
                self.best.settle(step, committed=kind == "save_committed")
            if kind == "save_committed":
                self._took_secs.append(_own_secs(event))
        self._pass_on({**known, **event})
        self.console.checkpoint({**known, **event})

    def step(self, event: Event, last_step: int, *, force: bool = False) -> None:
        """One optimizer step. Not for the command: a process a step would take the training's cores."""
        if self._metrics is not None:
            self._metrics.append({key: value for key, value in event.items() if key != "step_tokens"})
        self.console.progress(event, last_step, force=force)

    @property
    def usual_save_secs(self) -> float:
        """What a save takes, snapshot to commit: the median of the last few, 0 before the first."""
        with self._lock:
            return statistics.median(self._took_secs) if self._took_secs else 0.0

    def improves(self, value: float) -> bool:
        """Whether the metric that decides is better than that of every checkpoint; for rank 0 to ask."""
        with self._lock:
            return self.best.improves(value)

    def evaluated(self, step: int, loss: float, *, best: bool, secs: float) -> None:
        """A validation of `step` has ended."""
        self._pass_on({"event": "eval", "step": step, "val_loss": loss, "best": best, "secs": secs})
        self.console.say(
            f"eval: step {step} | val loss {loss:.4f}{', the best so far' if best else ''} | {secs:.1f} s"
        )

    def close(self, hook_secs: float = HOOK_CLOSE_SECS) -> None:
        """Let the command see what is queued, for `hook_secs` at most, and close the log."""
        if self._hook is not None:
            self._hook.close(hook_secs)
        if self._metrics is not None:
            self._metrics.close()

    def _pass_on(self, event: Event) -> None:
        if self._metrics is not None:
            self._metrics.append(event)
        if self._hook is not None:
            self._hook.submit(event)


def _own_secs(event: Mapping[str, Any]) -> float:
    """Without the time that a save waited for the one before."""
    secs: float = event.get("secs", 0.0)
    waited: float = event.get("secs_by_cause", {}).get("wait", 0.0)
    return max(0.0, secs - waited)


def log_directory(config: TrainConfig) -> str:
    """Where metrics.jsonl goes: `--log_dir`, else beside local checkpoints, else ./logs under their name."""
    if config.log_dir is not None:
        return config.log_dir
    directory = config.checkpoint_dir.removeprefix("file://")
    if "://" not in directory:
        return os.path.join(directory, "logs")
    return os.path.join("logs", split_uri(directory)[1])
