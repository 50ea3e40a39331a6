"""What several ranks hold under one name is compared, and never put together from parts of several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from engine import Checkpointer
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]
SECS = 60.0


def result(checkpointer: Checkpointer, step: int) -> Any:
    """What became of a save: the step it committed, or the error, from `save` or from the handle."""

    def work() -> int | None:
        record = checkpointer.save(step).result(SECS)
        return record.step if record else None

    return outcome(work)


def committed(checkpointer: Checkpointer) -> list[int | None]:
    dist.barrier()
    return [item.step for item in checkpointer.list() if item.status == "committed"]


def experts(rank: int, world_size: int, directory: str) -> Any:
    """Each rank's own expert as a plain module under one name: a patchwork of rows, if it were divided."""
    torch.manual_seed(rank)
    expert = nn.Linear(64, 48, bias=False)
    with Checkpointer(directory, {"ex": expert}) as checkpointer:
        first = result(checkpointer, 1)
        with torch.no_grad():
            expert.weight.fill_(3)
        return first, result(checkpointer, 2), committed(checkpointer)


@pytest.mark.parametrize("world_size", [2, 4])
def test_parameters_that_differ_are_refused_by_name_and_ranks(
    world_size: int, world: World, tmp_path: Path
) -> None:
    for first, second, steps in world(world_size).run(experts, str(tmp_path)):
        assert first.startswith("ReplicaMismatchError: the checkpoint of step 1 was not saved: ")
        assert "ex.weight differs between rank 0 and rank 1" in first
        assert "per_rank" in first
        assert second == 2, "once they are equal they are saved"
        assert steps == [2]


def moments(rank: int, world_size: int, directory: str) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Checkpointer(directory, {"model": model, "optimizer": optimizer}) as checkpointer:
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        first = result(checkpointer, 1)
        if rank == 1:
            optimizer.state[model.weight]["momentum_buffer"][3, 5] += 1
        return first, result(checkpointer, 2), committed(checkpointer)


def test_optimizer_state_that_comes_to_differ_is_found_at_the_next_save(world: World, tmp_path: Path) -> None:
    for first, second, steps in world(2).run(moments, str(tmp_path)):
        assert first == 1
        assert "optimizer.state.weight.momentum_buffer differs between rank 0 and rank 1" in second
        assert steps == [1]


def large(rank: int, world_size: int, directory: str, check: str, element: int) -> Any:
    values = {"t": torch.zeros(300_000), "same": torch.ones(4)}
    with Checkpointer(directory, {"values": values}, check_replicas=check) as checkpointer:
        found = [result(checkpointer, 0)]
        values["t"][element] = rank
        return [*found, *(result(checkpointer, step) for step in range(1, 4))]


@pytest.mark.parametrize(("check", "finds"), [("full", True), ("sampled", False), ("off", False)])
def test_how_thoroughly_large_tensors_are_compared(
    check: str, finds: bool, world: World, tmp_path: Path
) -> None:
    """One element of 300,000 is in no sample of the next three saves: full comparison alone finds it."""
    for found in world(2).run(large, str(tmp_path), check, 12_345):
        assert found[0] == 0
        assert all(("values.t differs" in str(answer)) == finds for answer in found[1:])


def everywhere(rank: int, world_size: int, directory: str) -> Any:
    values = {"t": torch.zeros(300_000)}
    with Checkpointer(directory, {"values": values}) as checkpointer:
        first = result(checkpointer, 0)
        values["t"].fill_(rank)
        return first, result(checkpointer, 1)


def test_a_large_tensor_that_differs_everywhere_is_found_at_once(world: World, tmp_path: Path) -> None:
    for first, second in world(2).run(everywhere, str(tmp_path)):
        assert first == 0
        assert "values.t differs between rank 0 and rank 1" in second


def after_restore(rank: int, world_size: int, directory: str) -> Any:
    values = {"t": torch.zeros(300_000)}
    with Checkpointer(directory, {"values": values}) as checkpointer:
        found = [result(checkpointer, 0), result(checkpointer, 1)]
        checkpointer.restore()
        values["t"][12_345] = rank
        return [*found, result(checkpointer, 2)]


def test_the_first_save_after_a_restore_compares_everything(world: World, tmp_path: Path) -> None:
    for first, second, third in world(2).run(after_restore, str(tmp_path)):
        assert (first, second) == (0, 1)
        assert "values.t differs" in third


class Gapped(nn.Module):
    """Parameters that do not lie in memory as they read, in other layouts on other ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        base = torch.arange(40_000.0).view(200, 200)
        own = base.t().contiguous().t() if rank % 2 else base
        self.small = nn.Parameter(own[:3, :3].clone() if rank == 0 else own[:3, :3])
        self.large = nn.Parameter(own)
        self.image = nn.Parameter(
            torch.ones(4, 3, 5, 5).to(memory_format=torch.channels_last if rank else torch.contiguous_format)
        )


def layouts(rank: int, world_size: int, directory: str, spoiled: str) -> Any:
    model = Gapped(rank)
    with Checkpointer(directory, {"model": model}) as checkpointer:
        found = [result(checkpointer, 0), result(checkpointer, 1)]
        if spoiled and rank == 1:
            with torch.no_grad():
                getattr(model, spoiled).add_(1)
        return [*found, result(checkpointer, 2)]


@pytest.mark.parametrize("spoiled", ["", "small", "large", "image"])
def test_values_are_compared_and_not_memory(spoiled: str, world: World, tmp_path: Path) -> None:
    for first, second, third in world(2).run(layouts, str(tmp_path), spoiled):
        assert (first, second) == (0, 1)
        assert (f"model.{spoiled} differs" in str(third)) if spoiled else third == 2


class Normed(nn.Module):
    """Batch norm, and a large buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("mask", torch.zeros(40_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def batch_norm(rank: int, world_size: int, directory: str, phase: str) -> dict[str, torch.Tensor]:
    """DDP gives every rank rank 0's buffers at the start of a forward; then each rank sees its own batch."""
    inner = Normed(0 if phase == "save" else 1)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(directory, {"model": model, "optimizer": optimizer}) as checkpointer:
        if phase != "save":
            assert checkpointer.restore() is not None
            return buffers_of(inner)
        assert result(checkpointer, 0) == 0  # all equal: planned without a difference
        generator = torch.Generator().manual_seed(rank)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 6, generator=generator)).sum().backward()
            optimizer.step()
        assert result(checkpointer, 1) == 1
        return buffers_of(inner)


@pytest.mark.parametrize("world_size", [2, 4])
def test_batch_norm_comes_back_to_each_rank(world_size: int, world: World, tmp_path: Path) -> None:
    saved = world(world_size).run(batch_norm, str(tmp_path), "save")
    assert not torch.equal(saved[0]["norm.running_mean"], saved[1]["norm.running_mean"])
    for before, after in zip(saved, world(world_size).run(batch_norm, str(tmp_path), "restore"), strict=True):
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    for other in world(6 - world_size).run(batch_norm, str(tmp_path), "restore"):
        assert all(torch.equal(other[name], tensor) for name, tensor in saved[0].items()), "never a patchwork"


def large_buffer(rank: int, world_size: int, directory: str, when: str) -> Any:
    model = Normed()
    with Checkpointer(directory, {"model": model}) as checkpointer:
        if when == "first":
            model.mask.fill_(rank)
        found = [result(checkpointer, 0)]
        model.mask.fill_(rank)
        found += [result(checkpointer, 1), result(checkpointer, 2)]
    again = Normed()
    with Checkpointer(directory, {"model": again}, read_only=True) as checkpointer:
        checkpointer.restore()
    return found, again.mask.unique().tolist()


def test_a_large_buffer_that_differs_is_each_ranks_own(world: World, tmp_path: Path) -> None:
    for rank, (found, own) in enumerate(world(2).run(large_buffer, str(tmp_path), "first")):
        assert found == [0, 1, 2]
        assert own == [rank]


def test_a_large_buffer_that_comes_to_differ_fails_one_save(world: World, tmp_path: Path) -> None:
    for rank, (found, own) in enumerate(world(2).run(large_buffer, str(tmp_path), "later")):
        assert found[0] == 0
        assert "model.mask differs between rank 0 and rank 1 (a buffer that was equal" in found[1]
        assert found[2] == 2
        assert own == [rank]


class Noted(nn.Module):
    """Extra state and buffers that are each rank's own; a buffer that is a DTensor, and one inside FSDP2."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (world_size,))
        self.linear = fully_shard(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)), mesh=mesh)
        self.register_buffer("spread", distribute_tensor(torch.zeros(3), mesh, [Replicate()]))
        self.note: Any = {"n": 0, "t": torch.zeros(2), "large": torch.zeros(20_000)}
        self.fill(0.0)

    def fill(self, value: float) -> None:
        self.linear[1].running_mean.fill_(value)
        self.spread.to_local().fill_(value)
        self.note = {"n": value, "t": torch.full((2,), value), "large": torch.full((20_000,), value)}

    def seen(self) -> list[Any]:
        tensors = (self.linear[1].running_mean, self.spread.to_local(), self.note["t"], self.note["large"])
        return [self.note["n"], *(tensor.unique().tolist() for tensor in tensors)]

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def noted(rank: int, world_size: int, directory: str, phase: str) -> Any:
    module = Noted(rank, world_size)
    with Checkpointer(directory, {"model": module}) as checkpointer:
        if phase == "save":
            checkpointer.prepare()
            module.fill(rank + 1.0)
            return [result(checkpointer, step) for step in (1, 2)]
        assert checkpointer.restore() is not None
        return module.seen()


def test_extra_state_and_buffers_of_any_kind_are_each_ranks_own(world: World, tmp_path: Path) -> None:
    assert world(2).run(noted, str(tmp_path), "save") == [[1, 2]] * 2
    for rank, seen in enumerate(world(2).run(noted, str(tmp_path), "restore")):
        assert seen == [rank + 1.0, *[[rank + 1.0]] * 4]
    for seen in world(4).run(noted, str(tmp_path), "restore"):
        assert seen == [1.0, *[[1.0]] * 4]


def stepped_on_rank_0(rank: int, world_size: int, directory: str) -> Any:
    """Weights are equal on all ranks; only rank 0 has made optimizer state for one of them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)
    for parameter in module.parameters() if rank == 0 else [module[1].weight, module[1].bias]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Checkpointer(directory, {"model": module, "optimizer": optimizer}) as checkpointer:
        first = result(checkpointer, 1)
        return first, committed(checkpointer)


def test_optimizer_state_that_only_one_rank_has_is_refused(world: World, tmp_path: Path) -> None:
    for first, steps in world(2).run(stepped_on_rank_0, str(tmp_path)):
        assert first.startswith("StateError: "), first
        assert "optimizer.state.0.weight exists on rank 0 but not on rank 1" in first
        assert steps == []
