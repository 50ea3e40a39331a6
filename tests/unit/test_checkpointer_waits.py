"""What a training loop waits for, shown by the order of storage calls, not by clocks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.mirror.uploader import THREAD_NAME
from engine.save.saver import Saver
from engine.storage.base import Storage
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use

State = dict[str, Any]

OPERATIONS = frozenset(name for name in vars(Storage) if not name.startswith("_")) - {"describe", "uri"}
TRAINING = threading.main_thread().name
BLOCKING = {"wait", "capture", "copy"}
"""All that a save takes of the training thread's time."""


class Watched(ControlledStorage):
    """Notes which thread calls which operation. With `open` cleared, every operation hangs."""

    def __init__(self, root: Path) -> None:
        self.calls_of: list[tuple[str, str]] = []
        self.open, self.asked_in_vain = threading.Event(), threading.Event()
        self.open.set()
        super().__init__(root)

    def __getattribute__(self, name: str) -> Any:
        if name in OPERATIONS:
            self.calls_of.append((threading.current_thread().name, name))
            if not self.open.is_set():
                self.asked_in_vain.set()
            assert self.open.wait(DEADLINE_SECS), "the test never opened it"
        return super().__getattribute__(name)

    def operations(self, thread: str) -> list[str]:
        """What threads of that name have called, in order."""
        return [name for caller, name in list(self.calls_of) if caller.startswith(thread)]

    def callers(self) -> set[str]:
        return {caller for caller, _ in list(self.calls_of)}


def state() -> State:
    return {"values": {"n": 0, "t": torch.zeros(30_000)}}


def test_with_wait_training_waits_for_the_save_in_flight_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage stands still until training has no more to do than to wait for it."""
    storage = Watched(tmp_path / "run")
    use(monkeypatch, storage)
    order: list[str] = []
    events: list[State] = []

    def note(event: State) -> None:
        events.append(event)
        order.append(f"{event['event']} {event['step']}")

    real_wait = Saver.wait

    def wait(saver: Saver, timeout: float | None = None) -> None:
        order.append("training waits")
        storage.gate.set()
        real_wait(saver, timeout)
        order.append("training goes on")

    source = state()
    with Checkpointer("ignored", source, busy="wait", on_event=note) as checkpointer:
        storage.calls_of.clear()
        storage.gate.clear()
        checkpointer.save(10)
        monkeypatch.setattr(Saver, "wait", wait)
        for step in range(11, 20):
            source["values"]["t"].add_(1.0)
            checkpointer.poll()
            order.append(f"step {step}")
        checkpointer.save(20).result(DEADLINE_SECS)
        assert storage.operations(TRAINING) == [], "it never calls the storage itself"
    until = order.index("save_started 20")
    assert order[: until + 1] == [
        "save_started 10",
        "save_snapshotted 10",
        *(f"step {step}" for step in range(11, 20)),
        "training waits",
        "save_committed 10",
        "training goes on",
        "save_started 20",
    ]
    taken = [set(event["secs_by_cause"]) for event in events if event["event"] == "save_snapshotted"]
    assert taken == [BLOCKING, BLOCKING]


def saves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mirror: Watched | None
) -> tuple[list[str], list[set[str]]]:
    """Ten saves: the storage operations that made them durable, and the causes that took their time.

    A mirror hangs in whatever is asked of it, from the first save to the last.
    """
    events: list[State] = []
    local = Watched(folder)
    with monkeypatch.context() as patched:
        use(patched, local)
        patched.setattr("engine.mirror.uploader.open_storage", lambda address, options=None: mirror)
        second = None if mirror is None else "mirror:"
        checkpointer = Checkpointer("ignored", state(), mirror=second, retention=None, on_event=events.append)
        with checkpointer:
            local.calls_of.clear()
            if mirror is not None:
                mirror.open.clear()
                mirror.calls_of.clear()
            for step in range(10, 101, 10):
                assert checkpointer.save(step).result(DEADLINE_SECS) is not None
            checkpointer.wait()
            operations = local.operations("holdfast-save-")
            if mirror is not None:
                assert mirror.asked_in_vain.wait(DEADLINE_SECS), "asked for nothing: this shows nothing"
                waiting = mirror.callers()
                mirror.open.set()
                assert THREAD_NAME in waiting
                assert not any(name == TRAINING or name.startswith("holdfast-save-") for name in waiting)
                assert not any(event["event"] == "mirror_copied" for event in events)
            done = [event for event in events if event["event"] == "save_committed"]
    assert [event["step"] for event in done] == list(range(10, 101, 10))
    return operations, [set(event["secs_by_cause"]) for event in done]


def test_saves_do_the_same_work_beside_a_mirror_that_hangs_in_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that their time is that of a run without one: no call of theirs goes to the mirror."""
    alone = saves(tmp_path / "alone", monkeypatch, None)
    mirrored = saves(tmp_path / "local", monkeypatch, Watched(tmp_path / "mirror"))
    assert mirrored == alone
    operations, causes = alone
    assert operations.count("write_shard") == operations.count("publish") == 10
    assert causes == [BLOCKING | {"write", "fsync", "digest", "index", "receipts", "commit"}] * 10
