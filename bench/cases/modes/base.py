"""The interface of a way to save and restore, and a save in flight."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from bench.harness.session import Context


class Save:
    """One rank's save, in flight or over. Its times are readings of `time.perf_counter`.

    Attributes:
        path: what to flush or delete afterwards; may not be known before the end.
        causes: seconds by cause, where the mode reports them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.causes: dict[str, float] = {}
        self.ended_at = 0.0
        self.error: BaseException | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether the save has ended, with or without an error."""
        return self._over.is_set()

    def end(self, error: BaseException | None = None) -> None:
        """Record that the save has ended now. Any thread may call it; the first call counts."""
        with self._lock:
            if self.over:
                return
            self.ended_at, self.error = time.perf_counter(), error
            self._over.set()

    def follow(self, future: Future[Any]) -> Save:
        """End when the future does."""
        future.add_done_callback(lambda done: self.end(done.exception()))
        return self

    def end_after(self, work: Callable[[], object]) -> None:
        """Do the work and end with it, or with the error that it raised."""
        try:
            work()
        except Exception as error:
            self.end(error)
        else:
            self.end()

    def end_beside(self, work: Callable[[], object]) -> None:
        """The same, on a thread of its own."""
        threading.Thread(target=self.end_after, args=(work,), name="bench-save", daemon=True).start()

    def wait(self, timeout_secs: float) -> None:
        """Wait for the end. Raises TimeoutError."""
        if not self._over.wait(timeout_secs):
            raise TimeoutError(f"the save was not over after {timeout_secs:g} s")


class Mode:
    """A way to save one state, and to restore it in place. Only the training thread uses it.

    Attributes:
        name: the name in `--modes` and in the tables.
        flushes: whether the files are on the disk when it says that a save is done.
        consistent_alone: whether the snapshot is complete when `save` has returned. If not, the caller must
            delay the optimizer: `before_step` and `after_step` do, and the wait counts as blocked.
        read_bytes: the bytes of files that the last `load` asked for, where that is known.
    """

    name: ClassVar[str]
    flushes: ClassVar[bool] = True
    consistent_alone: bool = True
    read_bytes: int | None = None

    def __init__(self, context: Context) -> None:
        self.context = context

    def save(self, number: int) -> Save:
        """Save the state; returns when training may continue. Collective."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Before the optimizer changes the state."""

    def after_step(self) -> None:
        """After the optimizer has changed the state."""

    def poll(self) -> None:
        """Called after every step, for a mode whose caller must look for failures."""

    def prepare(self) -> None:
        """What a restore needs before `load`. It is not timed."""

    def load(self) -> None:
        """Restore save 1 into the live state. Collective."""
        raise NotImplementedError

    def close(self) -> None:
        """Release everything. No save is in flight."""

    def path(self, number: int) -> Path:
        """The folder of save `number`."""
        return self.context.directory / f"save-{number:05d}"


def state_of(context: Context) -> dict[str, Any]:
    """Model and optimizer under canonical names, tensors as each rank holds them."""
    model, optimizer = get_state_dict(context.model, context.optimizer)
    return {"model": model, "optimizer": optimizer}


def is_sharded(context: Context) -> bool:
    """Whether each rank holds a part of the parameters only."""
    return any(isinstance(parameter, DTensor) for parameter in context.model.parameters())
