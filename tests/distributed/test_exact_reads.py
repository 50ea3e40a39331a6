"""What a restore really fetches, counted where it is read: GPT-2 124M and its optimizer from 2 ranks on 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from engine import Checkpointer
from engine.run.mesh import build_mesh
from engine.run.parallelize import build_model
from model.config import GPT2Config
from model.gpt2 import GPT2
from model.init import init_weights
from model.optim import decay_groups
from tests.support.ranks import Ranks
from tests.support.reads import counted_reads

pytestmark = pytest.mark.slow


def gpt2(world_size: int, seed: int) -> dict[str, Any]:
    """The trainer's model and optimizer, with momenta; no step of training."""
    network = build_model(
        lambda: GPT2(GPT2Config.preset("gpt2")),
        lambda module: init_weights(module, seed),
        device=torch.device("cpu"),
        mesh=build_mesh("cpu", world_size, 1),
    )
    optimizer = torch.optim.AdamW(decay_groups(network, 0.1), lr=1e-3 * seed, fused=True)
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"model": network, "optimizer": optimizer}


def local_tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    network, optimizer = state["model"], state["optimizer"]
    tensors = [*network.parameters(), *(t for p in network.parameters() for t in optimizer.state[p].values())]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def save(rank: int, world_size: int, directory: str) -> None:
    state = gpt2(world_size, seed=1)
    with Checkpointer(directory, state) as checkpointer:
        checkpointer.save(1).result(100)


def restore(rank: int, world_size: int, directory: str) -> tuple[int, int, int, float]:
    """(bytes of shards read, bytes of other files read, bytes needed, sum of the first weight)."""
    state = gpt2(world_size, seed=2)
    with Checkpointer(directory, state, read_only=True) as checkpointer, counted_reads() as counts:
        assert checkpointer.restore("latest") is not None
    needed = sum(tensor.nbytes for tensor in local_tensors(state))
    return counts["shards"], counts["small"], needed, float(state["optimizer"].param_groups[0]["lr"])


def test_gpt2_from_two_ranks_to_four(world: Callable[[int], Ranks], tmp_path: Path) -> None:
    world(2).run(save, str(tmp_path))
    world(2).close()
    results = world(4).run(restore, str(tmp_path))
    read, small, needed = (sum(result[n] for result in results) for n in range(3))
    assert needed > 1_490_000_000
    assert all(result[3] == 1e-3 for result in results), "it was restored"
    assert needed <= read
    # Every block is verified, so whole blocks are read; indexes and manifests on top.
    assert read + small <= 1.05 * needed
