"""torchdata's StatefulDataLoader in the state: the same batches follow, and the same dropout."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from engine import Checkpointer, ReshardableLoader
from engine.errors import ConfigError, StateError

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
SAMPLES, BATCH = 24, 3
PER_EPOCH = SAMPLES // BATCH


class Numbers(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


class Stream(IterableDataset[torch.Tensor]):
    """Keeps its own place, as torchdata asks of it. Two workers take turns."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        for number in range(self.at, SAMPLES // stride):
            self.at = number + 1
            yield torch.tensor([float(number * stride + first)])
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def shuffled(workers: int) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(Numbers(), batch_size=BATCH, shuffle=True, num_workers=workers)


def streamed(workers: int) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(Stream(), batch_size=BATCH, num_workers=workers)


def dealt(workers: int) -> ReshardableLoader:
    return rank_loader(0, 1, BATCH, workers)


def rank_loader(rank: int, world_size: int, batch: int, workers: int = 0) -> ReshardableLoader:
    sampler: Any = StatefulDistributedSampler(Numbers(), world_size, rank, seed=5)
    return ReshardableLoader(StatefulDataLoader(Numbers(), batch, sampler=sampler, num_workers=workers))


class Training:
    """A run with dropout, as a new process would make it: the global generator starts somewhere else."""

    def __init__(self, folder: Path, loader: Any, seed: int, **more: Any) -> None:
        torch.manual_seed(seed)
        self.loader = loader
        self.seen: list[list[float]] = []
        self.counters = {"step": 0}
        self.model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        state = {"model": self.model, "optimizer": self.optimizer, "loader": loader, "n": self.counters}
        state.update(more)
        self.ckpt = Checkpointer(folder, state, per_rank=("loader",))

    def run(self, until: int, save_at: int | None = None) -> None:
        if save_at == 0:
            self.ckpt.save(0).result(60.0)
        while self.counters["step"] < until:
            for batch in self.loader:
                self.seen.append(batch.flatten().tolist())
                self.model(batch).sum().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.counters["step"] += 1
                if self.counters["step"] == save_at:
                    self.ckpt.save(save_at).result(60.0)
                if self.counters["step"] == until:
                    break


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [shuffled, streamed, dealt], ids=["shuffled", "streamed", "dealt"])
@pytest.mark.parametrize("save_at", [0, 3, PER_EPOCH])
def test_a_run_that_is_carried_on_sees_and_draws_the_same(
    tmp_path: Path, make: Callable[[int], Any], workers: int, save_at: int
) -> None:
    """Before the first batch, within an epoch, and with the last batch of one."""
    until = PER_EPOCH + 3
    first = Training(tmp_path, make(workers), 1)
    first.run(until, save_at)
    first.ckpt.close()
    second = Training(tmp_path, make(workers), 2)
    record = second.ckpt.restore()
    assert record is not None
    assert record.step == save_at
    second.run(until)
    second.ckpt.close()
    assert second.seen == first.seen[save_at:]
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))


@pytest.mark.parametrize("save_at", [0, 3, PER_EPOCH])
def test_a_generator_that_the_loader_was_given_is_an_entry_beside_it(tmp_path: Path, save_at: int) -> None:
    """torchdata keeps what the sampler has drawn of it, and not what the iterator draws for its workers."""

    def training(seed: int) -> Training:
        order = torch.Generator().manual_seed(7)
        loader = StatefulDataLoader(Numbers(), batch_size=BATCH, shuffle=True, generator=order)
        return Training(tmp_path, loader, seed, order=order)

    first = training(1)
    first.run(2 * PER_EPOCH + 2, save_at)
    first.ckpt.close()
    second = training(2)
    assert second.ckpt.restore() is not None
    second.run(2 * PER_EPOCH + 2)
    second.ckpt.close()
    assert second.seen == first.seen[save_at:]


def test_a_save_before_the_first_batch_changes_nothing(tmp_path: Path) -> None:
    """The loader makes its iterator for it, and draws from the global generator, as it would have later."""

    def train(save_at: int | None) -> Training:
        torch.manual_seed(3)
        made = Training(tmp_path / str(save_at), shuffled(0), 1)
        made.run(PER_EPOCH + 2, save_at)
        made.ckpt.close()
        return made

    saved, unsaved = train(0), train(None)
    assert unsaved.seen == saved.seen
    assert all(map(torch.equal, unsaved.model.state_dict().values(), saved.model.state_dict().values()))


def test_workers_end_when_they_are_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an iterator that the collector finds in a reference cycle are killed, after 5 s each."""
    # More than 5 s: on a busy machine a worker may take a while to end.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 30.0)
    before = set(multiprocessing.active_children())
    training = Training(tmp_path, shuffled(2), 1)
    training.run(2, save_at=1)
    training.ckpt.close()
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    del training
    gc.collect()
    assert [worker.exitcode for worker in workers] == [0, 0]


class Draws:
    """An object whose `state_dict` draws from the global generator."""

    def state_dict(self) -> dict[str, float]:
        return {"drawn": float(torch.rand(()))}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


def test_saving_draws_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"draws": Draws()}) as checkpointer:
        before = torch.get_rng_state()
        checkpointer.save(1).result(60.0)
        assert torch.equal(torch.get_rng_state(), before)


def take(loaders: list[ReshardableLoader], steps: int) -> list[list[float]]:
    """The global batches of so many steps, sorted: the ranks' shares differ in size."""
    iterators = [iter(loader) for loader in loaders]
    return [sorted(x for it in iterators for x in next(it).flatten().tolist()) for _ in range(steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_another_world_size_goes_on_with_the_same_global_batches(workers: int) -> None:
    """2 ranks with batches of 3, then 3 ranks of 2, then 1 of 6."""
    undisturbed = [rank_loader(rank, 2, 3) for rank in range(2)]
    for loader in undisturbed:
        loader.sampler.set_epoch(4)
    expected = take(undisturbed, 4)
    pair = [rank_loader(rank, 2, 3, workers) for rank in range(2)]
    for loader in pair:
        loader.sampler.set_epoch(4)
    assert take(pair, 1) == expected[:1]
    three = [rank_loader(rank, 3, 2, workers) for rank in range(3)]
    states = [loader.state_dict() for loader in pair]
    for rank, loader in enumerate(three):
        loader.load_state_dict(loader.reshard(states, rank, 3))
    assert take(three, 2) == expected[1:3]
    (one,) = [rank_loader(0, 1, 6, workers)]
    one.load_state_dict(one.reshard([loader.state_dict() for loader in three], 0, 1))
    assert take([one], 1) == expected[3:]


def test_after_a_whole_epoch_the_next_one_begins_anywhere() -> None:
    pair = [rank_loader(rank, 2, 3) for rank in range(2)]
    for loader in pair:
        assert len(list(loader)) == len(loader) == 4
    one = rank_loader(0, 1, 6)
    one.load_state_dict(one.reshard([loader.state_dict() for loader in pair], 0, 1))
    assert sorted(x for batch in one for x in batch.flatten().tolist()) == list(range(SAMPLES))


def test_a_place_that_does_not_divide_is_refused() -> None:
    pair = [rank_loader(rank, 2, 3) for rank in range(2)]
    take(pair, 1)
    states = [loader.state_dict() for loader in pair]
    with pytest.raises(StateError, match=r"2 ranks had taken 6 samples .* 6 = 4 x 1 \+ 2"):
        pair[0].reshard(states, 0, 4)
    states[1]["taken"] += 3
    with pytest.raises(StateError, match=r"stopped at different positions \(\[3, 6\]"):
        pair[0].reshard(states, 0, 3)


def test_a_loader_that_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="DataLoader has no state_dict"):
        ReshardableLoader(DataLoader(Numbers()))
    with pytest.raises(ConfigError, match=r"sampler is a RandomSampler.*StatefulDistributedSampler"):
        ReshardableLoader(StatefulDataLoader(Numbers(), shuffle=True))
    sampler: Any = StatefulDistributedSampler(Numbers(), 1, 0)
    with pytest.raises(ConfigError, match="no batch_size"):
        ReshardableLoader(StatefulDataLoader(Numbers(), batch_size=None, sampler=sampler))
