"""Ranks that hold different names: pipeline stages. The union is the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from engine import Checkpointer
from tests.support.ranks import Ranks, outcome
from tests.support.training import differences, photograph

World = Callable[[int], Ranks]
SECS = 60.0
LAYERS = 4


class Counted(nn.Module):
    """A layer that counts its forwards in extra state, which is not a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return self.norm(torch.tanh(self.linear(x)))

    def get_extra_state(self) -> Any:
        return {"seen": self.seen}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


class Stage(nn.Module):
    """Some of the layers, under the names that they have in the whole model."""

    def __init__(self, layers: list[int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        whole = [Counted() for _ in range(LAYERS)]
        self.layers = nn.ModuleDict({str(number): whole[number] for number in layers})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def layers_of(rank: int, world_size: int, assignment: str) -> list[int]:
    """1 rank has all; "even" stages, or those of a schedule that interleaves."""
    if world_size == 1:
        return list(range(LAYERS))
    if assignment == "interleaved":
        return list(range(LAYERS))[rank::world_size]
    if assignment == "copies":  # two copies of each stage: data parallel beside pipeline parallel
        rank, world_size = rank // 2, world_size // 2
    each = LAYERS // world_size
    return list(range(rank * each, (rank + 1) * each))


def build(rank: int, world_size: int, assignment: str, seed: int) -> dict[str, Any]:
    stage = Stage(layers_of(rank, world_size, assignment), seed)
    weights = [p for p in stage.parameters() if p.ndim > 1]
    others = [p for p in stage.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return {"model": stage, "optimizer": optimizer, "progress": {"step": 0}}


def train(state: dict[str, Any], steps: int, start: int = 0) -> None:
    """Each layer learns from a batch of its own, so that a layer's course does not depend on the stages."""
    for step in range(start, start + steps):
        state["optimizer"].zero_grad()
        for number, layer in state["model"].layers.items():
            generator = torch.Generator().manual_seed(100 * step + int(number))
            layer(torch.randn(5, 6, generator=generator)).square().mean().backward()
        state["optimizer"].step()
        state["progress"]["step"] = step + 1


def by_layer(state: dict[str, Any]) -> dict[str, Any]:
    """Everything by layer: weights, buffers, counts, moments and hyperparameters."""
    model, optimizer = state["model"], state["optimizer"]
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Any] = {"step": state["progress"]["step"]}
    for number, layer in model.layers.items():
        found[number] = {"state": photograph({"layer": layer})["layer"], "seen": layer.seen}
        for name, parameter in layer.named_parameters():
            found[number][name] = {
                "moments": {key: value.clone() for key, value in optimizer.state[parameter].items()},
                "weight_decay": groups[id(parameter)]["weight_decay"],
            }
    return found


def save(rank: int, world_size: int, directory: str, assignment: str) -> dict[str, Any]:
    state = build(rank, world_size, assignment, seed=0)
    with Checkpointer(directory, state) as checkpointer:
        assert checkpointer.save(0).result(SECS) is not None  # before the optimizers have state
        train(state, 3)
        record = checkpointer.save(3).result(SECS)
        assert record is not None
    train(state, 2, start=3)
    return by_layer(state)


def resume(rank: int, world_size: int, directory: str, assignment: str) -> dict[str, Any]:
    state = build(rank, world_size, assignment, seed=1)
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        assert checkpointer.restore() is not None
    train(state, 2, start=3)
    return by_layer(state)


@pytest.mark.parametrize(
    ("saved_by", "saved_as", "restored_by", "restored_as"),
    [
        (2, "even", 2, "even"),
        (2, "even", 2, "interleaved"),
        (2, "even", 4, "even"),
        (4, "even", 2, "interleaved"),
        (2, "even", 1, "even"),
        (4, "copies", 4, "copies"),
        (4, "copies", 2, "interleaved"),
        (2, "even", 4, "copies"),
        (1, "even", 2, "even"),
    ],
)
def test_stages_go_on_as_if_nothing_had_happened(
    saved_by: int, saved_as: str, restored_by: int, restored_as: str, world: World, tmp_path: Path
) -> None:
    undisturbed: dict[str, Any] = {}
    for found in world(saved_by).run(save, str(tmp_path), saved_as):
        undisturbed |= found
    resumed: dict[str, Any] = {}
    for found in world(restored_by).run(resume, str(tmp_path), restored_as):
        resumed |= found
    assert resumed.keys() == {"step", *map(str, range(LAYERS))}
    assert differences(dict(sorted(resumed.items())), dict(sorted(undisturbed.items()))) == []


def lacking(rank: int, world_size: int, directory: str, phase: str) -> Any:
    """The last layer is on no rank any more."""
    state = build(rank, world_size, "even", seed=0)
    with Checkpointer(directory, state, read_only=phase != "save") as checkpointer:
        if phase == "save":
            return checkpointer.save(1).result(SECS) is not None
        if rank == world_size - 1:
            del state["model"].layers["3"]
            state["optimizer"].param_groups.clear()
            state["optimizer"].add_param_group({"params": list(state["model"].parameters())})
        before = photograph({"model": state["model"]})
        answer = outcome(checkpointer.restore)
        return answer, differences(photograph({"model": state["model"]}), before)


def test_names_that_no_rank_has_are_still_refused_on_all(world: World, tmp_path: Path) -> None:
    world(2).run(lacking, str(tmp_path), "save")
    for answer, changed in world(2).run(lacking, str(tmp_path), "restore"):
        assert answer.startswith("StateMismatchError")
        assert "model.layers.3.linear.weight" in answer
        assert "model.layers.0" not in answer, "another rank has that one"
        assert "model.layers.2" not in answer
        assert changed == []


def own_keys(rank: int, world_size: int, directory: str, phase: str) -> Any:
    """The first stage has an embedding and a reader, the last one a head and a scaler."""
    torch.manual_seed(rank + (0 if phase == "save" else 7))
    state: dict[str, Any] = {"first": nn.ModuleDict({"embed": nn.Embedding(5, 3)}), "reader": {"at": 3}}
    if rank:
        state = {
            "last": nn.ModuleDict({"head": nn.Linear(3, 5)}),
            "scaler": {"scale": 2.0, "history": torch.arange(3)},
        }
        state["optimizer"] = torch.optim.SGD(state["last"].parameters(), lr=0.1)
    else:
        state["optimizer"] = torch.optim.SGD(state["first"].parameters(), lr=0.2)
    if phase == "save":
        with Checkpointer(directory, state) as checkpointer:
            assert checkpointer.save(1).result(SECS) is not None
        return photograph(state)
    for name in ("reader", "scaler"):
        if name in state:
            state[name].clear()
    state["optimizer"].param_groups[0]["lr"] = 9.0
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        assert checkpointer.restore() is not None
    return photograph(state)


def test_entries_that_only_some_ranks_have(world: World, tmp_path: Path) -> None:
    saved = world(2).run(own_keys, str(tmp_path), "save")
    assert differences(saved, world(2).run(own_keys, str(tmp_path), "restore")) == []


def contradicting(rank: int, world_size: int, directory: str) -> Any:
    """Two ranks hold the same parameter and disagree about its learning rate."""
    torch.manual_seed(0)
    shared, own = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleDict({"shared": shared, f"own{rank}": own})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 + rank)
    with Checkpointer(directory, {"model": model, "optimizer": optimizer}) as checkpointer:
        return outcome(lambda: checkpointer.save(1).result(SECS)), dist.barrier()


def test_hyperparameters_that_contradict_each_other_are_refused(world: World, tmp_path: Path) -> None:
    for answer, _ in world(2).run(contradicting, str(tmp_path)):
        assert "optimizer: the hyperparameters of shared.weight" in answer
