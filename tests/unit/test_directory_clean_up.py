"""What one clean-up costs a directory, and that a hold which comes in the middle of it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.directory import clean_up, marks
from engine.directory.clean_up import delete_expired
from engine.directory.listing import committed, list_checkpoints
from engine.directory.retention import Retention
from engine.lease.lease import Lease
from engine.storage.base import Heads
from engine.storage.local import LocalStorage
from tests.support.tiny_checkpoint import write_checkpoint


class Counting(LocalStorage):
    """Counts its listings of everything."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.listings = 0

    def list_heads(self) -> Heads:
        self.listings += 1
        return super().list_heads()


@pytest.fixture
def storage(tmp_path: Path) -> Counting:
    made = Counting(tmp_path)
    for sequence in (1, 2, 3, 4):
        write_checkpoint(made, sequence=sequence, rows=4)
    return made


def steps(storage: LocalStorage) -> list[int]:
    return [record.step for record in committed(list_checkpoints(storage))]


def test_a_round_lists_twice(storage: Counting) -> None:
    """Once for the checkpoints and who is held, once for what is left to clear away after that."""
    marks.hold(storage, committed(list_checkpoints(storage))[0].id)
    with Lease.acquire(storage, run_id="run") as lease:
        storage.listings = 0
        assert delete_expired(storage, lease, Retention(rolling=2))
        assert storage.listings == 2
    assert steps(storage) == [10, 30, 40]


def test_a_hold_that_comes_after_the_listing_counts(
    storage: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = clean_up.decide_retention

    def held_meanwhile(records: Any, *args: Any, **given: Any) -> Any:
        marks.hold(storage, records[1].id)
        return real(records, *args, **given)

    monkeypatch.setattr(clean_up, "decide_retention", held_meanwhile)
    with Lease.acquire(storage, run_id="run") as lease:
        assert delete_expired(storage, lease, Retention(rolling=2))
    assert steps(storage) == [20, 30, 40]
