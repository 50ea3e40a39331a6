"""What every way to save has in common: how it is opened, called, told to be done, and closed."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict


class Durability(enum.Enum):
    """What has been flushed to the disk when a mode says that a save is done."""

    ALL = "files and directories"
    FILES = "files"
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True)
class Context:
    """What is saved, and where. `group`: a gloo process group that nothing else uses."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    directory: Path
    rank: int
    world_size: int
    group: dist.ProcessGroup | None
    timeout_secs: float

    @property
    def cuda(self) -> bool:
        """Whether the state lies on a CUDA device."""
        return self.device.type == "cuda"


class Save:
    """One rank's save, in flight or over. Its times are readings of `time.perf_counter`.

    Attributes:
        path: what there is to flush or delete afterwards; may be known only at the end.
        causes: seconds by cause, where the mode reports them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.causes: dict[str, float] = {}
        self.ended_at = 0.0
        self.error: BaseException | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    @property
    def over(self) -> bool:
        """Whether the save has ended, well or badly."""
        return self._over.is_set()

    def end(self, error: BaseException | None = None) -> None:
        """The save has ended now. The first call counts; any thread may make it."""
        with self._lock:
            if self.over:
                return
            self.ended_at, self.error = time.perf_counter(), error
            self._over.set()
        for listener in self._listeners:
            listener()

    def follow(self, future: Future[Any]) -> Save:
        """End when the future does."""
        future.add_done_callback(lambda done: self.end(done.exception()))
        return self

    def wait(self, timeout_secs: float) -> None:
        """Wait for the end. Raises TimeoutError."""
        if not self._over.wait(timeout_secs):
            raise TimeoutError(f"the save was not over after {timeout_secs:g} s")


class Mode:
    """A way to save. Made anew for every state; used by the training thread only.

    Class attributes:
        name: what `--modes` and the tables call it.
        durability: what its own notion of "done" covers.
        consistent_alone: whether the snapshot is whole when `save` has returned. If not, the caller has to
            hold the optimizer back: `before_step` and `after_step` do, and the wait counts as blocked.
        optional: whether it is a peer that may be missing without anybody minding.
    """

    name: ClassVar[str]
    durability: ClassVar[Durability] = Durability.FILES
    consistent_alone: ClassVar[bool] = True

    def __init__(self, context: Context) -> None:
        self.context = context

    def save(self, number: int) -> Save:
        """Save the state; returns when training may go on. Collective."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Before the optimizer changes the state."""

    def after_step(self) -> None:
        """After the optimizer has changed the state."""

    def poll(self) -> None:
        """After every step: where a mode has its caller look for failures."""

    def close(self) -> None:
        """Give everything back. No save is in flight."""

    def path(self, number: int) -> Path:
        """A place for save `number` that has never been used."""
        return self.context.directory / f"save-{number:05d}"


def state_of(context: Context) -> dict[str, Any]:
    """Model and optimizer under canonical names, tensors as each rank holds them."""
    model, optimizer = get_state_dict(context.model, context.optimizer)
    return {"model": model, "optimizer": optimizer}
