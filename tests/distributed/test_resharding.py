"""Saved on one mesh, restored on another: model and optimizer come back to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from engine import Checkpointer
from engine.format.layout import Chunk
from engine.format.manifest import TensorInfo
from engine.restore import load_plan
from engine.restore.load_plan import Slice, plan_slices
from engine.storage.local import LocalStorage
from tests.support.carrier import every_nth_row
from tests.support.ranks import Ranks
from tests.support.reads import counted_reads
from tests.support.training import differences, photograph

World = Callable[[int], Ranks]


class Uneven(nn.Module):
    """Sizes that no world size divides; fewer rows than ranks; ties; buffers; bf16; a scalar."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(13, 6)
        self.block = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))
        self.norm = nn.BatchNorm1d(6)
        self.narrow = nn.Parameter(torch.randn(1, 6))
        self.scale = nn.Parameter(torch.randn(()).view(1))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.block(self.embed(tokens)) * self.narrow)
        return self.head(hidden) * self.scale


def spread(how: str, seed: int, world_size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    network: nn.Module = Uneven(seed)
    if how == "ddp":
        network = DistributedDataParallel(network)
    elif how in ("fsdp", "hsdp"):
        shape = (2, world_size // 2) if how == "hsdp" else (world_size,)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        assert isinstance(network, Uneven)
        fully_shard(network.block, mesh=mesh)
        fully_shard(network, mesh=mesh)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in network.parameters() if p.ndim <= 1], "lr": 0.02},
        ],
        lr=0.01,
    )
    return network, optimizer


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Steps on the same tokens on every rank."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        tokens = (torch.arange(20) * (step + 3)) % 13
        loss = network(tokens).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": network, "optimizer": optimizer, "values": {"n": 3, "t": torch.arange(5)}}


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """A photograph of the whole tensors, the same whatever the mesh and the wrappers."""
    network = state["model"]
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    taken = photograph({**state, "model": inner})
    taken["optimizer"]["state"] = dict(sorted(taken["optimizer"]["state"].items()))
    return taken


def save(rank: int, world_size: int, how: str, directory: str, evaluate: bool = False) -> None:
    network, optimizer = spread(how, seed=1, world_size=world_size)
    train(network, optimizer, 2)
    if evaluate:
        network.eval()
        with torch.no_grad():
            network(torch.arange(8))
        unsharded = [p for p in network.parameters() if not isinstance(p, DTensor)]
        assert not isinstance(network, FSDPModule) or unsharded, (
            "the evaluation should leave the root unsharded"
        )
        network.train()
    state = state_of(network, optimizer)
    with Checkpointer(directory, state) as checkpointer:
        checkpointer.save(2).result(60)
        again = checkpointer.save(3)  # by the standing plan
        expected = whole(state)
        again.result(60)
    if rank == 0:
        torch.save(expected, Path(directory) / "expected.pt")


def restore(rank: int, world_size: int, how: str, directory: str) -> list[str]:
    """What differs from what was saved, and from training that goes on without a restart."""
    network, optimizer = spread(how, seed=2, world_size=world_size)
    state = state_of(network, optimizer)
    state["values"] = {}
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        assert checkpointer.restore("latest") is not None
    found = whole(state)
    if isinstance(network, FSDPModule):
        assert all(isinstance(p, DTensor) for p in network.parameters())
    if rank:
        return []
    return differences(found, torch.load(Path(directory) / "expected.pt", weights_only=False))


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], str]:
    """The directory of a checkpoint saved that way, made when first asked for."""
    made: dict[tuple[str, int, bool], str] = {}

    def get(how: str, world_size: int, evaluate: bool = False) -> str:
        key = (how, world_size, evaluate)
        if key not in made:
            made[key] = str(tmp_path_factory.mktemp(f"{how}-{world_size}"))
            world(world_size).run(save, how, made[key], evaluate)
        return made[key]

    return get


Saved = Callable[..., str]


EIGHT = pytest.param(8, marks=pytest.mark.slow)


@pytest.mark.parametrize("after", [1, 2, 3, 4, EIGHT])
@pytest.mark.parametrize("before", [1, 2, 3, 4, EIGHT])
def test_fsdp_to_fsdp(before: int, after: int, world: World, saved: Saved) -> None:
    assert world(after).run(restore, "fsdp", saved("fsdp", before))[0] == []


@pytest.mark.parametrize(
    ("how", "before", "other", "after"),
    [
        ("hsdp", 4, "fsdp", 3),
        ("hsdp", 4, "hsdp", 2),
        ("hsdp", 2, "hsdp", 4),
        ("fsdp", 3, "hsdp", 4),
        ("ddp", 2, "fsdp", 3),
        ("ddp", 3, "ddp", 2),
        ("fsdp", 4, "ddp", 2),
        ("hsdp", 4, "plain", 1),
        ("plain", 1, "hsdp", 4),
        ("ddp", 2, "plain", 1),
        ("plain", 1, "ddp", 3),
    ],
)
def test_any_mesh_to_any_mesh(
    how: str, before: int, other: str, after: int, world: World, saved: Saved
) -> None:
    assert world(after).run(restore, other, saved(how, before))[0] == []


@pytest.mark.parametrize(
    ("how", "before", "other", "after"),
    [("fsdp", 2, "fsdp", 3), ("hsdp", 4, "plain", 1), ("ddp", 2, "fsdp", 2)],
)
def test_after_an_evaluation(
    how: str, before: int, other: str, after: int, world: World, saved: Saved
) -> None:
    """A no-grad evaluation leaves FSDP2's root unsharded, with full plain tensors for parameters."""
    assert world(after).run(restore, other, saved(how, before, True))[0] == []


def go_on(rank: int, world_size: int, how: str, directory: str) -> list[str]:
    """At the same world size a resumed run is the uninterrupted one, to the bit."""
    network, optimizer = spread(how, 1, world_size)
    train(network, optimizer, 2)
    with Checkpointer(directory, state_of(network, optimizer)) as checkpointer:
        checkpointer.save(2).result(60)
        losses = train(network, optimizer, 3)
        final = whole(state_of(network, optimizer))
        checkpointer.wait()
    other, other_optimizer = spread(how, 2, world_size)
    with Checkpointer(directory, state_of(other, other_optimizer)) as checkpointer:
        checkpointer.restore("latest")
        again = train(other, other_optimizer, 3)
    lines = [] if again == losses else [f"losses {again} instead of {losses}"]
    return lines + differences(whole(state_of(other, other_optimizer)), final)


@pytest.mark.parametrize(("how", "world_size"), [("fsdp", 2), ("fsdp", 3), ("hsdp", 4), ("ddp", 2)])
def test_a_resumed_run_is_the_uninterrupted_one(
    how: str, world_size: int, world: World, tmp_path: Path
) -> None:
    assert world(world_size).run(go_on, how, str(tmp_path)) == [[]] * world_size


def roll_back(rank: int, world_size: int, how: str, directory: str) -> list[str]:
    """Back to a checkpoint in the middle of training, right after an evaluation."""
    network, optimizer = spread(how, 1, world_size)
    with Checkpointer(directory, state_of(network, optimizer)) as checkpointer:
        train(network, optimizer, 2)
        checkpointer.save(2).result(60)
        losses = train(network, optimizer, 3)
        network.eval()
        with torch.no_grad():
            network(torch.arange(8))
        network.train()
        checkpointer.restore("latest")
        again = train(network, optimizer, 3)
    return [] if again == losses else [f"losses {again} instead of {losses}"]


@pytest.mark.parametrize(("how", "world_size"), [("fsdp", 2), ("hsdp", 4), ("ddp", 2)])
def test_a_roll_back_after_an_evaluation(how: str, world_size: int, world: World, tmp_path: Path) -> None:
    """Full parameters that FSDP2 has left in place would go on being used."""
    assert world(world_size).run(roll_back, how, str(tmp_path)) == [[]] * world_size


GRID = {(0, 0): (3, 5), (3, 0): (4, 2), (3, 2): (4, 3)}
"""Where the chunks of a [7, 5] tensor begin, and their sizes."""


def plans(rank: int, world_size: int) -> tuple[list[Any], list[Any], int]:
    """(our plan, DCP's own, how often DCP was asked for a shard) for many tensors of few kinds."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("one", "two"))
    some = [Replicate(), Shard(0), Shard(1)]
    tensors = {
        f"{number} {one} {two}": distribute_tensor(torch.zeros(7, 5), mesh, [one, two])
        for number in range(3)
        for one in some
        for two in some
    }
    tensors["scalar"] = distribute_tensor(torch.zeros(()), mesh, [Replicate(), Replicate()])
    infos = {name: TensorInfo("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    chunks = {
        name: [Chunk(name, "F32", (7, 5), *box) for box in GRID.items()]
        if tensor.ndim
        else [Chunk(name, "F32", (), (), ())]
        for name, tensor in tensors.items()
    }
    asked, real = [], DTensor.__create_chunk_list__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DTensor, "__create_chunk_list__", lambda self: asked.append(1) or real(self))
        ours = plan_slices(tensors, infos, chunks)
        count = len(asked)
        patch.setattr(load_plan._Shards, "slices", lambda *_: None)
        theirs = plan_slices(tensors, infos, chunks)
    return [described(item) for item in ours], [described(item) for item in theirs], count


def described(item: Slice) -> tuple[Any, ...]:
    to = item.to
    memory = (to.data_ptr(), tuple(to.shape), to.stride()) if to.numel() else ()
    return item.name, item.chunk, item.offsets, item.lengths, memory


def test_shards_are_planned_as_dcp_plans_them(world: World) -> None:
    """Its planner is asked for each kind of shard once, and what follows is the same."""
    for ours, theirs, asked in world(4).run(plans):
        assert sorted(ours) == sorted(theirs)
        assert len({name for name, *_ in ours}) > 20
        assert asked == 10


def left_to_dcp(rank: int, world_size: int) -> list[bool]:
    """Whether nothing was planned: (for a shard of two boxes, for a mesh without this rank)."""
    rows = distribute_tensor(torch.zeros(4, 5), init_device_mesh("cpu", (world_size,)), [Shard(0)])
    chunks = [Chunk("t", "F32", (4, 5), (0, 0), (4, 5))]
    of_rank_0 = DeviceMesh("cpu", [0], _rank=rank)
    elsewhere = DTensor.from_local(torch.zeros(4, 5), of_rank_0, [Shard(0)], run_check=False)
    found = []
    real = DTensor.__create_chunk_list__
    for tensor, boxes in ((rows, lambda self: real(self) * 2), (elsewhere, real)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DTensor, "__create_chunk_list__", boxes)
            found.append(load_plan._Shards().slices("t", tensor, chunks) is None)
    return found


def test_other_dtensors_are_left_to_dcp(world: World) -> None:
    assert world(2).run(left_to_dcp) == [[True, False], [True, True]]


def bytes_written(rank: int, world_size: int, how: str, directory: str) -> int:
    torch.manual_seed(0)
    network: nn.Module = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])
    if how == "ddp":
        network = DistributedDataParallel(network)
    else:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(network, mesh=mesh)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    with Checkpointer(directory, {"model": network, "optimizer": optimizer}) as checkpointer:
        record = checkpointer.save(1).result(60)
        assert record is not None
    return (Path(record.path) / f"shard-{rank:05d}.safetensors").stat().st_size


@pytest.mark.parametrize(("how", "world_size"), [("ddp", 2), ("ddp", 3), ("hsdp", 4)])
def test_replicas_write_their_share_and_no_more(
    how: str, world_size: int, world: World, tmp_path: Path
) -> None:
    sizes = world(world_size).run(bytes_written, how, str(tmp_path))
    data = 3 * 12 * (64 * 64 + 64) * 4
    assert max(sizes) / (sum(sizes) / world_size) <= 1.05
    assert data <= sum(sizes) <= data + world_size * 60_000, "generators, headers and step counts"


def stock(rank: int, world_size: int, directory: str) -> list[str]:
    """Read the tensors of a checkpoint without Holdfast, into another sharding."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    (path,) = sorted(Path(directory).glob("step-00000003-*"))
    network, _ = spread("fsdp", seed=2, world_size=world_size)
    own = {f"model.{name}": value for name, value in network.state_dict().items()}
    del own["model.head.weight"]  # tied: stored once
    dcp.load(own, storage_reader=HuggingFaceStorageReader(str(path)))
    found = photograph({"model": own})["model"]
    expected = torch.load(Path(directory) / "expected.pt", weights_only=False)["model"]
    return differences(found, {f"model.{n}": v for n, v in expected.items() if n != "head.weight"})


@pytest.mark.parametrize(("how", "before"), [("fsdp", 3), ("hsdp", 4), ("ddp", 2)])
def test_stock_dcp_reads_the_tensors_at_another_world_size(
    how: str, before: int, world: World, saved: Saved
) -> None:
    assert world(2).run(stock, saved(how, before)) == [[], []]


def random_numbers(
    rank: int, world_size: int, directory: str, save_first: bool, step: int = 5
) -> list[list[float]]:
    with Checkpointer(directory, {"values": {}}, seed=9) as checkpointer:
        if save_first:
            torch.manual_seed(100 + rank)
            checkpointer.save(step).result(60)
        expected = torch.rand(3).tolist()
        checkpointer.restore("latest")
        return [expected, torch.rand(3).tolist()]


def test_generators_come_back_to_their_ranks(world: World, tmp_path: Path) -> None:
    found = world(3).run(random_numbers, str(tmp_path), True)
    assert [before == after for before, after in found] == [True] * 3
    assert len({str(numbers) for pair in found for numbers in pair}) == 3
    again = world(3).run(random_numbers, str(tmp_path), False)
    assert [after for _, after in again] == [after for _, after in found]


def test_at_another_world_size_generators_are_derived(world: World, tmp_path: Path) -> None:
    saved_by_two = world(2).run(random_numbers, str(tmp_path), True)
    by_three = [after for _, after in world(3).run(random_numbers, str(tmp_path), False)]
    again = [after for _, after in world(3).run(random_numbers, str(tmp_path), False)]
    assert by_three == again, "from (seed, step, rank) alone"
    streams = [*by_three, *(after for _, after in saved_by_two)]
    assert len({str(numbers) for numbers in streams}) == 5, "no two ranks share a stream"


WHOLE = torch.arange(60.0).view(15, 4)


def in_boxes(rank: int, world_size: int, directory: str, save_first: bool) -> list[int]:
    """A value and a parameter with momenta, dealt out row by row as boxes of plain tensors: what differs."""
    rows = every_nth_row(WHOLE, rank, world_size)
    network = nn.Module()
    network.weight = nn.Parameter(rows.clone())
    network.weight.__dict__.update(rows.__dict__)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network.weight.grad = rows.clone()
    optimizer.step()
    value = every_nth_row(WHOLE.to(torch.bfloat16), rank, world_size)
    tensors = [network.weight, *optimizer.state[network.weight].values(), value]
    expected = [tensor.detach().clone() for tensor in tensors]
    state = {"model": network, "optimizer": optimizer, "values": value}
    with Checkpointer(directory, state) as checkpointer:
        if save_first:
            checkpointer.save(1).result(60)
        with torch.no_grad():
            for tensor in tensors:
                tensor.zero_()
        checkpointer.restore("latest")
    # The last row is padding.
    pairs = [(a[:-1], b[:-1]) if a.ndim else (a, b) for a, b in zip(expected, tensors, strict=True)]
    return [number for number, (a, b) in enumerate(pairs) if not torch.equal(a, b)]


def test_plain_tensors_that_carry_several_boxes(world: World, tmp_path: Path) -> None:
    assert world(2).run(in_boxes, str(tmp_path), True) == [[], []]
    assert world(3).run(in_boxes, str(tmp_path), False) == [[], [], []]


def indexes_read(rank: int, world_size: int, directory: str, save_first: bool) -> list[str]:
    """The indexes that this rank reads in one restore of a tensor that is sharded by rows."""
    mesh = init_device_mesh("cpu", (world_size,))
    state = {"values": {"t": distribute_tensor(torch.arange(64.0).view(16, 4), mesh, [Shard(0)])}}
    read: list[str] = []
    real = LocalStorage.read_bytes

    def noting(storage: LocalStorage, path: str, *, max_bytes: int) -> bytes:
        read.append(path.rpartition("/")[2])
        return real(storage, path, max_bytes=max_bytes)

    with Checkpointer(directory, state) as checkpointer:
        if save_first:
            checkpointer.save(1).result(60)
        LocalStorage.read_bytes = noting  # type: ignore[method-assign]
        try:
            checkpointer.restore("latest")
        finally:
            LocalStorage.read_bytes = real  # type: ignore[method-assign]
    return sorted(name.removesuffix(".json") for name in read if name.startswith("shard-"))


def test_a_rank_reads_the_indexes_that_it_needs_and_rank_0_all(world: World, tmp_path: Path) -> None:
    every = [f"shard-{rank:05d}" for rank in range(4)]
    assert world(4).run(indexes_read, str(tmp_path), True) == [every, *([name] for name in every[1:])]
    # At another world size also the first one, for the names of the saved values.
    assert world(2).run(indexes_read, str(tmp_path), False) == [every, [every[0], *every[2:]]]


ROWS, COLUMNS = 1024, 1024


def bytes_read(rank: int, world_size: int, directory: str, dim: int, save_first: bool) -> tuple[int, int]:
    """(bytes of shards read, bytes of this rank's share) of a tensor of 4 MiB sharded along `dim`."""
    source = torch.arange(float(ROWS * COLUMNS)).view(ROWS, COLUMNS)
    mesh = init_device_mesh("cpu", (world_size,))
    tensor = distribute_tensor(source if save_first else torch.zeros_like(source), mesh, [Shard(dim)])
    with Checkpointer(directory, {"values": tensor}) as checkpointer, counted_reads() as counts:
        if save_first:
            checkpointer.save(1).result(60)
            return 0, 0
        checkpointer.restore("latest", include=["values"])
    expected = distribute_tensor(source, mesh, [Shard(dim)])
    assert torch.equal(tensor.to_local(), expected.to_local())
    return counts["shards"], tensor.to_local().nbytes


BLOCK_BYTES = 65536
ROW_BYTES = 4 * COLUMNS


@pytest.mark.parametrize(
    ("before", "after", "rows_touched"),
    [
        (0, 0, [ROWS // 4] * 4),  # its own rows
        (0, 1, [ROWS] * 4),  # a quarter of each row: all of it is touched
        (1, 1, [ROWS // 2] * 4),  # half of each of one file's rows, as long as half a row of the whole
        (1, 0, [ROWS // 4] * 4),  # its rows' halves, in both files
    ],
)
def test_other_placements_read_the_saved_rows_that_they_touch(
    before: int, after: int, rows_touched: list[int], world: World, tmp_path: Path
) -> None:
    world(2).run(bytes_read, str(tmp_path), before, True)
    found = world(4).run(bytes_read, str(tmp_path), after, False)
    for (read, share), rows in zip(found, rows_touched, strict=True):
        # A run of rows begins and ends inside a block, in each of two files.
        assert share <= read <= rows * ROW_BYTES + 4 * BLOCK_BYTES
