"""Models under DDP, FSDP2, torch.compile and the like: saved under one, restored under another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from engine import Checkpointer
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]


def model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)))


def bare(seed: int) -> Any:
    return model(seed)


def ddp(seed: int) -> Any:
    return DistributedDataParallel(model(seed))


def compiled_ddp(seed: int) -> Any:
    inner = model(seed)
    inner[1] = checkpoint_wrapper(inner[1])
    return torch.compile(DistributedDataParallel(inner), backend="eager")


def ddp_compiled(seed: int) -> Any:
    return DistributedDataParallel(torch.compile(checkpoint_wrapper(model(seed)), backend="eager"))


def fsdp2(seed: int, *, offload: bool = False, wrap: bool = False) -> Any:
    found = model(seed)
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    if wrap:
        found[0] = checkpoint_wrapper(found[0])
    fully_shard(found[0], **policy)
    fully_shard(found[1], **policy)
    fully_shard(found, **policy)
    return torch.compile(found, backend="eager") if wrap else found


def fsdp2_offloaded(seed: int) -> Any:
    return fsdp2(seed, offload=True)


def fsdp2_wrapped(seed: int) -> Any:
    return fsdp2(seed, wrap=True)


def fabric(seed: int) -> Any:
    """Lightning Fabric, on the process group that there is."""
    from lightning.fabric.strategies import DDPStrategy
    from lightning.fabric.wrappers import _FabricModule

    original = model(seed)
    return _FabricModule(DistributedDataParallel(original), DDPStrategy(), original_module=original)


WAYS = [bare, ddp, compiled_ddp, ddp_compiled, fsdp2, fsdp2_offloaded, fsdp2_wrapped, fabric]


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(wrapped: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(7)
        wrapped(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()


def picture(wrapped: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Weights and moments in the order of the parameters, which is the bare model's under every wrapper."""
    with torch.no_grad():
        parameters = list(wrapped.parameters())
        moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        return [plain(t).detach().clone() for t in (*parameters, *moments)]


def start(way: Callable[[int], Any], seed: int) -> tuple[Any, torch.optim.Optimizer]:
    wrapped = way(seed)
    return wrapped, torch.optim.AdamW(wrapped.parameters(), lr=0.1)


def save(rank: int, world_size: int, directory: str, way: Callable[[int], Any]) -> Any:
    wrapped, optimizer = start(way, 1)
    train(wrapped, optimizer, 2)
    with Checkpointer(directory, {"model": wrapped, "optimizer": optimizer}) as checkpointer:
        checkpointer.save(1).result(60)
        train(wrapped, optimizer, 1)
        checkpointer.save(2).result(60)
    return picture(wrapped, optimizer)


def restore(rank: int, world_size: int, directory: str, way: Callable[[int], Any]) -> Any:
    wrapped, optimizer = start(way, 2)
    with Checkpointer(directory, {"model": wrapped, "optimizer": optimizer}, read_only=True) as checkpointer:
        checkpointer.restore()
    for parameter in wrapped.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            lie = [getattr(t, "placements", None) for t in (optimizer.state[parameter][name], parameter)]
            assert lie[0] == lie[1], "whatever wrapper it was saved under"
    found = picture(wrapped, optimizer)
    train(wrapped, optimizer, 1)  # what was filled is what trains
    return found, picture(wrapped, optimizer)


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_wrapper_is_restored_by_every_other(way: Any, world: World, tmp_path: Path) -> None:
    saved = world(2).run(save, str(tmp_path), way)
    for ranks, other in [(2, WAYS[(WAYS.index(way) + 3) % len(WAYS)]), (4, way)]:
        for found, after in world(ranks).run(restore, str(tmp_path), other):
            assert equal(found, saved[0])
            assert not equal(after, found)


class Halves(nn.Linear):
    """Hands out copies; what is saved has to be the shards that train."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_state_dict_post_hook(self._half)

    @staticmethod
    def _half(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in ("weight", "bias"):
            state[prefix + name] = state[prefix + name].half()


def halving(rank: int, world_size: int, directory: str, sharded: bool) -> Any:
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        found = nn.Sequential(Halves(5, 3), nn.Linear(3, 1))
        return fully_shard(found) if sharded else DistributedDataParallel(found)

    wrapped, fresh = build(1), build(2)
    with Checkpointer(directory, {"model": wrapped}) as checkpointer:
        checkpointer.save(1).result(60)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.add_(1)
        checkpointer.save(2).result(60)
    with Checkpointer(directory, {"model": fresh}, read_only=True) as checkpointer:
        checkpointer.restore()
    return equal(*[[plain(p).detach() for p in one.parameters()] for one in (fresh, wrapped)])


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_copies_that_a_hook_hands_out_are_not_what_is_saved(
    sharded: bool, world: World, tmp_path: Path
) -> None:
    assert world(2).run(halving, str(tmp_path), sharded) == [True] * 2


def gathering(rank: int, world_size: int, directory: str) -> Any:
    def gather(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name, tensor in list(state.items()):
            state[name] = plain(tensor)

    def build(seed: int) -> Any:
        found = fsdp2(seed)
        found.register_state_dict_post_hook(gather)
        return found

    wrapped, fresh = build(1), build(2)
    with Checkpointer(directory, {"model": wrapped}) as checkpointer:
        checkpointer.save(1).result(60)
        record = checkpointer.save(2).result(60)
        manifest = json.loads(Path(directory, record.id, "manifest.json").read_bytes())
        stored = {name for name in manifest["tensors"] if name.startswith("model.")}
    with Checkpointer(directory, {"model": fresh}, read_only=True) as checkpointer:
        checkpointer.restore()
    return stored, equal(*[[plain(p).detach() for p in one.parameters()] for one in (fresh, wrapped)])


def test_a_hook_may_gather_shards_which_are_stored_once(world: World, tmp_path: Path) -> None:
    """All ranks ask for state_dict() at one moment: its collectives would wait for each other otherwise."""
    for names, same in world(2).run(gathering, str(tmp_path)):
        assert same
        assert names == {f"model.{name}" for name in model(1).state_dict()}


def gathering_alone(rank: int, world_size: int, directory: str, walked: bool) -> Any:
    found = fsdp2(1)

    def gather(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for tensor in state.values():
            plain(tensor)

    found.register_state_dict_post_hook(gather)
    with Checkpointer(directory, {"model": found}, timeout_secs=2) as checkpointer:
        if walked:  # by a save of all ranks; before the first one nothing is known but the module itself
            assert checkpointer.save(0).result(60) is not None
        calls = [lambda: checkpointer.save(1).result(), checkpointer.prepare, checkpointer.restore]
        alone = []
        for call in calls:
            alone.append(outcome(call) if rank == 0 else "")
            dist.barrier()
        done = checkpointer.save(2).result(60) is not None
        return alone, done and checkpointer.restore() is not None


@pytest.mark.parametrize("walked", [False, True], ids=["before the first save", "after it"])
def test_a_rank_alone_is_not_left_in_the_collectives_of_a_hook(
    walked: bool, world: World, tmp_path: Path
) -> None:
    (alone, zero), (_, one) = world(2).run(gathering_alone, str(tmp_path), walked)
    calls = ("the save of step 1", "prepare()", "the restore of 'latest'")
    for words, call in zip(alone, calls, strict=True):
        assert f"rank 1 did not report within 2 s in {call}" in words
    assert zero
    assert one


def evaluating(rank: int, world_size: int, directory: str) -> tuple[bool, int]:
    wrapped = fully_shard(model(1))
    wrapped(torch.ones(2, 6)).sum().backward()
    with Checkpointer(directory, {"model": wrapped}) as checkpointer:
        checkpointer.save(1).result(60)
        capture = checkpointer._saver.capture  # type: ignore[union-attr]
        before = capture._fixed.generation
        with torch.no_grad():
            wrapped(torch.ones(2, 6))
        unsharded = any(not isinstance(parameter, DTensor) for parameter in wrapped.parameters())
        checkpointer.save(2).result(60)
        return unsharded, capture._fixed.generation - before


def test_an_evaluation_does_not_have_the_model_walked_anew(world: World, tmp_path: Path) -> None:
    """It leaves FSDP2's root unsharded, which is no change: the shards are where they were."""
    assert world(2).run(evaluating, str(tmp_path)) == [(True, 0)] * 2


def averaging(rank: int, world_size: int, directory: str) -> Any:
    wrapped = ddp(1)
    average = AveragedModel(wrapped, use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            for parameter in wrapped.parameters():
                parameter.add_(1)
        average.update_parameters(wrapped)
    with Checkpointer(directory, {"model": wrapped, "average": average}) as checkpointer:
        checkpointer.save(1).result(60)
    state = {"model": bare(2), "average": AveragedModel(bare(2), use_buffers=True)}
    with Checkpointer(directory, state, read_only=True) as checkpointer:
        checkpointer.restore()
    found, expected = ([t.detach() for t in a.parameters()] for a in (state["average"], average))
    return int(state["average"].n_averaged), equal(found, expected)


def test_an_average_of_a_ddp_model_is_restored_over_a_bare_one(world: World, tmp_path: Path) -> None:
    assert world(2).run(averaging, str(tmp_path)) == [(3, True)] * 2


def flattened(rank: int, world_size: int, directory: str) -> Any:
    flat = FullyShardedDataParallel(model(1), device_id=torch.device("cpu"))
    wrapped = nn.Sequential(flat, nn.Linear(3, 1))
    with Checkpointer(directory, {"model": wrapped}) as checkpointer:
        why = outcome(lambda: checkpointer.save(1).result(60))
        dist.barrier()
        return why, [item.status for item in checkpointer.list()]


def test_fsdp1_is_refused_in_words(world: World, tmp_path: Path) -> None:
    for why, found in world(2).run(flattened, str(tmp_path)):
        assert "model.0 is a FullyShardedDataParallel (FSDP1)" in why
        assert "fully_shard" in why
        assert "committed" not in found


def measuring(rank: int, world_size: int, directory: str, own: bool) -> Any:
    import torchmetrics

    def build() -> Any:
        found = [torchmetrics.MeanMetric()] + ([torchmetrics.CatMetric()] if own else [])
        return torchmetrics.MetricCollection(found)

    metrics, fresh = build(), build()
    per_rank = ("metrics",) if own else ()
    with Checkpointer(directory, {"metrics": metrics}, per_rank=per_rank) as checkpointer:
        checkpointer.save(1).result(60)
        for _ in range(1 + rank if own else 2):
            metrics.update(torch.tensor([1.0 + rank]))
        checkpointer.save(2).result(60)
    with Checkpointer(directory, {"metrics": fresh}, per_rank=per_rank, read_only=True) as checkpointer:
        checkpointer.restore()
    pairs = zip(metrics.values(), fresh.values(), strict=True)
    return [repr(a.metric_state) == repr(b.metric_state) for a, b in pairs]


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per_rank"])
def test_metrics_come_back_to_each_rank(own: bool, world: World, tmp_path: Path) -> None:
    """Every rank has seen other batches. Lists may differ in length, which per_rank allows."""
    pytest.importorskip("torchmetrics")
    for found in world(2).run(measuring, str(tmp_path), own):
        assert found == [True] * (1 + own)
