"""Shards of tensors made of tensors, as torchao's optimizers have them under FSDP2."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.two_tensor import TwoTensor

from engine import Checkpointer
from tests.support.ranks import Ranks, outcome


def save_shards(rank: int, world_size: int, directory: str) -> str:
    mesh = init_device_mesh("cpu", (world_size,))
    local = TwoTensor(torch.ones(4), torch.ones(4))
    state = {"extra": {"moment": DTensor.from_local(local, mesh, [Shard(0)], run_check=False)}}
    with Checkpointer(directory, state) as checkpointer:
        return str(outcome(lambda: checkpointer.save(1).result()))


def test_they_are_refused_by_name_at_the_first_save(world: Callable[[int], Ranks]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        answers = world(2).run(save_shards, directory)
    for answer in answers:
        assert answer.startswith("UnsavableValueError: "), answer
        assert "extra.moment: a distributed TwoTensor" in answer
