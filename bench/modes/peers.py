"""Checkpoint libraries beside torch's own. Imported when used: each may be missing."""

from __future__ import annotations

import threading
from typing import Any

from torch.distributed.tensor import DTensor

from bench.modes.base import Context, Durability, Mode, Save, state_of


class TorchCheckpointing(Mode):
    """`torch_checkpointing.CheckpointManager`: copies on a thread, writes from a process.

    Its copy runs on beside training; the caller takes `manager.lock()` around the optimizer step. On CPU
    pinned memory and non-blocking copies are off, and direct I/O everywhere: its writer hands O_DIRECT
    unaligned buffers, which ends in EINVAL. Sharded state gets the resharder on CUDA only: 0.1.1 gathers its
    metadata in CUDA tensors. Without it a checkpoint loads at the same world size alone.
    """

    name = "torch_checkpointing"
    durability = Durability.NOTHING
    consistent_alone = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        from torch_checkpointing import CheckpointManager, ItemSpec
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(use_pinned_memory=context.cuda, use_non_blocking_copy=context.cuda)
        sharded = any(isinstance(parameter, DTensor) for parameter in context.model.parameters())
        item = ItemSpec(resharder=DefaultResharder()) if sharded and context.cuda else ItemSpec()
        self._manager: Any = CheckpointManager.Config(
            items={"model": item, "optimizer": item},
            save=AsyncCheckpointSaverConfig(
                staging_config=staging, wait_timeout_secs=round(context.timeout_secs)
            ),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()
        self._held: Any = None

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        return save.follow(self._manager.save(str(save.path), state_of(self.context)))

    def before_step(self) -> None:
        self._held = self._manager.lock()
        self._held.__enter__()

    def after_step(self) -> None:
        held, self._held = self._held, None
        held.__exit__(None, None, None)

    def close(self) -> None:
        self._manager.close()


class TorchSnapshot(Mode):
    """`torchsnapshot.Snapshot.async_take`.

    It knows no DTensor, so each rank hands over its local shards; state that all ranks hold is declared so.
    """

    name = "torchsnapshot"
    durability = Durability.NOTHING

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        from torchsnapshot import Snapshot, StateDict

        sharded = any(isinstance(parameter, DTensor) for parameter in context.model.parameters())
        self._replicated = ["**"] if context.world_size > 1 and not sharded else []
        self._snapshot: Any = Snapshot
        self._state_dict: Any = StateDict

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        state = self._state_dict(**_local(state_of(self.context)))
        pending = self._snapshot.async_take(
            str(save.path), {"state": state}, pg=self.context.group, replicated=self._replicated
        )
        # It has no callback; a thread that waits for its own thread knows the moment.
        threading.Thread(target=_await, args=(pending, save), name="bench-await", daemon=True).start()
        return save


def _await(pending: Any, save: Save) -> None:
    try:
        pending.wait()
    except Exception as error:
        save.end(error)
    else:
        save.end()


def _local(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _local(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_local(item) for item in value]
    return value.to_local() if isinstance(value, DTensor) else value
