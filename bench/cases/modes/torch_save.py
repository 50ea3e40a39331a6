"""`torch.save` by rank 0 and `torch.load` by every rank: one file, training waits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from bench.cases.modes.base import Mode, Save, is_sharded

_FILE = "checkpoint.pt"


class TorchSave(Mode):
    """What nearly every training script does. Sharded state is gathered on rank 0 first."""

    name = "torch.save"
    flushes = False

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        state = self._state()
        if self.context.rank == 0:
            save.path.mkdir(parents=True)
            torch.save(state, save.path / _FILE)
        if self.context.group is not None:
            dist.barrier(self.context.group)
        save.end()
        return save

    def load(self) -> None:
        """`load_state_dict`, or `set_state_dict` where the state is sharded."""
        model, optimizer = self.context.model, self.context.optimizer
        state = torch.load(self.path(1) / _FILE, map_location="cpu", weights_only=True)
        by_number = isinstance(next(iter(state["optimizer"]["state"]), 0), int)
        if self.context.world_size == 1 and by_number:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            return
        names = {name for name, _ in model.named_parameters()}
        if not names & set(state["optimizer"]["state"]):
            raise RuntimeError("one process saved the optimizer by number; several ranks restore it by name")
        set_state_dict(
            model,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )

    def _state(self) -> dict[str, Any]:
        model, optimizer = self.context.model, self.context.optimizer
        if is_sharded(self.context):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights, moments = get_state_dict(model, optimizer, options=options)
            return {"model": weights, "optimizer": moments}
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
