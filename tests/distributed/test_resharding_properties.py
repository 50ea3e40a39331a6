"""Random shapes, dtypes, placements and meshes: each rank's restored elements are those of the source.

One set of processes goes through all examples. What every rank should hold is worked out by torch's own
`distribute_tensor` from the same source, on the restoring mesh.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from engine import Checkpointer
from tests.support.ranks import Ranks
from tests.support.training import same_bits

DTYPES = ["float32", "bfloat16", "int64", "bool", "float16"]


@dataclass(frozen=True)
class Tensor:
    """A global tensor and where it lies; no placements: a plain tensor, equal on all ranks."""

    shape: tuple[int, ...]
    dtype: str
    placements: tuple[str, ...] = ()

    def source(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 200, self.shape, generator=generator)
        return values.to(getattr(torch, self.dtype))


@dataclass(frozen=True)
class Layout:
    """A mesh, and one tensor's placement on it for each of the state's tensors."""

    mesh: tuple[int, ...]
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Example:
    before: Layout
    after: Layout


def meshes(world_size: int) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [(world_size,)]
    return found + [(n, world_size // n) for n in range(1, world_size + 1) if world_size % n == 0]


@st.composite
def placements(draw: st.DrawFn, shape: tuple[int, ...], mesh: tuple[int, ...]) -> tuple[str, ...]:
    if draw(st.integers(0, 5)) == 0:
        return ()
    kinds = ["R", *(f"S{dim}" for dim in range(len(shape)))]
    return tuple(draw(st.sampled_from(kinds)) for _ in mesh)


@st.composite
def examples(draw: st.DrawFn, before: int, after: int) -> Example:
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=4))
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in shapes]
    layouts = []
    for world_size in (before, after):
        mesh = draw(st.sampled_from(meshes(world_size)))
        tensors = (
            Tensor(shape, dtype, draw(placements(shape, mesh)))
            for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        layouts.append(Layout(mesh, tuple(tensors)))
    return Example(*layouts)


_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    if shape not in _meshes:
        _meshes[shape] = init_device_mesh("cpu", shape)
    return _meshes[shape]


def place(tensor: Tensor, values: torch.Tensor, mesh: tuple[int, ...]) -> torch.Tensor:
    if not tensor.placements:
        return values.clone()
    kinds: list[Placement] = [Replicate() if p == "R" else Shard(int(p[1:])) for p in tensor.placements]
    return distribute_tensor(values, mesh_of(mesh), kinds)


def save(rank: int, world_size: int, layout: Layout, directory: str) -> None:
    tensors = [place(t, t.source(n), layout.mesh) for n, t in enumerate(layout.tensors)]
    with Checkpointer(directory, {"values": tensors}) as checkpointer:
        checkpointer.save(1).result(60)
    dist.barrier()


def restore(rank: int, world_size: int, layout: Layout, directory: str) -> list[str]:
    """What differs on this rank."""
    expected = [place(t, t.source(n), layout.mesh) for n, t in enumerate(layout.tensors)]
    state = [place(t, torch.zeros_like(t.source(n)), layout.mesh) for n, t in enumerate(layout.tensors)]
    with Checkpointer(directory, {"values": state}, read_only=True) as checkpointer:
        checkpointer.restore("latest")
    dist.barrier()
    found = []
    for number, (one, two) in enumerate(zip(expected, state, strict=True)):
        local = [t.to_local() if isinstance(t, DTensor) else t for t in (one, two)]
        if isinstance(one, DTensor) != isinstance(two, DTensor) or not same_bits(*local):
            found.append(f"{number}: {local[0].tolist()} but restored {local[1].tolist()}")
    return found


def check(world: Callable[[int], Ranks], before: int, after: int, example: Example) -> None:
    directory = tempfile.mkdtemp(prefix="example-")
    try:
        world(before).run(save, example.before, directory)
        assert world(after).run(restore, example.after, directory) == [[]] * after
    finally:
        shutil.rmtree(directory)


few = settings(
    max_examples=int(os.environ.get("RESHARDING_EXAMPLES", "20")),
    # The ranks are started once for all examples, on purpose; nothing is left of one in the next.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@few
@given(example=examples(4, 3))
def test_four_ranks_to_three(world: Callable[[int], Ranks], example: Example) -> None:
    check(world, 4, 3, example)


@few
@given(example=examples(2, 4))
def test_two_ranks_to_four(world: Callable[[int], Ranks], example: Example) -> None:
    check(world, 2, 4, example)


@few
@given(example=examples(4, 4))
def test_the_same_ranks_on_another_mesh(world: Callable[[int], Ranks], example: Example) -> None:
    check(world, 4, 4, example)


def tensor_parallel(seed: int, width: int, hidden: int, shape: tuple[int, ...]) -> dict[str, Any]:
    torch.manual_seed(seed)
    network = nn.Sequential(OrderedDict(up=nn.Linear(width, hidden), down=nn.Linear(hidden, width)))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    parallelize_module(network, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(network, mesh=mesh["data"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    # Gradients by hand: torch cannot run such a module where the sizes do not divide.
    for number, parameter in enumerate(network.parameters()):
        parameter.grad = torch.full_like(parameter, number + seed)
    optimizer.step()
    return {"model": network, "optimizer": optimizer}


def locals_of(state: dict[str, Any]) -> list[torch.Tensor]:
    network, optimizer = state["model"], state["optimizer"]
    tensors = [p for _, p in sorted(network.named_parameters())]
    tensors += [optimizer.state[p][key] for p in network.parameters() for key in ("exp_avg", "exp_avg_sq")]
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def save_tensor_parallel(
    rank: int, world_size: int, width: int, hidden: int, shape: tuple[int, ...], directory: str
) -> None:
    with Checkpointer(directory, tensor_parallel(1, width, hidden, shape)) as checkpointer:
        checkpointer.save(1).result(60)
    dist.barrier()


def restore_tensor_parallel(
    rank: int, world_size: int, width: int, hidden: int, shape: tuple[int, ...], directory: str
) -> list[int]:
    """Which tensors differ here from the same state built, and stepped, on this mesh."""
    expected, state = tensor_parallel(1, width, hidden, shape), tensor_parallel(2, width, hidden, shape)
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        checkpointer.restore("latest")
    dist.barrier()
    pairs = zip(locals_of(expected), locals_of(state), strict=True)
    return [number for number, (one, two) in enumerate(pairs) if not same_bits(one, two)]


@settings(parent=few, max_examples=10)
@given(
    width=st.integers(1, 9),
    hidden=st.integers(2, 9),
    before=st.sampled_from([(1, 4), (2, 2), (4, 1)]),
    after=st.sampled_from([(1, 3), (3, 1), (1, 2), (2, 1)]),
)
def test_tensor_parallel_styles(
    world: Callable[[int], Ranks], width: int, hidden: int, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """FSDP over tensor parallel: two dimensions of the mesh may cut the same dimension of a tensor."""
    directory = tempfile.mkdtemp(prefix="example-")
    try:
        world(4).run(save_tensor_parallel, width, hidden, before, directory)
        ranks = after[0] * after[1]
        assert world(ranks).run(restore_tensor_parallel, width, hidden, after, directory) == [[]] * ranks
    finally:
        shutil.rmtree(directory)
