"""A conversion that dies at any call to the disk is whole or not listed, and a rerun succeeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.convert.merge import merge_checkpoints
from engine.directory.listing import list_checkpoints
from engine.directory.verify import verify_checkpoint
from engine.errors import HoldfastError
from engine.lease.lease import Lease
from engine.storage import shard_writer
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from tests.faults.layer import SYSTEM_FAULTS, Act, FaultSystem, Trigger
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
"""A process that is killed takes the thread of its lease with it."""

SMALL_WINDOW_BYTES = 16384
"""So that a shard of 170 kB goes out in many windows."""


class Killed(BaseException):
    """The process is no more: nothing that it would still do happens."""


def dies(name: str, real: Callable[[], Any]) -> Any:
    raise Killed


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "WINDOW_BYTES", SMALL_WINDOW_BYTES)


@pytest.fixture(autouse=True)
def _dead_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed here is the same process as the next one: no lease has a live holder."""
    real = Lease.acquire
    monkeypatch.setattr(
        "engine.convert.publish.Lease.acquire",
        lambda *args, **kw: real(*args, **kw, alive=lambda process: False),
    )


def merge_into(target: Storage, sources: list[tuple[Storage, str]]) -> bool:
    """One run of a merge, as far as it gets; whether it said that it has succeeded."""
    try:
        merge_checkpoints(sources, target)
    except (Killed, HoldfastError):
        return False
    return True


def sweep(root: Path, act: Act, *, sticky: bool) -> int:
    """Merge into a fresh directory for each call to the disk, at which `act` steps in; returns how many."""
    here = LocalStorage(root / "here")
    sources: list[tuple[Storage, str]] = [
        (here, write_checkpoint(here, sequence=number, seed=number)) for number in (1, 2)
    ]
    k = 0
    while True:
        target, trigger = root / str(k), Trigger()
        trigger.arm(k, act, sticky=sticky)
        succeeded = merge_into(LocalStorage(target, system=FaultSystem(trigger)), sources)
        after = LocalStorage(target)
        listed = (
            [item for item in list_checkpoints(after) if item.status == "committed"]
            if target.exists()
            else []
        )
        for item in listed:
            assert verify_checkpoint(after, item.id).ok, (
                f"call {k} ({trigger.names[k]}): {item.id} is not whole"
            )
        assert len(listed) == 1 or not succeeded, f"call {k}: it reported a success that is not there"
        if not trigger.fired:
            assert succeeded
            assert trigger.names.count("pwrite") > 10, "the shard has to be written in several windows"
            return k
        assert merge_into(after, sources), "a rerun starts anew"
        whole = [item for item in list_checkpoints(after) if item.status == "committed"]
        assert len(whole) == len(listed) + 1
        k += 1


def test_a_merge_killed_at_every_call(root: Path, covered: Callable[[int], None]) -> None:
    covered(sweep(root, dies, sticky=True))


@pytest.mark.parametrize("fault", ["ENOSPC", "short write"])
def test_every_call_of_a_merge_fails_once(fault: str, root: Path, covered: Callable[[int], None]) -> None:
    covered(sweep(root, SYSTEM_FAULTS[fault], sticky=False))
