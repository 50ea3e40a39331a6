"""Modules and optimizers that differ between ranks under one name: declared per rank, each comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import Checkpointer
from tests.support.ranks import Ranks, outcome
from tests.support.training import differences, photograph

World = Callable[[int], Ranks]
SECS = 60.0
OWN = ("experts", "experts_optimizer")


class Experts(nn.Module):
    """Another width on each rank; tied weights, batch norm, and extra state with a tensor."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(4, 3 + rank, bias=False)
        self.tied = nn.Linear(4, 3 + rank, bias=False)
        self.tied.weight = self.up.weight
        self.norm = nn.BatchNorm1d(3 + rank)
        self.routed: Any = {"tokens": 0, "load": torch.zeros(2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.routed = {"tokens": self.routed["tokens"] + len(x), "load": self.routed["load"] + 1}
        return self.norm(self.up(x) + self.tied(x))

    def get_extra_state(self) -> Any:
        return self.routed

    def set_extra_state(self, state: Any) -> None:
        self.routed = state


def build(rank: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    trunk, experts = nn.Linear(4, 4), Experts(rank, seed + rank)
    return {
        "trunk": trunk,
        "experts": experts,
        "trunk_optimizer": torch.optim.AdamW(trunk.parameters(), lr=0.1),
        "experts_optimizer": torch.optim.AdamW(experts.parameters(), lr=0.1 * (rank + 1)),
    }


def train(state: dict[str, Any], rank: int, steps: int) -> None:
    for _ in range(steps):
        for name, seed in (("trunk", 5), ("experts", rank)):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
            state[f"{name}_optimizer"].zero_grad()
            state[name](x).square().mean().backward()
            state[f"{name}_optimizer"].step()


def save(rank: int, world_size: int, directory: str) -> Any:
    state = build(rank, seed=0)
    with Checkpointer(directory, state, per_rank=OWN) as checkpointer:
        train(state, rank, 2)
        for step in (1, 2):  # the second by the standing plan
            assert checkpointer.save(step).result(SECS) is not None
        saved = photograph(state), state["experts"].routed
        train(state, rank, 2)
        return saved, photograph(state)


def resume(rank: int, world_size: int, directory: str, per_rank: tuple[str, ...], **options: Any) -> Any:
    state = build(rank, seed=10)
    with Checkpointer(directory, state, per_rank=per_rank, read_only=True) as checkpointer:
        answer = outcome(lambda: checkpointer.restore(**options))
        if isinstance(answer, str):
            return answer
        restored = photograph(state), state["experts"].routed
        train(state, rank, 2)
        return restored, photograph(state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_rank_gets_its_own_back_and_goes_on(world_size: int, world: World, tmp_path: Path) -> None:
    saved = world(world_size).run(save, str(tmp_path))
    resumed = world(world_size).run(resume, str(tmp_path), OWN)
    assert differences(resumed, saved) == []


def test_another_world_size_is_refused_and_leaves_them_out_on_demand(world: World, tmp_path: Path) -> None:
    saved = world(2).run(save, str(tmp_path))
    for answer in world(4).run(resume, str(tmp_path), OWN):
        assert answer.startswith("StateError: experts, experts_optimizer: saved per rank by 2 ranks")
        assert "exclude=('experts.*', 'experts_optimizer.*')" in answer
    (_, trained), *_ = saved
    for _, resumed in world(4).run(resume_without, str(tmp_path)):
        assert differences(resumed["trunk"], trained["trunk"]) == []


def resume_without(rank: int, world_size: int, directory: str) -> Any:
    return resume(rank, world_size, directory, OWN, exclude=("experts.*", "experts_optimizer.*"))


def test_what_was_not_declared_when_saved_is_named(world: World, tmp_path: Path) -> None:
    world(2).run(save, str(tmp_path))
    for answer in world(2).run(resume, str(tmp_path), ()):
        assert answer.startswith("StateMismatchError")
        assert "experts.up.weight" in answer


def undeclared_optimizer(rank: int, world_size: int, directory: str) -> Any:
    """Equal shapes: without a comparison the moments would be a patchwork of both ranks'."""
    expert = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(expert.parameters(), lr=0.1)
    expert(torch.full((2, 4), 1.0 + rank)).square().mean().backward()
    optimizer.step()
    state = {"experts": expert, "optimizer": optimizer}
    with Checkpointer(directory, state, per_rank=("experts",)) as checkpointer:
        return outcome(lambda: checkpointer.save(1).result(SECS))


def test_an_optimizer_of_theirs_that_was_not_declared_is_refused(world: World, tmp_path: Path) -> None:
    for answer in world(2).run(undeclared_optimizer, str(tmp_path)):
        assert "optimizer.state.weight.exp_avg differs between rank 0 and rank 1" in answer
