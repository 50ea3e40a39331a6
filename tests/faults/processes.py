"""Ranks as processes of their own over a real store: they tell what they see, and are stopped and killed.

They are forks, so that one costs milliseconds. Whoever starts them must be a process in which torch has never
started a thread: those do not survive a fork.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from engine.checkpointer import Checkpointer
from engine.directory.retention import Retention
from engine.errors import CoordinationError, SaveFailedError
from engine.ranks.coordination import Coordinator
from engine.ranks.store_client import AnsweringStore
from engine.storage.local import LocalStorage
from tests.faults.layer import Act, FaultSystem, Trigger
from tests.faults.world import fresh_state

Tell = Callable[[str, Any], None]


class Process:
    """A fork that runs `work(tell, hear)`: `tell(what, value)` is read here, `hear()` waits for `go`."""

    def __init__(self, work: Callable[[Tell, Callable[[], None]], None]) -> None:
        reading, telling = os.pipe()
        hearing, going = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            os.close(going)
            _live(work, telling, hearing)
        os.close(telling)
        os.close(hearing)
        self._going = going
        self._lines = os.fdopen(reading)
        self.told: list[list[Any]] = []

    def until(self, *whats: str) -> list[Any]:
        """Read on to the first [what, value] of these; ["ended", None] when it ends before."""
        for line in self._lines:
            self.told.append(json.loads(line))
            assert self.told[-1][0] != "error", self.told[-1][1]
            if self.told[-1][0] in whats:
                return self.told[-1]
        return ["ended", None]

    def go(self) -> None:
        """Let its `hear` return."""
        os.write(self._going, b"\n")

    def wait_stopped(self) -> None:
        """Until the kernel has stopped it."""
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> int:
        """Read the rest and wait; the status as of `waitpid`."""
        self.until()
        self._lines.close()
        os.close(self._going)
        return os.waitpid(self.pid, 0)[1]


def _live(work: Callable[[Tell, Callable[[], None]], None], telling: int, hearing: int) -> None:
    def tell(what: str, value: Any) -> None:
        os.write(telling, (json.dumps([what, value]) + "\n").encode())

    def hear() -> None:
        os.read(hearing, 1)

    status = 1
    try:
        work(tell, hear)
        status = 0
    except BaseException:
        tell("error", traceback.format_exc())
    finally:
        os._exit(status)


def dies() -> Act:
    """The operation is the end of its process."""

    def act(name: str, real: Callable[[], Any]) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    return act


def stops(tell: Tell) -> Act:
    """The process stands still before the operation, until somebody wakes it."""

    def act(name: str, real: Callable[[], Any]) -> Any:
        tell("stopping", name)
        # To this thread, for which it is over before the call returns.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return real()

    return act


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def one_rank(
    rank: int, world_size: int, port: int, root: Path, run: str, *, answer_secs: float = 15.0
) -> Iterator[tuple[Checkpointer, dict[str, Any], Trigger, pytest.MonkeyPatch]]:
    """Inside a fork: this rank's checkpointer, its state and its disk. Rank 0 hosts the store."""
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank == 0 else None

    def connect() -> AnsweringStore:
        return AnsweringStore(TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20)))

    disk = Trigger()
    coordinator = Coordinator(rank, world_size, run, connect if world_size > 1 else lambda: None, server)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.ranks.store_client.ANSWER_SECS", answer_secs)
        patch.setattr("engine.checkpointer.connect_ranks", lambda *_: coordinator)
        patch.setattr(
            "engine.checkpointer.open_storage", lambda *_: LocalStorage(root, system=FaultSystem(disk))
        )
        state = fresh_state()
        yield (
            Checkpointer(root, state, per_rank=("mine",), retention=Retention(2), timeout_secs=20.0),
            state,
            disk,
            patch,
        )


def outcome_of(ckpt: Checkpointer, state: dict[str, Any], step: int) -> list[Any]:
    """["committed", step] or ["failed", why]; the save's own thread has ended by then."""
    state["model"]["w"].fill_(step)
    try:
        record = ckpt.save(step).result()
        assert record is not None
        outcome = ["committed", record.step]
    except (SaveFailedError, CoordinationError) as error:  # the latter: rank 0 died before it decided
        outcome = ["failed", str(error)]
    assert ckpt._saver is not None
    ckpt._saver.wait()
    return outcome


def impatient(ckpt: Checkpointer, patch: pytest.MonkeyPatch, secs: float | None) -> None:
    """From now on nobody waits longer than this for a rank that does not come; None: as long as usual."""
    assert ckpt._saver is not None
    ckpt._saver.runner.timeout_secs = 20.0 if secs is None else secs
    patch.setattr("engine.save.job.ACKNOWLEDGE_SECS", 20.0 if secs is None else 0.1)
    patch.setattr("engine.save.job.OUTCOME_GRACE_SECS", 60.0 if secs is None else secs)
