"""DTensors on any mesh: tensor parallel, FSDP2 beside it, replicated, experts over a mesh of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from engine import Checkpointer
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]
SECS = 60.0

LAYOUTS = {
    "plain": 1,
    "tp2": 2,
    "tp4": 4,
    "fsdp_tp": 4,
    "replicate_tp": 4,
    "replicate_shard": 4,
    "hsdp_tp": 4,
    "ep2": 2,
    "ep_pairs": 4,
    "ep_fsdp": 4,
}
"""Layout -> world size."""


class Model(nn.Module):
    """Sizes that nothing divides: 7 hidden units, 3 experts of 5 rows."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(6, 7)
        self.down = nn.Linear(7, 6)
        self.experts = nn.ParameterDict({"w": nn.Parameter(torch.randn(3, 5, 6))})


def spread(model: Model, layout: str) -> Model:
    """The same values, laid out over the ranks."""
    if layout == "plain":
        return model
    world_size = LAYOUTS[layout]
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    experts = model.experts
    if layout.startswith("tp"):
        parallelize_module(model, init_device_mesh("cpu", (world_size,)), plan)
    elif layout == "fsdp_tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    elif layout == "replicate_tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)  # two copies of it, on meshes of their own
    elif layout == "replicate_shard":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        fully_shard(model, mesh=mesh)
    elif layout == "hsdp_tp":
        mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp_replicate", "dp_shard"])
    else:  # experts over a mesh of their own; where there are several such meshes they are copies
        pairs = world_size // 2
        mesh = init_device_mesh("cpu", (pairs, 2), mesh_dim_names=("dp", "ep"))
        weight = experts["w"]
        experts["w"] = nn.Parameter(distribute_tensor(weight.detach(), mesh["ep"], [Shard(0)]))
        if layout == "ep_fsdp":  # their last dimension over the other one
            fully_shard(experts, mesh=mesh["dp"], shard_placement_fn=lambda parameter: Shard(2))
            fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """By gradients that depend on nothing but the weights, element by element."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5 + 0.1
        optimizer.step()


def locals_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What this rank holds of weights and moments."""
    found = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in {"w": parameter, **optimizer.state[parameter]}.items():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found[f"{name}.{kind}"] = local.detach().clone()
    return found


def expected(layout: str) -> dict[str, torch.Tensor]:
    """The same of a whole model trained in one piece and laid out afterwards: by torch alone."""
    model = Model(seed=0)
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    found = {}
    for kind in ("w", "step", "exp_avg", "exp_avg_sq"):
        of_kind = Model(seed=0)
        with torch.no_grad():
            for to, parameter in zip(of_kind.parameters(), model.parameters(), strict=True):
                to.copy_(parameter if kind == "w" else optimizer.state[parameter][kind])
        for name, parameter in spread(of_kind, layout).named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            step = optimizer.state[next(model.parameters())]["step"]
            found[f"{name}.{kind}"] = step.clone() if kind == "step" else local.detach().clone()
    return found


def save(rank: int, world_size: int, layout: str, directory: str) -> None:
    model = spread(Model(seed=0), layout)
    optimizer = optimizer_of(model)
    train(model, optimizer, 2)
    with Checkpointer(directory, {"model": model, "optimizer": optimizer}) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step).result(SECS) is not None


def restore(rank: int, world_size: int, layout: str, directory: str) -> list[str]:
    """The names of what is not as it should be."""
    model = spread(Model(seed=3), layout)
    optimizer = optimizer_of(model)
    with Checkpointer(directory, {"model": model, "optimizer": optimizer}, read_only=True) as checkpointer:
        assert checkpointer.restore() is not None
    found, wanted = locals_of(model, optimizer), expected(layout)
    assert found.keys() == wanted.keys()
    return [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)]


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a checkpoint of that layout, made when first asked for."""
    made: dict[str, str] = {}

    def get(layout: str) -> str:
        if layout not in made:
            made[layout] = str(tmp_path_factory.mktemp(layout))
            world(LAYOUTS[layout]).run(save, layout, made[layout])
        return made[layout]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout(layout: str, world: World, saved: Callable[[str], str]) -> None:
    assert world(LAYOUTS[layout]).run(restore, layout, saved(layout)) == [[]] * LAYOUTS[layout]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp_tp", "plain"),
        ("fsdp_tp", "tp2"),
        ("tp2", "fsdp_tp"),
        ("hsdp_tp", "fsdp_tp"),
        ("replicate_tp", "replicate_shard"),
        ("plain", "hsdp_tp"),
        ("ep_pairs", "ep2"),
        ("ep2", "ep_fsdp"),
        ("ep_fsdp", "plain"),
        ("tp4", "ep_pairs"),
    ],
)
def test_another_layout(before: str, after: str, world: World, saved: Callable[[str], str]) -> None:
    assert world(LAYOUTS[after]).run(restore, after, saved(before)) == [[]] * LAYOUTS[after]


def replicas_apart(rank: int, world_size: int, layout: str, directory: str) -> Any:
    """One rank's shard differs from that of the rank that holds the same one."""
    model = spread(Model(seed=0), layout)
    with Checkpointer(directory, {"model": model}) as checkpointer:
        if rank == 3:
            name = "experts.w" if layout.startswith("ep") else "up.weight"
            with torch.no_grad():
                dict(model.named_parameters())[name].to_local().add_(1)
        return outcome(lambda: checkpointer.save(1).result(SECS))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("replicate_tp", "model.up.weight differs between rank 1 and rank 3"),
        ("replicate_shard", "model.up.weight differs between rank 1 and rank 3"),
        ("hsdp_tp", "model.up.weight differs between rank 1 and rank 3"),
        ("ep_pairs", "model.experts.w differs between rank 1 and rank 3"),
    ],
)
def test_copies_of_a_shard_are_compared(layout: str, words: str, world: World, tmp_path: Path) -> None:
    for answer in world(4).run(replicas_apart, layout, str(tmp_path)):
        assert words in answer


def unsavable(rank: int, world_size: int, directory: str, how: str) -> Any:
    mesh = init_device_mesh("cpu", (world_size,))
    if how == "partial":
        tensor = DTensor.from_local(torch.ones(8, 2), mesh, [Partial()])
    else:
        tensor = distribute_tensor(torch.arange(16.0).view(8, 2), mesh, [_StridedShard(0, split_factor=2)])
    with Checkpointer(directory, {"values": {"t": tensor}}) as checkpointer:
        return outcome(lambda: checkpointer.save(1).result(SECS))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("partial", "values.t: a partial tensor cannot be saved"),
        ("strided", "values.t: "),
    ],
)
def test_what_has_no_boxes_is_refused_in_words(how: str, words: str, world: World, tmp_path: Path) -> None:
    for answer in world(2).run(unsavable, str(tmp_path), how):
        assert words in answer
        assert "redistribute" in answer
