"""A whole job in one process: ranks as threads, their store in memory, their disks and storages faulty.

Nothing here waits for a clock. A rank that hangs is known to hang; as soon as every other rank waits for
something that can no longer come, the earliest of their deadlines has passed, at once. `elapsed_secs` adds
up what a real job would have waited.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from engine.checkpointer import Checkpointer
from engine.directory.record import CheckpointRecord
from engine.directory.retention import Retention
from engine.ranks.coordination import Coordinator
from engine.save.commit import confirm_files
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from tests.faults.layer import FaultStorage, FaultSystem, Trigger

TIMEOUT_SECS = 100.0
PATIENCE_SECS = 20.0
"""Bounds a test that hangs against every expectation."""
ROWS = 48
COLUMNS = 512

_here = threading.local()
T = TypeVar("T")


class MemoryStore:
    """The store of all ranks. `dead` ends it, as the death of the rank that hosts it does."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._changed = threading.Condition()
        self._data: dict[str, bytes] = {}
        self._waiting: dict[object, tuple[int, float, list[str]]] = {}
        self._stuck: set[int] = set()
        self._idle = set(range(world_size))
        self._resting: set[int | None] = set()
        self._released = threading.Event()
        self.elapsed_secs = 0.0
        self.dead = False

    @property
    def keys(self) -> set[str]:
        return set(self._data)

    def end(self) -> None:
        with self._changed:
            self.dead = True
            self._changed.notify_all()

    def hang(self, rank: int) -> None:
        """The calling rank makes no progress until `release`."""
        with self._changed:
            self._stuck.add(rank)
            self._resting.add(threading.get_ident())
            self._changed.notify_all()
            self._changed.wait_for(self._released.is_set)
            self._stuck.discard(rank)
            self._resting.discard(threading.get_ident())

    def release(self) -> None:
        """Whoever hangs goes on."""
        with self._changed:
            self._released.set()
            self._changed.notify_all()

    def hold_again(self) -> None:
        """Calls of `hang` hang again."""
        self._released = threading.Event()

    def begin(self) -> None:
        """Every rank is about to do something."""
        self._idle = set()

    def finish(self, rank: int) -> None:
        """A rank has nothing more to say for now."""
        with self._changed:
            self._idle.add(rank)
            self._changed.notify_all()

    def wait(self, rank: int, keys: list[str], timeout_secs: float) -> None:
        me = object()
        with self._changed:
            self._resting.add(threading.get_ident())
            self._waiting[me] = (rank, self.elapsed_secs + timeout_secs, keys)
            self._changed.notify_all()
            try:
                while not all(key in self._data for key in keys):
                    self._check_alive()
                    if self._nothing_can_come() and self._earliest() is me:
                        self.elapsed_secs = max(self.elapsed_secs, self._waiting[me][1])
                        raise dist.DistStoreError("wait timeout")
                    self._changed.wait(0.02)  # the end of a save's thread notifies nobody
            finally:
                del self._waiting[me]
                self._resting.discard(threading.get_ident())
                self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        with self._changed:
            self._check_alive()
            self._data[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            self._check_alive()
            return self._data[key]

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            self._check_alive()
            return all(key in self._data for key in keys)

    def delete(self, key: str) -> bool:
        with self._changed:
            self._check_alive()
            return self._data.pop(key, None) is not None

    def _check_alive(self) -> None:
        if self.dead:
            raise dist.DistNetworkError("connection reset by peer")

    def _nothing_can_come(self) -> bool:
        stuck = set() if self._released.is_set() else self._stuck
        # One whose keys are there has only not woken up yet.
        if any(all(key in self._data for key in keys) for _, _, keys in self._waiting.values()):
            return False
        saving = [thread for thread in threading.enumerate() if thread.name.startswith("holdfast-save")]
        if any(thread.ident not in self._resting for thread in saving):
            return False
        waiting = {rank for rank, _, _ in self._waiting.values()}
        return stuck | waiting | self._idle == set(range(self._world_size))

    def _earliest(self) -> object:
        return min(self._waiting, key=lambda waiter: self._waiting[waiter][1])


@dataclass(frozen=True)
class RankStore:
    """One rank's client of the store."""

    store: MemoryStore
    rank: int

    def set(self, key: str, value: bytes, /) -> None:
        self.store.set(key, value)

    def get(self, key: str, /) -> bytes:
        return self.store.get(key)

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        self.store.wait(self.rank, keys, timeout.total_seconds())

    def check(self, keys: list[str], /) -> bool:
        return self.store.check(keys)

    def delete_key(self, key: str, /) -> bool:
        return self.store.delete(key)


@dataclass
class Rank:
    """One rank: its state, its disk, its storage, its checkpointer."""

    rank: int
    state: dict[str, Any]
    disk: Trigger = field(default_factory=Trigger)
    asked: Trigger = field(default_factory=Trigger)
    checkpointer: Checkpointer | None = None

    @property
    def ckpt(self) -> Checkpointer:
        assert self.checkpointer is not None
        return self.checkpointer

    def fill(self, value: int) -> None:
        """Give the state the look of that step."""
        self.state["model"]["w"].fill_(value)
        self.state["mine"]["v"].fill_(value * 10 + self.rank)
        self.state["counter"]["step"] = value

    def shows(self) -> int | None:
        """The step whose look the whole state has; None if it is of no step, or a mixture."""
        step = int(self.state["counter"]["step"])
        whole = bool((self.state["model"]["w"] == step).all())
        mine = bool((self.state["mine"]["v"] == step * 10 + self.rank).all())
        return step if whole and mine else None


def fresh_state() -> dict[str, Any]:
    return {
        "model": {"w": torch.zeros(ROWS, COLUMNS)},
        "mine": {"v": torch.zeros(8)},
        "counter": {"step": -1},
    }


_worlds = 0


class World:
    """A job of `world_size` ranks on one directory. Use `World.open`; it closes what it started."""

    def __init__(self, root: Path, world_size: int, storage: Callable[[Rank], Storage] | None = None) -> None:
        global _worlds
        _worlds += 1
        self.root = root
        self.store = MemoryStore(world_size)
        self.ranks = [Rank(rank, fresh_state()) for rank in range(world_size)]
        self.number = _worlds
        self._run_id = f"world-{_worlds}"
        self._make_storage = storage or self._local
        self.when_started: Callable[[Rank], None] = lambda rank: None

    def now(self) -> float:
        """The job's clock: it moves on when a deadline passes."""
        return time.monotonic() + self.store.elapsed_secs

    def _local(self, rank: Rank) -> Storage:
        return FaultStorage(LocalStorage(self.root, system=FaultSystem(rank.disk)), rank.asked)

    def each(self, work: Callable[[Rank], T]) -> list[T | BaseException]:
        """Run `work` on every rank at once, in threads; what it returned or raised, by rank."""
        results: list[T | BaseException] = [RuntimeError("never ran")] * len(self.ranks)

        def run(rank: Rank) -> None:
            _here.world, _here.rank = self, rank
            try:
                results[rank.rank] = work(rank)
            except BaseException as error:
                results[rank.rank] = error
            finally:
                self.store.finish(rank.rank)

        self.store.begin()
        threads = [
            threading.Thread(target=run, args=(rank,), name=f"rank-{rank.rank}", daemon=True)
            for rank in self.ranks
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_SECS)
            if thread.is_alive():
                faulthandler.dump_traceback()
                raise AssertionError(f"{thread.name} hangs beyond every deadline")
        return results

    def start(self, **given: Any) -> None:
        """Make every rank's checkpointer."""

        def make(rank: Rank) -> None:
            arguments: dict[str, Any] = {
                "per_rank": ("mine",),
                "retention": Retention(rolling=2),
                "timeout_secs": TIMEOUT_SECS,
                **given,
            }
            try:
                rank.checkpointer = Checkpointer(self.root, rank.state, **arguments)
            finally:
                self.when_started(rank)
            saver = rank.checkpointer._saver
            if saver is not None:
                saver.clock = saver.runner.clock = self.now

        raise_first(self.each(make))

    def save(self, step: int, **given: Any) -> list[CheckpointRecord | BaseException]:
        """Save that step on every rank and wait for the outcome; record or error, by rank."""

        def save(rank: Rank) -> CheckpointRecord:
            rank.fill(step)
            record = rank.ckpt.save(step, **given).result(PATIENCE_SECS)
            assert record is not None
            return record

        return self.each(save)

    def settle(self) -> None:
        """Wait until the background threads have done what comes after the outcome."""

        def settle(rank: Rank) -> None:
            saver = rank.ckpt._saver
            assert saver is not None
            saver.wait(PATIENCE_SECS)

        raise_first(self.each(settle))

    def restore(self, selector: str = "latest") -> list[CheckpointRecord | BaseException | None]:
        """Restore on every rank; record or error, by rank. The state is emptied before."""

        def restore(rank: Rank) -> CheckpointRecord | None:
            rank.fill(-1)
            return rank.ckpt.restore(selector)

        return self.each(restore)

    def close(self) -> None:
        for rank in self.ranks:
            rank.disk.disarm()
            rank.asked.disarm()
        self.store.release()

        def close(rank: Rank) -> None:
            if rank.checkpointer is not None:
                rank.checkpointer.close()

        self.each(close)

    def coordinator(self, rank: Rank) -> Coordinator:
        return Coordinator(
            rank.rank, len(self.ranks), self._run_id, lambda: RankStore(self.store, rank.rank), self.store
        )


def here() -> World:
    """The job that the calling rank belongs to."""
    world: World = _here.world
    return world


def raise_first(outcomes: list[Any]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def _confirm_at_once(*args: Any, clock: Callable[[], float], **given: Any) -> None:
    """`confirm_files`, for which the time that it wants to sleep has passed."""
    slept_secs = [0.0]

    def sleep(secs: float) -> None:
        slept_secs[0] += secs

    confirm_files(*args, clock=lambda: clock() + slept_secs[0], sleep=sleep, **given)


@contextmanager
def job(root: Path, world_size: int, *, world: World | None = None, **given: Any) -> Iterator[World]:
    """A running job; closed at the end whatever happened. `world`: one whose faults are set already."""
    world = world or World(root, world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.checkpointer.connect_ranks", lambda *_: _here.world.coordinator(_here.rank))
        patch.setattr("engine.checkpointer.open_storage", lambda *_: _here.world._make_storage(_here.rank))
        patch.setattr("engine.save.job.confirm_files", _confirm_at_once)
        try:
            world.start(**given)
            yield world
        finally:
            world.close()
