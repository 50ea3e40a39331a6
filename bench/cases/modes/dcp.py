"""torch.distributed.checkpoint: on the training thread, on a thread of its own, and in a process of its own.

Every collective runs on the mode's own group: on the default one, a background save would meet the
collectives of training.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import (
    AsyncCheckpointerType,
    AsyncSaveResponse,
    async_save,
    save,
)

from bench.cases.modes.base import Mode, Save, state_of
from bench.harness.session import Context


class DcpSave(Mode):
    """`dcp.save`: training waits for the disk. `dcp.load` fills a state dict that was made before."""

    name = "dcp.save"

    def save(self, number: int) -> Save:
        started = Save(self.path(number))
        save(state_of(self.context), checkpoint_id=started.path, process_group=self.context.group)
        started.end()
        return started

    def prepare(self) -> None:
        self._state = state_of(self.context)

    def load(self) -> None:
        load(self._state, checkpoint_id=self.path(1), process_group=self.context.group)


class DcpAsyncSave(Mode):
    """`dcp.async_save` with its defaults: a fresh copy of everything, which a thread writes."""

    name = "dcp.async_save"

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._staging: Future[Any] | None = None

    def save(self, number: int) -> Save:
        started = Save(self.path(number))
        response: Any = async_save(
            state_of(self.context),
            checkpoint_id=started.path,
            process_group=self.context.group,
            **self.options(),
        )
        if isinstance(response, AsyncSaveResponse):
            self._staging = response.staging_completion
            return started.follow(response.upload_completion)
        return started.follow(response)

    def options(self) -> dict[str, Any]:
        """Arguments that differ from the defaults."""
        return {}

    def before_step(self) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None


class DcpAsyncReused(DcpAsyncSave):
    """`dcp.async_save` with a `DefaultStager` that keeps its buffers: pinned and overlapped on CUDA.

    There the snapshot is complete only when the staging future is: the caller waits before the step.
    """

    name = "dcp.async_save+stager"
    shared = False
    """Whether the buffers are in shared memory, for another process to read."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.consistent_alone = not context.cuda
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=context.cuda,
                use_shared_memory=self.shared,
                use_async_staging=context.cuda,
                use_non_blocking_copy=context.cuda,
            )
        )

    def options(self) -> dict[str, Any]:
        return {"async_stager": self._stager}

    def close(self) -> None:
        self._stager.close()


class DcpAsyncProcess(DcpAsyncReused):
    """The same, written by a process of its own: no contention for the interpreter lock."""

    name = "dcp.async_save+process"
    shared = True

    def options(self) -> dict[str, Any]:
        return {**super().options(), "async_checkpointer_type": AsyncCheckpointerType.PROCESS}
