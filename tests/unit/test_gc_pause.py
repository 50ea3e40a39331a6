"""The garbage collector pauses while a save looks at the state and copies it, and at no other time."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Checkpointer
from engine.errors import UnsavableValueError
from engine.save.staging_copy import Copier


@pytest.fixture(autouse=True)
def collector_is_on() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the collector was on at each copy."""
    found: list[bool] = []
    copy = Copier.copy

    def watched(self: Copier, *args: Any) -> None:
        found.append(gc.isenabled())
        copy(self, *args)

    monkeypatch.setattr(Copier, "copy", watched)
    return found


def test_no_collection_runs_while_a_snapshot_is_copied(tmp_path: Path, seen: list[bool]) -> None:
    with Checkpointer(tmp_path, {"x": {"a": torch.ones(3)}}) as checkpointer:
        checkpointer.prepare()
        assert gc.isenabled()
        checkpointer.save(1).result()
        assert gc.isenabled()
    assert seen == [False]


def test_it_is_on_again_after_a_save_that_is_refused(tmp_path: Path) -> None:
    state = {"x": {"a": torch.ones(3)}}
    with Checkpointer(tmp_path, state) as checkpointer:
        state["x"]["b"] = object()  # type: ignore[assignment]
        with pytest.raises(UnsavableValueError):
            checkpointer.save(1)
        assert gc.isenabled()


def test_a_program_that_has_switched_it_off_finds_it_off(tmp_path: Path, seen: list[bool]) -> None:
    gc.disable()
    with Checkpointer(tmp_path, {"x": {"a": torch.ones(3)}}) as checkpointer:
        checkpointer.save(1).result()
    assert not gc.isenabled()
    assert seen == [False]
