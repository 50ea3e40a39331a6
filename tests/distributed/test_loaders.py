"""A StatefulDataLoader goes on with the same global batches, at the same world size and at others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from engine import Checkpointer, ReshardableLoader
from tests.support.ranks import Ranks

World = Callable[[int], Ranks]
GLOBAL_BATCH = 12


def take(rank: int, world_size: int, directory: str, steps: int, resume: bool) -> list[list[float]]:
    """The batches that this rank takes; saves after the last."""
    data = TensorDataset(torch.arange(96.0))
    sampler: Any = StatefulDistributedSampler(data, world_size, rank, seed=3)
    loader = ReshardableLoader(StatefulDataLoader(data, GLOBAL_BATCH // world_size, sampler=sampler))
    with Checkpointer(directory, {"loader": loader, "n": {"n": 1}}, per_rank=("loader",)) as checkpointer:
        if resume:
            assert checkpointer.restore() is not None
        else:
            sampler.set_epoch(2)
        taken = [batch.tolist() for _, (batch,) in zip(range(steps), loader, strict=False)]
        checkpointer.save(steps)
    return taken


def together(found: list[list[list[float]]]) -> list[list[float]]:
    return [sorted(x for batch in batches for x in batch) for batches in zip(*found, strict=True)]


@pytest.mark.parametrize("after", [2, 3, 4, 1])
def test_the_global_batches_go_on(world: World, tmp_path: Path, after: int) -> None:
    undisturbed = together(world(2).run(take, str(tmp_path / "whole"), 5, False))
    first = together(world(2).run(take, str(tmp_path / "run"), 2, False))
    second = together(world(after).run(take, str(tmp_path / "run"), 3, True))
    assert first + second == undisturbed
