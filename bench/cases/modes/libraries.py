"""Checkpoint libraries that are not part of torch. Each is imported when it is used: it may be missing."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import DTensor

from bench.cases.modes.base import Mode, Save, is_sharded, state_of
from bench.harness.session import Context


class TorchCheckpointing(Mode):
    """`torch_checkpointing.CheckpointManager`: copies on a thread, writes from a process.

    Its copy overlaps training: the caller holds `manager.lock()` around the optimizer step. Pinned memory
    and non-blocking copies are off on CPU. Direct I/O is off everywhere: its writer passes unaligned buffers
    to O_DIRECT, which fails with EINVAL. Sharded state gets the resharder on CUDA only, since 0.1.1 gathers
    its metadata in CUDA tensors; without it, a checkpoint loads at the same world size only.
    """

    name = "torch_checkpointing"
    flushes = False
    consistent_alone = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        from torch_checkpointing import CheckpointManager, ItemSpec
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(use_pinned_memory=context.cuda, use_non_blocking_copy=context.cuda)
        resharded = is_sharded(context) and context.cuda
        item = ItemSpec(resharder=DefaultResharder()) if resharded else ItemSpec()
        self._manager: Any = CheckpointManager.Config(
            items={"model": item, "optimizer": item},
            save=AsyncCheckpointSaverConfig(
                staging_config=staging, wait_timeout_secs=round(context.timeout_secs)
            ),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        ).build()
        self._lock: Any = None

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        return save.follow(self._manager.save(str(save.path), state_of(self.context)))

    def before_step(self) -> None:
        self._lock = self._manager.lock()
        self._lock.__enter__()

    def after_step(self) -> None:
        lock, self._lock = self._lock, None
        lock.__exit__(None, None, None)

    def prepare(self) -> None:
        self._state = state_of(self.context)

    def load(self) -> None:
        self._manager.load(str(self.path(1)), into=self._state)

    def close(self) -> None:
        self._manager.close()


class TorchSnapshot(Mode):
    """`torchsnapshot.Snapshot.async_take`.

    It does not know DTensor, so each rank passes its local shards; state that all ranks have is declared so.
    """

    name = "torchsnapshot"
    flushes = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        from torchsnapshot import Snapshot, StateDict

        self._replicated = ["**"] if context.world_size > 1 and not is_sharded(context) else []
        self._snapshot: Any = Snapshot
        self._state_dict: Any = StateDict

    def save(self, number: int) -> Save:
        save = Save(self.path(number))
        state = self._state_dict(**_local(state_of(self.context)))
        pending = self._snapshot.async_take(
            str(save.path), {"state": state}, pg=self.context.group, replicated=self._replicated
        )
        # It has no callback: only a thread that waits for it notices its end at once.
        save.end_beside(pending.wait)
        return save


def _local(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _local(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_local(item) for item in value]
    return value.to_local() if isinstance(value, DTensor) else value
