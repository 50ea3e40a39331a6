"""Models on real gloo ranks hold the weights, and take the steps, of a model on one process.

One job of ranks is started per world size and goes through all its cases; the tests look at what it saw.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from engine.run.mesh import MeshShape, build_mesh, shape_of
from engine.run.parallelize import clip_gradients, gradient_sync, parallelize
from model.config import GPT2Config
from model.gpt2 import GPT2
from model.init import init_weights
from model.optim import decay_groups

CPU = torch.device("cpu")
# Uneven on purpose: 257 rows divide by neither 2 nor 3, and of two positions over 3 ranks one rank gets none.
CONFIG = GPT2Config(n_layer=2, n_head=2, n_embd=10, vocab_size=257, block_size=8)
SHORT = GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=50257, block_size=2)
SEED = 1337
STEPS = 3
MICRO_BATCHES = 2
BATCH = 24  # divides by every world size here and by the micro-batches: a mean of means is the mean


@dataclass(frozen=True)
class Case:
    """One way to spread the model."""

    dp_replicate: int = 1
    compile: bool = False
    bf16: bool = False
    config: GPT2Config = CONFIG


@dataclass
class Seen:
    """What one rank saw of a case; tensors are whole."""

    wrapper: str = ""
    mesh: MeshShape | None = None
    names: list[str] = field(default_factory=list)
    initial: dict[str, Tensor] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    eval_loss: float = 0.0
    last_norm: float = 0.0
    norm_type: type | None = None
    local_rows: list[int] = field(default_factory=list)
    gradient_dtypes: set[torch.dtype] = field(default_factory=set)


CASES: dict[int, dict[str, Case]] = {
    2: {
        "fsdp": Case(),
        "fsdp-compile": Case(compile=True),
        "fsdp-bf16": Case(bf16=True),
        "ddp": Case(dp_replicate=2),
        "ddp-compile": Case(dp_replicate=2, compile=True),
        "ddp-bf16": Case(dp_replicate=2, bf16=True),
    },
    3: {"fsdp": Case(), "fsdp-empty-shard": Case(config=SHORT)},
    4: {"hsdp": Case(dp_replicate=2)},
}
ALL = [pytest.param(world, name, id=f"{world}-{name}") for world, cases in CASES.items() for name in cases]


def spread(case: Case, world_size: int) -> nn.Module:
    with torch.device("meta"):
        model = GPT2(case.config)
    return parallelize(
        model,
        build_mesh("cpu", world_size, case.dp_replicate),
        partial(init_weights, seed=SEED),
        device=CPU,
        bf16=case.bf16,
        compile=case.compile,
        compile_backend="eager",
    )


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The whole state, copied; goes through the same call as a checkpoint does."""
    state = get_model_state_dict(model)
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in state.items()}


def share(rows: Tensor, rank: int, world_size: int) -> Tensor:
    return rows[rank * BATCH // world_size : (rank + 1) * BATCH // world_size]


def train(
    model: nn.Module, config: GPT2Config, rank: int, world_size: int
) -> tuple[list[float], list[float]]:
    """A few accumulated, clipped AdamW steps on this rank's rows; the mean losses and the norms."""
    # AdamW's first steps go by the sign of a gradient, also where it is hardly more than rounding left of it:
    # seen on one processor in one of 100,514 elements. With an eps well above rounding they do not.
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=1e-2, eps=1e-6, fused=True)
    generator = torch.Generator().manual_seed(0)
    losses, norms = [], []
    for _ in range(STEPS):
        tokens = torch.randint(config.vocab_size, (BATCH, config.block_size + 1), generator=generator)
        mine = share(tokens, rank, world_size).chunk(MICRO_BATCHES)
        total = torch.zeros(())
        for k, rows in enumerate(mine):
            with gradient_sync(model, enabled=k == MICRO_BATCHES - 1):
                loss = model(rows[:, :-1], rows[:, 1:])[1] / MICRO_BATCHES
                loss.backward()
            total += loss.detach()
        norms.append(clip_gradients(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        if world_size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses, norms


def observe(case: Case, rank: int, world_size: int) -> Seen:
    mesh = build_mesh("cpu", world_size, case.dp_replicate)
    model = spread(case, world_size)
    seen = Seen(wrapper=kind(model), mesh=shape_of(mesh), initial=whole(model))
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    seen.local_rows = [shard.shape[0] for shard in local]
    seen.losses, seen.norms = train(model, case.config, rank, world_size)
    with torch.no_grad():
        tokens = torch.arange(BATCH * case.config.block_size).reshape(BATCH, -1) % 257
        seen.eval_loss = model.eval()(tokens, tokens)[1].item()
    # Asked for right after an evaluation, which leaves FSDP2's root unsharded.
    seen.names, seen.final = list(get_model_state_dict(model)), whole(model)
    tokens = share(tokens, rank, world_size)
    with gradient_sync(model, enabled=False):
        pass  # and outside it, a backward pass synchronises again
    model(tokens, tokens)[1].backward()
    seen.gradient_dtypes = {p.grad.dtype for p in model.parameters() if p.grad is not None}
    norm = clip_gradients(model.parameters(), 0.5)
    seen.norm_type, seen.last_norm = type(norm), norm.item()
    return seen


def kind(model: nn.Module) -> str:
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    return "fsdp" if isinstance(model, FSDPModule) else "plain"


def rank_main(rank: int, world_size: int, scratch: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{scratch}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    seen = {name: observe(case, rank, world_size) for name, case in CASES[world_size].items()}
    torch.save(seen, scratch / f"rank-{rank}.pt")
    dist.destroy_process_group()


def run_ranks(world_size: int, scratch: Path) -> dict[str, dict[int, Seen]]:
    """Start the ranks of one world size, and return what each saw of each case."""
    # A fork server: a bare fork beside OpenMP's threads hangs, a spawn imports torch in each rank.
    multiprocessing.set_forkserver_preload(
        ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
    )
    start_processes(rank_main, (world_size, scratch), nprocs=world_size, start_method="forkserver")
    ranks = [torch.load(scratch / f"rank-{rank}.pt", weights_only=False) for rank in range(world_size)]
    return {name: {rank: seen[name] for rank, seen in enumerate(ranks)} for name in CASES[world_size]}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], dict[int, Seen]]:
    finished: dict[int, dict[str, dict[int, Seen]]] = {}

    def job(world_size: int, name: str) -> dict[int, Seen]:
        if world_size not in finished:
            finished[world_size] = run_ranks(world_size, tmp_path_factory.mktemp("ranks"))
        return finished[world_size][name]

    return job


@pytest.fixture(scope="module")
def alone() -> dict[GPT2Config, Seen]:
    """The same cases on one process."""
    return {config: observe(Case(config=config), 0, 1) for config in (CONFIG, SHORT)}


Jobs = Callable[[int, str], dict[int, Seen]]


@pytest.mark.parametrize(("world", "name"), ALL)
def test_the_initial_weights_are_those_of_one_process(
    jobs: Jobs, alone: dict[GPT2Config, Seen], world: int, name: str
) -> None:
    expected = alone[CASES[world][name].config].initial
    for seen in jobs(world, name).values():
        assert seen.initial.keys() == expected.keys()
        assert [n for n, value in expected.items() if not torch.equal(seen.initial[n], value)] == []


@pytest.mark.parametrize(("world", "name"), ALL)
def test_names_are_canonical_also_after_an_evaluation(
    jobs: Jobs, alone: dict[GPT2Config, Seen], world: int, name: str
) -> None:
    for seen in jobs(world, name).values():
        assert seen.names == alone[CASES[world][name].config].names == list(seen.initial)


@pytest.mark.parametrize(("world", "name"), ALL)
def test_steps_are_those_of_one_process(
    jobs: Jobs, alone: dict[GPT2Config, Seen], world: int, name: str
) -> None:
    case = CASES[world][name]
    expected = alone[case.config]
    # bf16's rounding turns the sign of small gradients, and AdamW's first steps go by the sign.
    exact, loose = (2e-2, 0.15) if case.bf16 else (1e-5, 1e-4)
    for seen in jobs(world, name).values():
        assert seen.losses == pytest.approx(expected.losses, rel=exact)
        assert seen.norms == pytest.approx(expected.norms, rel=loose)
        assert seen.eval_loss == pytest.approx(expected.eval_loss, rel=exact)
        assert seen.last_norm == pytest.approx(expected.last_norm, rel=loose)
        assert seen.norm_type is Tensor
        for n, value in expected.final.items():
            torch.testing.assert_close(seen.final[n], value, atol=loose, rtol=0)
    assert len(set(expected.losses)) == STEPS, "the steps changed nothing"


@pytest.mark.parametrize(
    ("world", "name", "wrapper", "mesh"),
    [
        (2, "fsdp", "fsdp", MeshShape(1, 2)),
        (2, "ddp", "ddp", MeshShape(2, 1)),
        (3, "fsdp", "fsdp", MeshShape(1, 3)),
        (4, "hsdp", "fsdp", MeshShape(2, 2)),
    ],
)
def test_the_mesh_decides_how_the_model_is_spread(
    jobs: Jobs, alone: dict[GPT2Config, Seen], world: int, name: str, wrapper: str, mesh: MeshShape
) -> None:
    ranks = jobs(world, name)
    assert {(seen.wrapper, seen.mesh) for seen in ranks.values()} == {(wrapper, mesh)}
    rows = alone[CONFIG].local_rows
    shards = range(mesh.dp_shard)
    assert [sum(column) for column in zip(*(ranks[r].local_rows for r in shards), strict=True)] == rows
    for replica in range(1, mesh.dp_replicate):
        for r in shards:
            assert ranks[replica * mesh.dp_shard + r].local_rows == ranks[r].local_rows


def test_a_rank_may_hold_nothing_of_a_parameter(jobs: Jobs) -> None:
    assert 0 in jobs(3, "fsdp-empty-shard")[2].local_rows


@pytest.mark.parametrize(("world", "name"), ALL)
def test_gradients_are_float32_whatever_the_compute_dtype(jobs: Jobs, world: int, name: str) -> None:
    for seen in jobs(world, name).values():
        assert seen.gradient_dtypes == {torch.float32}


@pytest.mark.parametrize("name", ["fsdp-bf16", "ddp-bf16"])
def test_bf16_does_compute_in_bf16(jobs: Jobs, alone: dict[GPT2Config, Seen], name: str) -> None:
    assert jobs(2, name)[0].losses != pytest.approx(alone[CONFIG].losses, rel=1e-6)
