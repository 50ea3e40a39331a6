"""Values of every kind on several ranks: each rank's own generators, arrays, names, and reading alone."""

from __future__ import annotations

import collections
import enum
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from engine import Checkpointer
from engine.errors import StateMismatchError
from tests.support.ranks import Ranks

World = Callable[[int], Ranks]
SECS = 60.0
GENERATORS = ("torch", "numpy", "python")


class Phase(enum.Enum):
    WARM = 1


def state_of(rank: int, seed: int) -> dict[str, Any]:
    return {
        "torch": torch.Generator().manual_seed(seed + rank),
        "numpy": np.random.default_rng(seed + rank),
        "python": random.Random(seed + rank),
        "same": {},
        "mine": {},
    }


def fill(state: dict[str, Any], rank: int) -> None:
    names = ["b", "a", "c"]
    random.Random(rank).shuffle(names)  # as a set of text has them, in each process by chance
    state["same"].update(
        weights=dict.fromkeys(names, 1.0),
        phase=Phase.WARM,
        seen={"x", "y", "z"},
        array=np.arange(4),
        ordered=collections.OrderedDict(b=1, a=2),
    )
    state["mine"].update(rank=np.int64(rank), array=np.full(2, rank))


def draws(state: dict[str, Any]) -> list[float]:
    return [
        float(torch.rand(1, generator=state["torch"])),
        float(state["numpy"].random()),
        state["python"].random(),
    ]


def save(rank: int, world_size: int, directory: str) -> list[float]:
    state = state_of(rank, 1)
    fill(state, rank)
    draws(state)
    own = ("mine", *GENERATORS)
    with Checkpointer(directory, state, per_rank=own, timeout_secs=SECS) as checkpointer:
        checkpointer.save(1).result(SECS)
    return draws(state)


def resume(rank: int, world_size: int, directory: str, exclude: tuple[str, ...] = ()) -> Any:
    state = state_of(rank, 50)
    own = ("mine", *GENERATORS)
    with Checkpointer(
        directory, state, per_rank=own, timeout_secs=SECS, seed=7, read_only=True
    ) as checkpointer:
        checkpointer.restore(exclude=exclude)
    return draws(state), state["same"], state["mine"]


def test_each_rank_gets_its_own_generators_and_all_get_the_same_values(world: World, tmp_path: Path) -> None:
    drawn = world(2).run(save, str(tmp_path))
    for rank, (found, same, mine) in enumerate(world(2).run(resume, str(tmp_path))):
        assert found == drawn[rank]
        assert same["weights"] == {"a": 1.0, "b": 1.0, "c": 1.0}
        assert (same["phase"], same["seen"]) == (Phase.WARM, {"x", "y", "z"})
        assert (type(same["ordered"]), list(same["ordered"])) == (collections.OrderedDict, ["b", "a"])
        assert same["array"].tolist() == [0, 1, 2, 3]
        assert (type(mine["rank"]), mine["rank"], mine["array"].tolist()) == (np.int64, rank, [rank, rank])
    assert drawn[0] != drawn[1]


def test_at_another_world_size_generators_get_streams_of_their_own(world: World, tmp_path: Path) -> None:
    world(2).run(save, str(tmp_path))
    once = [found for found, _, _ in world(4).run(resume, str(tmp_path), ("mine",))]
    again = [found for found, _, _ in world(4).run(resume, str(tmp_path), ("mine",))]
    assert once == again
    assert len({tuple(found) for found in once}) == 4


class Net(nn.Module):
    def __init__(self, body: str) -> None:
        super().__init__()
        self.add_module(body, nn.Linear(6, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for child in self.children():
            x = child(x)
        return x


def sharded(body: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    network = Net(body)
    fully_shard(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    return network, optimizer


def whole(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor() for name, tensor in network.state_dict().items()}


def save_sharded(rank: int, world_size: int, directory: str) -> Any:
    network, optimizer = sharded("encoder", 1)
    state = {"model": network, "optimizer": optimizer}
    with Checkpointer(directory, state, timeout_secs=SECS) as checkpointer:
        checkpointer.save(1).result(SECS)
        # Alone: the other ranks take no part in it.
        found = checkpointer.read(include=["model.*"]) if rank == world_size - 1 else None
    return whole(network), found


def resume_renamed(rank: int, world_size: int, directory: str) -> Any:
    network, optimizer = sharded("backbone", 2)
    state = {"net": network, "optimizer": optimizer}
    names = {"model": "net", "model.encoder": "net.backbone"}
    with Checkpointer(directory, state, timeout_secs=SECS, read_only=True) as checkpointer:
        refused = ""
        try:
            checkpointer.restore(rename={"model": "net", "model.coder": "net.backbone"})
        except StateMismatchError as error:
            refused = str(error)
        checkpointer.restore(rename=names)
    moments = {
        name: optimizer.state[parameter]["exp_avg"].full_tensor()
        for name, parameter in network.named_parameters()
    }
    return whole(network), moments, refused


def test_renamed_shards_are_restored_at_another_world_size(world: World, tmp_path: Path) -> None:
    (saved, _), (_, alone) = world(2).run(save_sharded, str(tmp_path))
    assert alone["model"].keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(alone["model"][name], tensor), name
    for network, moments, refused in world(4).run(resume_renamed, str(tmp_path)):
        assert "rename names 'model.coder'" in refused
        for name, tensor in saved.items():
            assert torch.equal(network[name.replace("encoder", "backbone")], tensor), name
        for moment in moments.values():
            assert torch.allclose(moment, torch.full_like(moment, 0.05))
