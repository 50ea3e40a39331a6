"""Holdfast's Checkpointer, as a training loop uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.modes.base import Context, Durability, Mode, Save
from engine import Checkpointer


class Holdfast(Mode):
    """Every default, but no clean-up of old checkpoints: the benchmark deletes those of all modes itself."""

    name = "holdfast"
    durability = Durability.ALL

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._saves: dict[int, Save] = {}
        self._checkpointer = Checkpointer(
            context.directory,
            {"model": context.model, "optimizer": context.optimizer},
            retention=None,
            timeout_secs=context.timeout_secs,
            on_event=self._on_event,
        )

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        self._saves = {number: save}
        self._checkpointer.save(number)
        return save

    def poll(self) -> None:
        self._checkpointer.poll()

    def close(self) -> None:
        self._checkpointer.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        """Called on the background thread, too. A commit is announced the moment this rank knows of it."""
        save = self._saves.get(event.get("step", -1))
        if save is None:
            return
        save.causes.update(event.get("secs_by_cause", {}))
        if event["event"] == "save_failed":
            save.end(RuntimeError(event["cause"]))
        elif event["event"] == "save_committed":
            save.path = Path(event["path"])
            save.end()
