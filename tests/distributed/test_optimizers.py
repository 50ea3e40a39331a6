"""Optimizers whose state is divided over ranks, or made beside sharded parameters without a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, zeros
from torch.nn.parallel import DistributedDataParallel

from engine import Checkpointer
from tests.support.ranks import Ranks, outcome
from tests.support.training import differences

World = Callable[[int], Ranks]

SECS = 60.0


class Counting(torch.optim.AdamW):
    """Counts in numbers, as older optimizers do; the count shows in the weights."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= 1 + self.state.get(parameter, {}).get("count", 0)
        loss = super().step(closure)
        for entry in self.state.values():
            entry["count"] = entry.get("count", 0) + 1
        return loss


class Rows(torch.optim.SGD):
    """Keeps state of other shapes than its parameters': sharded, replicated, and plain."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                entry = self.state[parameter]
                if not entry:
                    mesh, rows = parameter.device_mesh, parameter.shape[0]
                    entry["sharded"] = zeros(rows, device_mesh=mesh, placements=[Shard(0)])
                    entry["replicated"] = zeros(rows, device_mesh=mesh, placements=[Replicate()])
                    entry["plain"] = torch.zeros(3)
                grad = parameter.grad.detach()
                mean = grad.flatten(1).mean(1) if grad.ndim > 1 else grad
                entry["sharded"] += mean
                entry["replicated"] += mean.redistribute(placements=[Replicate()])
                entry["plain"] += 1
                scale = (
                    1 + entry["sharded"].abs() + entry["replicated"].redistribute(placements=[Shard(0)]).abs()
                )
                parameter.grad /= scale.view(-1, *[1] * (grad.ndim - 1)) * entry["plain"][0].item()
        return super().step(closure)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 3))


def build(how: str, world_size: int, seed: int) -> dict[str, Any]:
    module: nn.Module = network(seed)
    if how == "zero":
        module = DistributedDataParallel(module)
        optimizer: Any = ZeroRedundancyOptimizer(module.parameters(), Counting, lr=0.1)
    elif how == "plain":
        optimizer = Counting(module.parameters(), lr=0.1)
    else:
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
        optimizer = OPTIMIZERS[how](module)
    return {"model": module, "optimizer": optimizer}


OPTIMIZERS = {
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1),
    "rows": lambda module: Rows(module.parameters(), lr=0.1),
    "groups": lambda module: torch.optim.SGD(
        [{"params": list(module[0].parameters()), "lr": 0.3}, {"params": list(module[1:].parameters())}],
        lr=0.1,
        momentum=0.9,
    ),
}


KINDS = {
    "AdamW": ["exp_avg (Shard(dim=0),)", "exp_avg_sq (Shard(dim=0),)", "step Tensor"],
    "rows": ["plain Tensor", "replicated (Replicate(),)", "sharded (Shard(dim=0),)"],
    "groups": ["momentum_buffer (Shard(dim=0),)"],
}


def train(state: dict[str, Any], steps: int, start: int) -> None:
    for step in range(start, start + steps):
        state["optimizer"].zero_grad()
        rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        state["model"](rows).square().mean().backward()
        state["optimizer"].step()


def weights(state: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, tensor in state["model"].state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        found[name.removeprefix("module.")] = whole.detach().clone()
    return found


def save(rank: int, world_size: int, directory: str, how: str) -> dict[str, Any]:
    state = build(how, world_size, seed=0)
    train(state, 3, 0)
    with Checkpointer(directory, state) as checkpointer:
        assert checkpointer.save(3).result(SECS) is not None
        train(state, 2, 3)
        return weights(state)


def resume(rank: int, world_size: int, directory: str, how: str) -> tuple[dict[str, Any], list[str]]:
    state = build(how, world_size, seed=1)
    state["optimizer"].register_step_pre_hook(_no_steps)
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        assert checkpointer.restore() is not None
    state["optimizer"]._optimizer_step_pre_hooks.clear()
    entries = state["optimizer"].state.values()
    kinds = sorted({f"{name} {_kind(value)}" for entry in entries for name, value in entry.items()})
    train(state, 2, 3)
    return weights(state), kinds


def _kind(value: Any) -> str:
    return str(value.placements) if isinstance(value, DTensor) else type(value).__name__


def _no_steps(*_: Any) -> None:
    raise AssertionError("restoring has stepped the optimizer")


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4), (2, 1)])
def test_zero_redundancy_at_the_same_and_another_world_size(
    before: int, after: int, world: World, tmp_path: Path
) -> None:
    undisturbed = world(before).run(save, str(tmp_path), "zero")[0]
    for found, _ in world(after).run(resume, str(tmp_path), "zero"):
        assert differences(found, undisturbed) == []


@pytest.mark.parametrize(("saved_as", "restored_as"), [("zero", "plain"), ("plain", "zero")])
def test_zero_redundancy_and_plain_optimizers_take_each_others_state(
    saved_as: str, restored_as: str, world: World, tmp_path: Path
) -> None:
    before, after = (2 if how == "zero" else 1 for how in (saved_as, restored_as))
    undisturbed = world(before).run(save, str(tmp_path), saved_as)[0]
    for found, _ in world(after).run(resume, str(tmp_path), restored_as):
        assert differences(found, undisturbed) == []


def overlapped(rank: int, world_size: int, directory: str) -> Any:
    module = DistributedDataParallel(network(0))
    adam = torch.optim.Adam
    optimizer = ZeroRedundancyOptimizer(module.parameters(), adam, overlap_with_ddp=True, lr=0.1)
    return outcome(lambda: Checkpointer(directory, {"model": module, "zero": optimizer}))


def test_zero_redundancy_that_overlaps_with_ddp_is_refused_in_words(world: World, tmp_path: Path) -> None:
    for words in world(2).run(overlapped, str(tmp_path)):
        assert words.startswith(
            "UnsavableValueError: zero: a ZeroRedundancyOptimizer with overlap_with_ddp=True"
        )
        assert words.endswith("build it without overlap_with_ddp")


@pytest.mark.parametrize("how", OPTIMIZERS)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 4)])
def test_state_is_made_beside_sharded_parameters(
    how: str, before: int, after: int, world: World, tmp_path: Path
) -> None:
    undisturbed = world(before).run(save, str(tmp_path), how)[0]
    for found, kinds in world(after).run(resume, str(tmp_path), how):
        assert kinds == KINDS[how]
        if before == after:
            assert differences(found, undisturbed) == []
        else:  # sums over other shards are rounded otherwise
            for name in found:
                torch.testing.assert_close(found[name], undisturbed[name])
