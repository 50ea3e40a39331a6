"""Sends events to metrics.jsonl, the console and `--on_event`. Only rank 0's recorder writes anything."""

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
    """Receives the trainer's events and the engine's; the latter also from the engine's background thread.

    The engine's events have the step; this class adds the reasons and the metrics of the save, so that an
    `--on_event` command can tell a best model from an interval save.
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
        """Start writing, once this run holds the directory: another run's log must stay untouched."""
        self._metrics, self._hook = metrics, hook

    def announce_save(self, step: int, reasons: tuple[str, ...], metrics: Mapping[str, float]) -> None:
        """Before a save starts: note its reasons and metrics, which its events will include."""
        with self._lock:
            self._saves[step] = {"reasons": list(reasons), "metrics": dict(metrics)}
            if (value := metrics.get(self.best.rule.metric)) is not None:
                self.best.promise(step, value)

    def save_skipped(self, step: int) -> None:
        """The announced save was skipped."""
        with self._lock:
            self._saves.pop(step, None)
            self.best.settle(step, committed=False)

    def from_engine(self, event: Mapping[str, Any]) -> None:
        """Handle an event of the Checkpointer."""
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
        """Record an optimizer step, without `--on_event`: a process per step would cost the training CPU."""
        if self._metrics is not None:
            self._metrics.append({key: value for key, value in event.items() if key != "step_tokens"})
        self.console.progress(event, last_step, force=force)

    @property
    def usual_save_secs(self) -> float:
        """Seconds from snapshot to commit: the median of the last few saves, 0 before the first."""
        with self._lock:
            return statistics.median(self._took_secs) if self._took_secs else 0.0

    def improves(self, value: float) -> bool:
        """Whether `value` of the best metric beats every checkpoint's. Only rank 0 may ask."""
        with self._lock:
            return self.best.improves(value)

    def evaluated(self, step: int, loss: float, *, best: bool, secs: float) -> None:
        """Record the validation loss of `step`."""
        self._pass_on({"event": "eval", "step": step, "val_loss": loss, "best": best, "secs": secs})
        self.console.say(
            f"eval: step {step} | val loss {loss:.4f}{', the best so far' if best else ''} | {secs:.1f} s"
        )

    def close(self, hook_secs: float = HOOK_CLOSE_SECS) -> None:
        """Wait up to `hook_secs` for the command to process the queue, and close the log."""
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
    """Seconds a save took, without its wait for the previous save."""
    secs: float = event.get("secs", 0.0)
    waited: float = event.get("secs_by_cause", {}).get("wait", 0.0)
    return max(0.0, secs - waited)


def log_directory(config: TrainConfig) -> str:
    """The directory of metrics.jsonl: `--log_dir`, else logs/ in local checkpoints, else ./logs/NAME."""
    if config.log_dir is not None:
        return config.log_dir
    directory = config.checkpoint_dir.removeprefix("file://")
    if "://" not in directory:
        return os.path.join(directory, "logs")
    return os.path.join("logs", split_uri(directory)[1])
