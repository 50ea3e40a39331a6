"""The ways to restore: each saves its checkpoint in one set of ranks and loads it in another, in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

from bench.modes.base import Context, state_of
from bench.modes.peers import TorchCheckpointing
from bench.modes.torch_save import TorchSave
from bench.restoring.registry import HOLDFAST, PEER, REFERENCE, STOCK_READER, TORCH_LOAD
from engine import Checkpointer


class Row:
    """A way to restore. `context.directory` is where its checkpoint is, and nothing else.

    `load` fills the live state in place; `read_bytes` is what the last one asked for, where that is known.
    """

    read_bytes: int | None = None

    def __init__(self, context: Context) -> None:
        self.context = context

    def save(self) -> None:
        """Write the checkpoint. Collective."""
        raise NotImplementedError

    def prepare(self) -> None:
        """What is needed before `load`, and is not timed."""

    def load(self) -> None:
        """Restore into the live state. Collective."""
        raise NotImplementedError

    def close(self) -> None:
        """Give everything back."""


class Holdfast(Row):
    """`Checkpointer.restore`, all of it: choice, indexes, matching, reading, verification, agreement."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._checkpointer = Checkpointer(
            context.directory,
            {"model": context.model, "optimizer": context.optimizer},
            retention=None,
            on_event=self._on_event,
        )

    def save(self) -> None:
        self._checkpointer.save(1).result(self.context.timeout_secs)

    def load(self) -> None:
        self._checkpointer.restore("latest")

    def close(self) -> None:
        self._checkpointer.close()

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "restored":
            self.read_bytes = event["bytes"]


class DcpLoad(Row):
    """`dcp.load` of what `dcp.save` wrote. The state dict is made before, which is not timed."""

    def save(self) -> None:
        dcp.save(state_of(self.context), checkpoint_id=self._path, process_group=self.context.group)

    def prepare(self) -> None:
        self._state = state_of(self.context)

    def load(self) -> None:
        dcp.load(self._state, checkpoint_id=self._path, process_group=self.context.group)

    @property
    def _path(self) -> Path:
        return self.context.directory / "checkpoint"


class StockReader(Row):
    """`dcp.load` of Holdfast's checkpoint through torch's `HuggingFaceStorageReader`: tensors only."""

    def save(self) -> None:
        row = Holdfast(self.context)
        row.save()
        row.close()

    def prepare(self) -> None:
        (manifest,) = self.context.directory.glob("*/manifest.json")
        self._path = str(manifest.parent)
        # A tied weight has two names in the state and is stored under one.
        stored = set(json.loads(manifest.read_text(encoding="utf-8"))["tensors"])
        state = _flat(state_of(self.context))
        self._state = {name: tensor for name, tensor in state.items() if name in stored}

    def load(self) -> None:
        reader = dcp.HuggingFaceStorageReader(self._path)
        dcp.load(self._state, storage_reader=reader, process_group=self.context.group)


class TorchCheckpointingLoad(Row):
    """`CheckpointManager.load` into the live state."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._mode = TorchCheckpointing(context)

    def save(self) -> None:
        save = self._mode.save(1)
        save.wait(self.context.timeout_secs)
        if save.error is not None:
            raise save.error

    def prepare(self) -> None:
        self._state = state_of(self.context)

    def load(self) -> None:
        self._mode._manager.load(str(self._mode.path(1)), into=self._state)

    def close(self) -> None:
        self._mode.close()


class TorchLoad(Row):
    """`torch.load` of one file by every rank, then `load_state_dict`, or `set_state_dict` if sharded."""

    def save(self) -> None:
        TorchSave(self.context).save(1)

    def load(self) -> None:
        context = self.context
        file = TorchSave(context).path(1) / "checkpoint.pt"
        state = torch.load(file, map_location="cpu", weights_only=True)
        names = {name for name, _ in context.model.named_parameters()}
        if context.world_size == 1 and isinstance(next(iter(state["optimizer"]["state"]), 0), int):
            context.model.load_state_dict(state["model"])
            context.optimizer.load_state_dict(state["optimizer"])
            return
        if not names & set(state["optimizer"]["state"]):
            raise RuntimeError("one process has saved by number, several ranks restore by name")
        set_state_dict(
            context.model,
            context.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )


CLASSES: dict[str, type[Row]] = {
    HOLDFAST: Holdfast,
    REFERENCE: DcpLoad,
    STOCK_READER: StockReader,
    PEER: TorchCheckpointingLoad,
    TORCH_LOAD: TorchLoad,
}


def _flat(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested dicts by their dotted path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    found: dict[str, torch.Tensor] = {}
    if isinstance(value, dict):
        for key, item in value.items():
            found |= _flat(item, f"{path}.{key}" if path else str(key))
    return found
