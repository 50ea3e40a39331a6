"""A failed save does not end training: it is logged and tried again. Too many, or a bad state, raise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer, SaveHandle
from engine.errors import (
    ConfigError,
    DamagedError,
    HoldfastError,
    LateRanksError,
    LeaseLostError,
    MemoryBudgetError,
    PeerFailedError,
    ReplicaMismatchError,
    SaveFailedError,
    SaveStuckError,
    StorageFullError,
    TornSnapshotError,
    UnsavableValueError,
    may_pass,
)
from engine.options import FailurePolicy
from engine.save.messages import all_may_pass
from engine.save.outcomes import Outcomes
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (StorageFullError("full"), True),
        (LateRanksError("late", (1,)), True),
        (DamagedError("a receipt"), True),
        (OSError("a raw one"), True),
        (SaveFailedError("unknown"), True),
        (PeerFailedError("disk", may_pass=True), True),
        (PeerFailedError("state"), False),
        (SaveStuckError("hangs"), True),
        (SaveFailedError("state", may_pass=False), False),
        (UnsavableValueError("state"), False),
        (ReplicaMismatchError("state"), False),
        (MemoryBudgetError("too large"), False),
        (TornSnapshotError("state"), False),
        (LeaseLostError("taken"), False),
        (ConfigError("wrong"), False),
        (RuntimeError("a bug"), False),
    ],
)
def test_which_failures_may_pass(error: Exception, passes: bool) -> None:
    assert may_pass(error) is passes


@pytest.mark.parametrize(
    ("descriptions", "passes"),
    [
        (["StorageFullError: no space"], True),
        (["StorageFullError: no space", "CoordinationError: did not come"], True),
        (["StorageFullError: no space", "UnsavableValueError: a lambda"], False),
        (["TornSnapshotError: x"], False),
        (["BlockingIOError: x"], True),
        (["ZeroDivisionError: x"], False),
        (["NoSuchKind: x"], False),
        (["annotations: x"], False),
    ],
)
def test_which_failures_of_other_ranks_may_pass(descriptions: list[str], passes: bool) -> None:
    assert all_may_pass(descriptions) is passes


def test_what_is_endured() -> None:
    full, state = StorageFullError("full"), UnsavableValueError("state")
    outcomes = Outcomes(FailurePolicy("warn", 2))
    outcomes.note(None)
    assert outcomes.tolerates(full)
    assert not outcomes.tolerates(state)
    outcomes.note(None)
    assert not outcomes.tolerates(full)
    assert not Outcomes(FailurePolicy("raise", 2)).tolerates(full)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlledStorage:
    made = ControlledStorage(tmp_path / "run")
    use(monkeypatch, made)
    return made


def state() -> dict[str, Any]:
    return {"values": {"n": 0, "t": torch.zeros(300_000)}}


def no_space(path: str) -> None:
    raise StorageFullError(f"could not write {path}: no space is left")


def works(path: str) -> None: ...


def save(checkpointer: Checkpointer, storage: ControlledStorage, step: int, *, fails: bool) -> SaveHandle:
    """Save, and wait for the outcome without asking what it is."""
    storage.broken = no_space if fails else works
    handle = checkpointer.save(step)
    assert checkpointer._saver is not None
    checkpointer._saver.wait(DEADLINE_SECS)
    return handle


def test_training_goes_on_after_a_failed_save(
    storage: ControlledStorage, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[dict[str, Any]] = []
    with Checkpointer("ignored", state(), on_event=events.append) as checkpointer:
        handle = save(checkpointer, storage, 1, fails=True)
        checkpointer.poll()
        save(checkpointer, storage, 2, fails=False)
        assert checkpointer.failed_saves == 0
        assert [item.step for item in checkpointer.list()] == [2]
    assert "step 1 was not saved" in caplog.text
    (failed,) = [event for event in events if event["event"] == "save_failed"]
    assert failed["step"] == 1
    assert "no space" in failed["cause"]
    with pytest.raises(SaveFailedError, match="step 1 was not saved"):
        handle.result(0)


NEXT: dict[str, Callable[[Checkpointer], object]] = {
    "save": lambda checkpointer: checkpointer.save(9),
    "poll": lambda checkpointer: checkpointer.poll(),
}


@pytest.mark.parametrize("way", NEXT)
def test_too_many_failures_in_a_row_are_raised(way: str, storage: ControlledStorage) -> None:
    with Checkpointer("ignored", state(), max_failures=3) as checkpointer:
        for step in (1, 2):
            save(checkpointer, storage, step, fails=True)
        save(checkpointer, storage, 3, fails=False)
        for step in (4, 5, 6):
            checkpointer.poll()
            save(checkpointer, storage, step, fails=True)
        with pytest.raises(SaveFailedError, match=r"3 saves in a row failed.*step 6 was not saved"):
            NEXT[way](checkpointer)
        checkpointer.poll()
        save(checkpointer, storage, 7, fails=False)
        assert [item.step for item in checkpointer.list()] == [3, 7], "whoever caught it may go on"


def test_close_raises_if_the_newest_save_failed(storage: ControlledStorage) -> None:
    checkpointer = Checkpointer("ignored", state())
    save(checkpointer, storage, 1, fails=True)
    with pytest.raises(SaveFailedError, match="step 1 was not saved"):
        checkpointer.close()


@pytest.mark.parametrize("way", ["result", "wait", "poll", "save"])
def test_close_does_not_raise_what_another_call_has_raised(way: str, storage: ControlledStorage) -> None:
    checkpointer = Checkpointer("ignored", state(), max_failures=1)
    handle = save(checkpointer, storage, 1, fails=True)
    calls: dict[str, Callable[[], object]] = {"result": handle.result, "wait": checkpointer.wait}
    calls |= {name: functools.partial(call, checkpointer) for name, call in NEXT.items()}
    with pytest.raises(SaveFailedError, match="step 1 was not saved"):
        calls[way]()
    checkpointer.close()


def test_whoever_waits_for_a_save_hears_that_it_failed(storage: ControlledStorage) -> None:
    with Checkpointer("ignored", state()) as checkpointer:
        save(checkpointer, storage, 1, fails=True)
        with pytest.raises(SaveFailedError, match="step 1 was not saved"):
            checkpointer.wait()
        checkpointer.wait()


def test_a_bug_is_raised_at_the_next_save(storage: ControlledStorage) -> None:
    def bug(path: str) -> None:
        raise ZeroDivisionError("a bug in a writer")

    with Checkpointer("ignored", state()) as checkpointer:
        storage.broken = bug
        checkpointer.save(1)
        with pytest.raises(SaveFailedError, match="a bug in a writer"):
            checkpointer.save(2)


def test_a_state_that_cannot_be_saved_is_raised_at_once(storage: ControlledStorage) -> None:
    values: dict[str, Any] = state()
    with Checkpointer("ignored", values) as checkpointer:
        values["values"]["n"] = lambda: None
        for step in (1, 2):
            with pytest.raises(UnsavableValueError, match=r"values\.n"):
                checkpointer.save(step)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"on_failure": "ignore"}, "'warn' or 'raise'"),
        ({"max_failures": 0}, "1 or more"),
        ({"max_failures": True}, "1 or more"),
        ({"max_failures": 2.5}, "1 or more"),
    ],
)
def test_arguments_that_cannot_work(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        Checkpointer(tmp_path, state(), **given)


def test_every_kind_of_error_says_whether_it_may_pass() -> None:
    """A new kind is a decision: what is none of storage and coordination is raised."""
    kinds = {kind.__name__ for kind in HoldfastError.__subclasses__() if kind.may_pass}
    assert kinds == {"CoordinationError", "DamagedError", "StorageError"}
