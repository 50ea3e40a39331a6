"""Failed saves leave nothing in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.errors import SaveFailedError, StorageFullError, UnsavableValueError
from tests.faults.invariants import living_staging_buffers
from tests.support.controlled import DEADLINE_SECS, ControlledStorage, use


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ControlledStorage:
    made = ControlledStorage(tmp_path / "run")
    use(monkeypatch, made)
    return made


def test_a_save_that_cannot_be_planned_gives_the_memory_of_the_one_before_back(
    storage: ControlledStorage,
) -> None:
    """Its snapshot would be kept for a plan that does not hold any more."""
    buffers = living_staging_buffers()
    state: dict[str, Any] = {"values": {"t": torch.zeros(1000)}}
    with Checkpointer("ignored", state) as checkpointer:
        for step in (1, 3, 5):
            checkpointer.save(step).result(DEADLINE_SECS)
            assert living_staging_buffers() == buffers + 1
            state["values"]["pool"] = object()
            with pytest.raises(UnsavableValueError):
                checkpointer.save(step + 1)
            del state["values"]["pool"]
            checkpointer._saver.wait(DEADLINE_SECS)  # type: ignore[union-attr]
            assert living_staging_buffers() == buffers, "the snapshot is kept, and nobody will write it"


def test_saves_that_fail_while_they_are_written_add_up_to_nothing(storage: ControlledStorage) -> None:
    def full(path: str) -> None:
        raise StorageFullError("no space is left")

    buffers = living_staging_buffers()
    with Checkpointer("ignored", {"values": {"t": torch.zeros(1000)}}) as checkpointer:
        storage.broken = full
        for step in range(5):
            with pytest.raises(SaveFailedError):
                checkpointer.save(step).result(DEADLINE_SECS)
            checkpointer._saver.wait(DEADLINE_SECS)  # type: ignore[union-attr]
            assert living_staging_buffers() <= buffers + 1
