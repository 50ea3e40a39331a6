"""`torch.save` by rank 0: one file, training waits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import DTensor

from bench.modes.base import Durability, Mode, Save


class TorchSave(Mode):
    """What nearly every training script does. Sharded state is gathered on rank 0 first."""

    name = "torch.save"
    durability = Durability.NOTHING

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        state = self._state()
        if self.context.rank == 0:
            save.path.mkdir(parents=True)
            torch.save(state, save.path / "checkpoint.pt")
        if self.context.group is not None:
            dist.barrier(self.context.group)
        save.end()
        return save

    def _state(self) -> dict[str, Any]:
        model, optimizer = self.context.model, self.context.optimizer
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights, moments = get_state_dict(model, optimizer, options=options)
            return {"model": weights, "optimizer": moments}
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
