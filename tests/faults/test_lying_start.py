"""A job that starts on a disk, or a storage, that reports success for one operation and does nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.lease.lease import Lease
from engine.save.run_directory import probe_shared
from tests.faults.layer import Act, lost, swallowed
from tests.faults.test_other_sweeps import start_with_each_operation_changed
from tests.faults.test_two_jobs import Hours


@pytest.fixture(autouse=True)
def a_clock_that_sleeping_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease of which the bytes are lost is nobody's that can be asked: the next start waits a minute. And
    ranks look half a minute for a probe that is not there."""
    acquire = Lease.acquire

    def at_once(storage: Any, *, run_id: str) -> Lease:
        clock = Hours(0.0)
        return acquire(storage, run_id=run_id, clock=clock, sleep=clock.sleep)

    clock = Hours(0.0)
    probe = functools.partial(probe_shared, clock=clock, sleep=clock.sleep)
    monkeypatch.setattr("engine.save.run_directory.Lease.acquire", at_once)
    monkeypatch.setattr("engine.save.run_directory.probe_shared", probe)


@pytest.mark.usefixtures("nothing_arrives")
@pytest.mark.parametrize(("level", "act"), [("disk", lost), ("asked", swallowed)], ids=["disk", "storage"])
def test_a_start_on_a_disk_that_loses_one_operation(
    level: str, act: Act, root: Path, covered: Callable[[int], None]
) -> None:
    """Taking the lease, fencing, clearing up: nothing that is committed is touched, and what the lost
    operation leaves behind is the next start's to clear."""
    swept = start_with_each_operation_changed(root, level, act)
    assert swept >= 4
    covered(swept)
