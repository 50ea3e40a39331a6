"""Turns signals into a request to stop, for your own training loop.

A signal to the whole process group (from Slurm, a terminal, a container's stop) also reaches DataLoader
workers. They often die first, and torch then raises in the training process in the middle of a step: the
checkpoint that the signal asked for is never taken. So workers are shielded from the signal, and the error
that a worker's death raises is delayed until the loop is between two steps.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from engine.forks import Home, in_child
from engine.loaders import ReshardableLoader
from engine.process_end import end_at_once

log = logging.getLogger(__name__)

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SECS = 2.0
"""A second signal this long after the first acts as usual; an earlier one repeats the same request."""
ARRIVAL_SECS = 2.0
"""How long after a worker's death the signal that killed it may still arrive in this process."""


class StopSignals:
    """Makes SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 end the loop between two steps. For the main thread.

        with StopSignals() as stop, Checkpointer(directory, state) as ckpt:
            for batch in stop.batches(loader):
                ...
            if stop.requested:
                ckpt.save(step, reasons=("signal",))

    With several ranks, `batches` makes them agree before each batch, by one small all-reduce in the default
    process group, so that all stop at the same step. A second signal, two seconds later, acts as usual.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The first signal that this process received."""
        self._agreed = False
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._worker_error: Exception | None = None
        self._home = Home()

    @property
    def requested(self) -> bool:
        """Whether to stop: this process, or some rank as of the last agreement, has received a signal."""
        return self._agreed or self.signum is not None

    def __enter__(self) -> StopSignals:
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._receive)
        in_child(self._leave_to_parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._home.left:
            for signum, handler in self._previous.items():
                if signum != signal.SIGCHLD or self._notes_worker_errors:
                    signal.signal(signum, handler)
        self._previous.clear()

    def agree(self) -> bool:
        """Whether to stop, the same on every rank. Collective when there are several ranks."""
        if _world_size() == 1:
            return self.requested
        import torch
        import torch.distributed as dist

        device = "cuda" if "nccl" in dist.get_backend() else "cpu"
        asked = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        self._agreed = bool(asked.item())
        return self._agreed

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's batches, until it ends or the loop should stop. No batch is dropped.

        Raises: the loader's error, unless a signal explains it.
        """
        _shield_workers(loader.loader if isinstance(loader, ReshardableLoader) else loader)
        iterator = iter(loader)
        self._delay_worker_errors()
        while True:
            if self._worker_error is not None and not self._signal_arrives():
                raise self._worker_error
            if self.agree():
                return
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # of any class, when a worker died in mid-transfer
                # The other ranks have agreed to continue; it is too late to tell them.
                if _world_size() > 1 or not self._signal_arrives():
                    raise
                log.warning("stopping on signal %s; the loader also failed: %r", self.signum, error)
                return
            yield batch

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
        elif now - self._since >= REPEAT_SECS:
            signal.signal(signum, self._previous.get(signum, signal.SIG_DFL))
            os.kill(os.getpid(), signum)

    def _signal_arrives(self) -> bool:
        """Whether this process also receives the signal that killed a worker. Waits for it."""
        end = time.monotonic() + ARRIVAL_SECS
        while not self.requested and time.monotonic() < end:
            time.sleep(0.02)  # in the main thread, where handlers run
        return self.requested

    def _delay_worker_errors(self) -> None:
        """torch's SIGCHLD handler raises wherever the main thread is, even inside `optimizer.step()`."""
        raises = signal.getsignal(signal.SIGCHLD)
        if callable(raises) and not self._notes_worker_errors:
            self._previous[signal.SIGCHLD] = raises
            signal.signal(signal.SIGCHLD, self._note_worker_error)

    @property
    def _notes_worker_errors(self) -> bool:
        return signal.getsignal(signal.SIGCHLD) == self._note_worker_error

    def _note_worker_error(self, signum: int, frame: FrameType | None) -> None:
        try:
            self._previous[signal.SIGCHLD](signum, frame)
        except RuntimeError as error:
            self._worker_error = error

    def _leave_to_parent(self) -> None:
        """In a forked child: SIGTERM ends it as before; the other signals concern the parent alone."""
        for signum, handler in self._previous.items():
            if signum in (signal.SIGTERM, signal.SIGCHLD):
                signal.signal(signum, handler)
            else:
                signal.signal(signum, signal.SIG_IGN)


def _world_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _shield_workers(loader: Any) -> None:
    """Set `worker_init_fn`, which a DataLoader reads when it makes its next iterator."""
    if getattr(loader, "num_workers", 0) and hasattr(loader, "worker_init_fn"):
        init = loader.worker_init_fn
        if not (isinstance(init, functools.partial) and init.func is shield_worker):
            loader.worker_init_fn = functools.partial(shield_worker, init=init)


def shield_worker(worker_id: int, init: Callable[[int], None] | None = None) -> None:
    """In a data worker: ignore these signals, except SIGTERM from the parent. Then run the user's `init`."""
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def listen() -> None:
        while True:
            info = signal.sigwaitinfo(SIGNALS)
            if info.si_signo == signal.SIGTERM and info.si_pid == parent:
                end_at_once(0, flush=False)

    threading.Thread(target=listen, name="holdfast-shield", daemon=True).start()
    if init is not None:
        init(worker_id)
