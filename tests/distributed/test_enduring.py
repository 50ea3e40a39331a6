"""Saves that fail on one rank: all ranks continue alike and stop alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpointer import Checkpointer
from engine.errors import StorageFullError
from tests.support.controlled import ControlledStorage
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]


def full_on_rank_1(rank: int, world_size: int, directory: str) -> list[Any]:
    import engine.checkpointer as module

    storage = ControlledStorage(directory)
    real = module.open_storage
    module.open_storage = lambda *args, **kwargs: storage

    def full(path: str) -> None:
        if rank == 1:
            raise StorageFullError("no space is left on the device")

    storage.broken = full
    found: list[Any] = []
    try:
        with Checkpointer(directory, {"values": {"t": torch.ones(100_000)}}, timeout_secs=30) as checkpointer:
            for step in (1, 2, 3, 4):
                found.append(outcome(lambda step=step: checkpointer.save(step).step))  # type: ignore[misc]
                checkpointer._saver.wait()  # type: ignore[union-attr]
            storage.broken = lambda path: None
            found.append(outcome(lambda: checkpointer.save(5).result() is not None))
            dist.barrier()
    finally:
        module.open_storage = real
    return found


def test_all_ranks_go_on_and_stop_alike(world: World, tmp_path: Path) -> None:
    found = world(3).run(full_on_rank_1, str(tmp_path))
    for *steps, raised, last in found:
        assert steps == [1, 2, 3]
        assert raised.startswith("SaveFailedError: 3 saves in a row failed")
        assert "rank 1: StorageFullError" in raised
        assert last is True


def different_json(rank: int, world_size: int, directory: str) -> list[Any]:
    values = {"n": rank}
    with Checkpointer(directory, {"values": values}, timeout_secs=30) as checkpointer:
        first = outcome(lambda: checkpointer.save(1).step)
        second = outcome(lambda: checkpointer.save(2).step)
        values["n"] = 0
        third = outcome(lambda: checkpointer.save(3).result() is not None)
    return [first, second, third]


def test_a_state_that_differs_is_raised_on_all_ranks(world: World, tmp_path: Path) -> None:
    for first, second, third in world(2).run(different_json, str(tmp_path)):
        assert first == 1, "the background finds it out"
        assert second.startswith("ReplicaMismatchError")
        assert "values.n differs on rank 1: 1 there, 0 on rank 0" in second
        assert third is True
