"""Holdfast's Checkpointer, as a training loop uses it, and torch's own reader on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from bench.cases.modes.base import Mode, Save, state_of
from bench.harness.session import Context
from engine import Checkpointer


class Holdfast(Mode):
    """Every default, but no clean-up of old checkpoints: the benchmark deletes those of all modes itself.

    `load` is `Checkpointer.restore`, all of it: choice, indexes, matching, reading, verification, agreement.
    """

    name = "holdfast"

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

    def load(self) -> None:
        self._checkpointer.restore("latest")

    def close(self) -> None:
        self._checkpointer.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        """Called on the background thread, too. A commit is reported as soon as this rank knows of it."""
        if event["event"] == "restored":
            self.read_bytes = event["bytes"]
        save = self._saves.get(event.get("step", -1))
        if save is None:
            return
        save.causes.update(event.get("secs_by_cause", {}))
        if event["event"] == "save_failed":
            save.end(RuntimeError(event["cause"]))
        elif event["event"] == "save_committed":
            save.path = Path(event["path"])
            save.end()


class StockReader(Holdfast):
    """`dcp.load` of Holdfast's checkpoint through torch's `HuggingFaceStorageReader`: tensors only."""

    def prepare(self) -> None:
        (manifest,) = self.context.directory.glob("*/manifest.json")
        self._path = str(manifest.parent)
        # A tied weight has two names in the state, and one in the checkpoint.
        stored = set(json.loads(manifest.read_text(encoding="utf-8"))["tensors"])
        state = _flat(state_of(self.context))
        self._state = {name: tensor for name, tensor in state.items() if name in stored}

    def load(self) -> None:
        reader = HuggingFaceStorageReader(self._path)
        load(self._state, storage_reader=reader, process_group=self.context.group)


def _flat(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts by their dotted path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    found: dict[str, torch.Tensor] = {}
    if isinstance(value, dict):
        for key, item in value.items():
            found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found
