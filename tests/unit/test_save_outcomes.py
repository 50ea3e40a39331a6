"""Handles report a failure to the caller exactly once and never lose it."""

from __future__ import annotations

import threading

import pytest

from engine.directory.record import CheckpointRecord
from engine.errors import SaveFailedError
from engine.save.outcomes import SaveHandle
from tests.support.records import record


def committed() -> CheckpointRecord:
    return record(1)


def test_a_save_in_flight() -> None:
    handle = SaveHandle(7)
    assert handle.step == 7
    assert not handle.done()
    assert not handle.failed()
    assert not handle.skipped
    assert handle.take_failure() is None
    with pytest.raises(TimeoutError, match=r"step 7 is not done after 0\.001 s"):
        handle.result(0.001)


def test_a_committed_save() -> None:
    handle = SaveHandle(7)
    handle.set_record(committed())
    assert handle.done()
    assert not handle.failed()
    assert handle.result() == committed()
    assert handle.result(0) == committed()
    assert handle.take_failure() is None


def test_a_skipped_save_has_no_record_and_no_failure() -> None:
    handle = SaveHandle(7, skipped=True)
    assert handle.skipped
    assert handle.done()
    assert not handle.failed()
    assert handle.result() is None
    assert handle.take_failure() is None


def failed() -> tuple[SaveHandle, SaveFailedError]:
    handle, error = SaveHandle(7), SaveFailedError("no space")
    handle.set_failure(error)
    return handle, error


def test_a_failure_is_taken_once_but_told_to_whoever_asks_the_handle() -> None:
    handle, error = failed()
    assert handle.failed()
    assert handle.take_failure() is error
    assert handle.take_failure() is None
    for _ in range(2):
        with pytest.raises(SaveFailedError, match="no space"):
            handle.result()


def test_whoever_asked_the_handle_has_been_told() -> None:
    handle, _ = failed()
    with pytest.raises(SaveFailedError):
        handle.result()
    assert handle.take_failure() is None
    assert handle.failed()


def test_a_failure_that_was_raised_by_save_itself_is_not_told_again() -> None:
    handle = SaveHandle(7)
    handle.mark_reported()
    handle.set_failure(SaveFailedError("unsavable"))
    assert handle.take_failure() is None
    with pytest.raises(SaveFailedError):
        handle.result()


def test_waiting_in_another_thread_ends_with_the_save() -> None:
    handle = SaveHandle(7)
    results: list[CheckpointRecord | None] = []
    waiter = threading.Thread(target=lambda: results.append(handle.result(60)))
    waiter.start()
    handle.set_record(committed())
    waiter.join(60)
    assert results == [committed()]
