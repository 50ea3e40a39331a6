"""Saves and restores of several ranks: one outcome for all, whichever rank fails, differs or is late."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from engine import Checkpointer, Retention
from engine.errors import StorageFullError
from tests.support.controlled import ControlledStorage
from tests.support.damage import flip_byte
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]
STEPS = 60.0


class Boxed:
    """An object whose state is one value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Resharding(Boxed):
    """Knows what becomes of its values at another world size."""

    def reshard(self, states: list[dict[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
        return {"value": [state["value"] for state in states][rank::world_size]}


def result(checkpointer: Checkpointer, step: int) -> Any:
    """What became of a save: the step it committed, or the error, from `save` or from the handle."""

    def work() -> int | None:
        record = checkpointer.save(step).result(STEPS)
        return record.step if record else None

    return outcome(work)


def steps(checkpointer: Checkpointer) -> list[int | None]:
    dist.barrier()
    return [item.step for item in checkpointer.list() if item.status == "committed"]


def different_json(rank: int, world_size: int, directory: str) -> list[Any]:
    loader = Boxed({"position": 7, "shards": [1, 2 if rank != 1 else 3]})
    with Checkpointer(directory, {"loader": loader, "equal": Boxed("x")}) as checkpointer:
        first = result(checkpointer, 1)
        loader.value = {"position": 7}
        return [first, result(checkpointer, 2), steps(checkpointer)]


def test_replicated_values_that_differ_are_refused_by_key_and_rank(world: World, tmp_path: Path) -> None:
    found = world(3).run(different_json, str(tmp_path))
    for first, second, committed in found:
        assert "loader.value.shards[1] differs on rank 1: 3 there, 2 on rank 0" in first
        assert "equal" not in first
        assert "per_rank" in first
        assert second == 2
        assert committed == [2]
    assert all(first.startswith("ReplicaMismatchError") for first, _, _ in found)


def different_tensors(rank: int, world_size: int, directory: str, check: bool | str) -> list[Any]:
    state = {"a": torch.ones(50), "b": torch.full((50,), float(rank))}
    with Checkpointer(directory, {"values": state}, check_replicas=check) as checkpointer:
        first = result(checkpointer, 1)
        state["b"].fill_(7)
        return [first, result(checkpointer, 2)]


@pytest.mark.parametrize("check", [True, "sampled"])
def test_replicated_tensors_are_compared(check: bool | str, world: World, tmp_path: Path) -> None:
    for first, second in world(2).run(different_tensors, str(tmp_path / str(check)), check):
        assert "values.b" in first
        assert "values.b differs between rank 0 and rank 1" in first
        assert "values.a" not in first
        assert second == 2
    assert world(2).run(different_tensors, str(tmp_path / "off"), False) == [[1, 2], [1, 2]]


def own_values(rank: int, world_size: int, directory: str, phase: str) -> Any:
    kind = Resharding if phase.startswith("reshard") else Boxed
    mine = kind({"n": rank, "t": torch.full((2 + rank,), float(rank))} if "save" in phase else None)
    with Checkpointer(directory, {"mine": mine}, per_rank=("mine",)) as checkpointer:
        if "save" in phase:
            return result(checkpointer, 1)
        answer = outcome(lambda: checkpointer.restore("latest"))
        if isinstance(answer, str):
            return answer
        values = mine.value if isinstance(mine.value, list) else [mine.value]
        return [(value["n"], value["t"].tolist()) for value in values]


def test_per_rank_values_come_back_to_their_rank(world: World, tmp_path: Path) -> None:
    world(3).run(own_values, str(tmp_path), "save")
    assert world(3).run(own_values, str(tmp_path), "restore") == [
        [(0, [0, 0])],
        [(1, [1, 1, 1])],
        [(2, [2, 2, 2, 2])],
    ]


def test_per_rank_values_are_refused_at_another_world_size(world: World, tmp_path: Path) -> None:
    world(3).run(own_values, str(tmp_path), "save")
    for answer in world(2).run(own_values, str(tmp_path), "restore"):
        assert answer.startswith("StateError: mine was saved per rank by 3 ranks")
        assert "reshard(states, rank, world_size)" in answer


def test_unless_their_object_knows_how_to_reshard(world: World, tmp_path: Path) -> None:
    world(3).run(own_values, str(tmp_path), "reshard-save")
    assert world(2).run(own_values, str(tmp_path), "reshard-restore") == [
        [(0, [0, 0]), (2, [2, 2, 2, 2])],
        [(1, [1, 1, 1])],
    ]


def with_storage(directory: str, storage: ControlledStorage) -> Callable[..., Any]:
    import engine.checkpointer as module

    real = module.open_storage
    module.open_storage = lambda *args, **kwargs: storage
    return lambda: setattr(module, "open_storage", real)


def failing_writer(rank: int, world_size: int, directory: str, culprit: int) -> list[Any]:
    storage = ControlledStorage(directory)
    restore = with_storage(directory, storage)
    values = {"n": 1, "t": torch.zeros(100_000)}
    try:
        with Checkpointer(directory, {"values": values}) as checkpointer:
            first = result(checkpointer, 1)

            def broken(path: str) -> None:
                if rank == culprit:
                    raise StorageFullError("no space is left on the device")

            storage.broken = broken
            second = result(checkpointer, 2)
            third = result(checkpointer, 3)
            dist.barrier()
            left = sorted(item.status for item in checkpointer.list())
            failed = checkpointer.failed_saves
            storage.broken = lambda path: None
            fourth = result(checkpointer, 4)
            return [first, second, third, left, failed, fourth, steps(checkpointer)]
    finally:
        restore()


@pytest.mark.parametrize("culprit", [0, 1])
def test_one_ranks_writer_fails_and_every_rank_gets_the_cause(
    culprit: int, world: World, tmp_path: Path
) -> None:
    for first, second, third, left, failed, fourth, committed in world(2).run(
        failing_writer, str(tmp_path), culprit
    ):
        assert first == 1
        for text in (second, third):
            assert text.startswith("SaveFailedError")
            assert f"rank {culprit}: StorageFullError: no space is left" in text
        assert left == ["committed"], "the failed attempts are gone, the older checkpoint stays"
        assert failed == 2
        assert fourth == 4
        assert committed == [1, 4]


def unsavable(rank: int, world_size: int, directory: str, culprit: int) -> list[Any]:
    loader = Boxed(1)
    with Checkpointer(directory, {"loader": loader}) as checkpointer:
        first = result(checkpointer, 1)
        loader.value = object() if rank == culprit else 1
        second = result(checkpointer, 2)
        loader.value = 1
        third = result(checkpointer, 3)
        return [first, second, third, steps(checkpointer)]


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_one_ranks_state_cannot_be_saved(culprit: int, world: World, tmp_path: Path) -> None:
    for rank, (first, second, third, committed) in enumerate(world(3).run(unsavable, str(tmp_path), culprit)):
        assert first == 1
        assert "loader.value: a checkpoint cannot hold a builtins.object" in second
        assert second.startswith("UnsavableValueError") == (rank == culprit)
        if rank != culprit:
            assert f"rank {culprit}" in second
        assert third == 3
        assert committed == [1, 3]


def other_structure(rank: int, world_size: int, directory: str, culprit: int) -> list[Any]:
    values = {"a": torch.ones(3)}
    with Checkpointer(directory, {"values": values}) as checkpointer:
        found = [result(checkpointer, 1)]
        if rank == culprit:
            values["b"] = torch.ones(2)
        found.append(result(checkpointer, 2))
        found.append(result(checkpointer, 3))
        values["b"] = torch.ones(2)
        found.append(result(checkpointer, 4))
        fresh = {"a": torch.zeros(3), "b": torch.zeros(2)}
    with Checkpointer(directory, {"values": fresh}) as checkpointer:
        checkpointer.restore("latest")
    return [*found, fresh["b"].tolist()]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_structure_that_changes_on_one_rank_only(culprit: int, world: World, tmp_path: Path) -> None:
    """Refused every time, until all ranks have it: never copied by the plan of another structure."""
    for first, second, third, fourth, restored in world(2).run(other_structure, str(tmp_path), culprit):
        assert first == 1
        for text in (second, third):
            assert isinstance(text, str)
            assert text.startswith(("StateError", "SaveFailedError", "ReplicaMismatchError"))
        assert fourth == 4
        assert restored == [1, 1]


def little_memory(rank: int, world_size: int, directory: str, culprit: int) -> list[Any]:
    budget = 1_000_000 if rank == culprit else None
    values = {"t": torch.zeros(1_000_000)}  # 4 MB, half of it for each rank
    with Checkpointer(directory, {"values": values}, memory_budget_bytes=budget) as checkpointer:
        found = [result(checkpointer, 1), result(checkpointer, 2)]
        values["t"] = torch.zeros(10)
        return [*found, result(checkpointer, 3), steps(checkpointer)]


@pytest.mark.parametrize("culprit", [0, 1])
def test_one_rank_over_its_memory_budget(culprit: int, world: World, tmp_path: Path) -> None:
    for rank, (first, second, third, committed) in enumerate(
        world(2).run(little_memory, str(tmp_path), culprit)
    ):
        for text in (first, second):
            assert "but the budget is 1,000,000 bytes" in text
            assert text.startswith("MemoryBudgetError") == (rank == culprit)
        assert third == 3
        assert committed == [3]


def one_is_late(rank: int, world_size: int, directory: str, when: str) -> Any:
    import engine.save.job as job_module

    job_module.ACKNOWLEDGE_SECS = 0.2
    checkpointer = Checkpointer(directory, {"values": {"n": 1}}, timeout_secs=1.5)
    found = [result(checkpointer, 1)] if when == "second" else []
    if rank != 2:
        found.append(result(checkpointer, 2))
    outcome(checkpointer.close)
    return found


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_rank_that_never_saves_is_named_to_all(when: str, tmp_path: Path) -> None:
    """Before there is a plan and after: it is named in the plan's exchange, or among the receipts."""
    with Ranks(3) as ranks:
        zero, one, _ = ranks.run(one_is_late, str(tmp_path), when)
    for found in (zero, one):
        assert found[:-1] == ([1] if when == "second" else [])
        assert "rank 2 did not report within" in found[-1]
    manifests = [path.parent.name for path in tmp_path.glob("*/manifest.json")]
    assert len(manifests) == (1 if when == "second" else 0)


def restore_damaged(rank: int, world_size: int, directory: str, selector: str) -> Any:
    values = {"rows": torch.zeros(4, 100_000)}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world_size,))
    values["rows"] = distribute_tensor(values["rows"], mesh, [Shard(0)])
    with Checkpointer(directory, {"values": values}, timeout_secs=30) as checkpointer:
        if selector == "save":
            for step in (1, 2):
                values["rows"].to_local().fill_(step)
                checkpointer.save(step).result(STEPS)
            return None
        answer = outcome(lambda: checkpointer.restore(selector))  # who waited in vain says LateRanksError
        step = answer if isinstance(answer, str) else answer.step
        return step, values["rows"].to_local().unique().tolist()


@pytest.mark.parametrize("damaged_rank", [0, 1, 3])
def test_damage_that_one_rank_finds_reaches_all(damaged_rank: int, world: World, tmp_path: Path) -> None:
    """Each rank reads only its own rows: one alone can see it."""
    world(4).run(restore_damaged, str(tmp_path), "save")
    (newest,) = tmp_path.glob("step-00000002-*")
    flip_byte(newest / f"shard-{damaged_rank:05d}.safetensors", -50_000)
    for step, _ in world(4).run(restore_damaged, str(tmp_path), "step:2"):
        assert "DamagedError" in step
        assert f"shard-{damaged_rank:05d}.safetensors: block" in step
    reason = json.loads((newest / "damaged.json").read_text())["reason"]
    assert f"shard-{damaged_rank:05d}" in reason
    (newest / "damaged.json").unlink()
    assert world(4).run(restore_damaged, str(tmp_path), "latest") == [(1, [1.0])] * 4
    assert (newest / "damaged.json").exists()


def mixed_trouble(rank: int, world_size: int, directory: str) -> Any:
    """Rank 0 finds damage, rank 1's storage is out at the same time."""
    from engine.errors import StorageUnavailableError
    from engine.storage.local import LocalStorage

    with Checkpointer(directory, {"values": {"t": torch.zeros(1000)}}, timeout_secs=30) as checkpointer:
        checkpointer.save(1).result(STEPS)
        record = checkpointer.save(2).result(STEPS)
        assert record is not None
        dist.barrier()
        if rank == 0:
            flip_byte(Path(record.path) / "shard-00000.safetensors")
        dist.barrier()
        real = LocalStorage.open_reader
        if rank == 1:

            def down(storage: Any, path: str) -> Any:
                LocalStorage.open_reader = real  # type: ignore[method-assign]
                raise StorageUnavailableError("the store is down")

            LocalStorage.open_reader = down  # type: ignore[method-assign]
        answer = outcome(lambda: checkpointer.restore("latest"))
        LocalStorage.open_reader = real  # type: ignore[method-assign]
        return answer if isinstance(answer, str) else answer.step


def test_ranks_in_different_trouble_go_the_same_way(world: World, tmp_path: Path) -> None:
    answers = world(2).run(mixed_trouble, str(tmp_path))
    kinds = {str(answer).partition(":")[0] for answer in answers}
    assert len(kinds) == 1
    assert "LateRanksError" not in kinds, "nobody waits in vain"


def other_directory(rank: int, world_size: int, directory: str) -> Any:
    own = Path(directory) / f"node-{rank // 2}"
    own.mkdir(exist_ok=True)
    return outcome(lambda: Checkpointer(own, {"values": {}}, timeout_secs=2))


def test_directories_that_are_not_shared_are_found_before_the_first_step(tmp_path: Path) -> None:
    with Ranks(3) as ranks:
        answers = ranks.run(other_directory, str(tmp_path))
    for answer in answers:
        assert answer.startswith("StorageError: rank 2 does not see in")
    assert not list(tmp_path.glob("*/probe*")), "the probe is removed again"
    # Nor is the lease left behind: the next run may have the directory.
    Checkpointer(tmp_path / "node-0", {"values": {}}).close()


class Rows(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), index)


def with_workers(rank: int, world_size: int, directory: str) -> Any:
    """Data workers are forked while the staging buffer is being written."""
    storage = ControlledStorage(directory)
    restore = with_storage(directory, storage)
    values = {"t": torch.full((500_000,), 3.0)}
    try:
        with Checkpointer(directory, {"values": values}) as checkpointer:
            storage.gate.clear()
            handle = checkpointer.save(1)
            loader = DataLoader(Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork")
            seen = sum(int(batch[:, 0].sum()) for batch in loader)
            values["t"].fill_(4.0)
            storage.gate.set()
            handle.result(STEPS)
            seen += sum(int(batch[:, 0].sum()) for batch in loader)
            checkpointer.restore("latest")
        return seen, values["t"].unique().tolist()
    finally:
        restore()


def test_data_workers_may_be_forked_during_a_save(tmp_path: Path) -> None:
    with Ranks(2) as ranks:
        assert ranks.run(with_workers, str(tmp_path)) == [(2 * sum(range(40)), [3.0])] * 2


def no_collectives(rank: int, world_size: int, directory: str) -> Any:
    """Training's process group is not touched by anything after the start."""
    values = {"t": torch.ones(1000), "n": 1}
    with Checkpointer(directory, {"values": values}) as checkpointer:
        called: list[str] = []
        names = [
            name
            for name in dir(dist)
            if name.startswith(
                ("all_", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv", "isend")
            )
        ]
        names += ["monitored_barrier", "batch_isend_irecv", "new_group"]
        real = {name: getattr(dist, name) for name in names if callable(getattr(dist, name, None))}
        group = dist.group.WORLD
        before = group._get_sequence_number_for_group()
        for name in real:
            setattr(dist, name, lambda *args, _name=name, **kwargs: called.append(_name))
        try:
            found = [result(checkpointer, 1), result(checkpointer, 2)]
            values["more"] = torch.ones(3)
            found += [result(checkpointer, 3), outcome(lambda: checkpointer.restore("latest").step)]
        finally:
            for name, function in real.items():
                setattr(dist, name, function)
        return found, called, group._get_sequence_number_for_group() - before, len(real) > 10


def test_no_collective_is_ever_called(world: World, tmp_path: Path) -> None:
    assert world(2).run(no_collectives, str(tmp_path)) == [([1, 2, 3, 3], [], 0, True)] * 2


def skipping(rank: int, world_size: int, directory: str) -> Any:
    """Rank 0's writer is slow, the other's is not: rank 0 decides for both."""
    storage = ControlledStorage(directory)
    restore = with_storage(directory, storage)
    try:
        with Checkpointer(directory, {"values": {"t": torch.ones(10)}}, busy="skip") as checkpointer:
            if rank == 0:
                storage.gate.clear()
            first = checkpointer.save(1)
            if rank == 0:
                assert storage.writing.wait(STEPS)
            dist.barrier()
            second = checkpointer.save(2)
            storage.gate.set()
            found = [first.result(STEPS).step, second.skipped, second.result(0)]
            checkpointer.wait()
            dist.barrier()
            third = checkpointer.save(3)
            return [*found, third.skipped, third.result(STEPS).step, steps(checkpointer)]
    finally:
        restore()


def test_rank_0_decides_for_all_whether_a_save_is_skipped(world: World, tmp_path: Path) -> None:
    assert world(2).run(skipping, str(tmp_path)) == [[1, True, None, False, 3, [1, 3]]] * 2


def different_speed(rank: int, world_size: int, directory: str) -> Any:
    """Rank 1 writes only when rank 0's part is long done: rank 0 waits for the commit before it says go."""
    storage = ControlledStorage(directory)
    restore = with_storage(directory, storage)

    def after_rank_0(path: str) -> None:
        other = Path(directory) / path.replace("shard-00001.safetensors", "shard-00000.json")
        deadline = time.monotonic() + STEPS
        while rank == 1 and not other.exists() and time.monotonic() < deadline:
            time.sleep(0.002)

    storage.broken = after_rank_0
    try:
        with Checkpointer(directory, {"values": {"t": torch.ones(10)}}, retention=None) as checkpointer:
            handles = [checkpointer.save(step) for step in range(1, 5)]
            return [handle.result(STEPS).step for handle in handles], steps(checkpointer)
    finally:
        restore()


def test_ranks_of_different_speed(world: World, tmp_path: Path) -> None:
    assert world(2).run(different_speed, str(tmp_path)) == [([1, 2, 3, 4], [1, 2, 3, 4])] * 2


def all_records(rank: int, world_size: int, directory: str) -> Any:
    keep = Retention(rolling=2, best=0, epochs=False)
    with Checkpointer(directory, {"values": {"n": 1}}, retention=keep) as checkpointer:
        records = [checkpointer.save(step).result(STEPS) for step in range(1, 5)]
        restored = checkpointer.restore("backup")
        after = checkpointer.save(9).result(STEPS)
        checkpointer.wait()
        dist.barrier()
        last = checkpointer.last_committed
        return repr(records), repr(restored), after.parent == restored.id, last == after, steps(checkpointer)


def test_every_rank_has_the_same_records(world: World, tmp_path: Path) -> None:
    first, *others = world(3).run(all_records, str(tmp_path))
    assert others == [first, first]
    assert first[2:] == (True, True, [4, 9])


def selectors(rank: int, world_size: int, directory: str) -> list[Any]:
    """Each rank asks rank 0 for the same; a refusal reaches all in its own class."""
    with Checkpointer(directory, {"values": {"t": torch.ones(3 + (rank == 1))}}, check_replicas=False) as one:
        return [outcome(partial(one.restore, s)) for s in ("latest", "best", "step:3", "/nowhere/at/all")]


def test_refusals_reach_every_rank_in_one_class(world: World, tmp_path: Path) -> None:
    for answers in world(2).run(selectors, str(tmp_path)):
        assert answers[0] is None
        assert [text.partition(":")[0] for text in answers[1:]] == ["SelectorError"] * 3


def unlike(rank: int, world_size: int, directory: str, phase: str) -> Any:
    size = 4 if phase == "restore" and rank == 1 else 3
    values = {"entry": torch.full((size,), 5.0), "other": torch.full((2,), 5.0)}
    if phase == "save":
        values = {key: torch.ones_like(value) for key, value in values.items()}
    with Checkpointer(directory, values) as checkpointer:
        if phase == "save":
            return result(checkpointer, 1)
        return outcome(lambda: checkpointer.restore("latest")), [v.unique().tolist() for v in values.values()]


def test_a_mismatch_on_one_rank_changes_nothing_on_any(world: World, tmp_path: Path) -> None:
    world(2).run(unlike, str(tmp_path), "save")
    for answer, values in world(2).run(unlike, str(tmp_path), "restore"):
        assert answer.startswith("StateMismatchError")
        assert "entry: saved as F32 [3], here F32 [4]" in answer
        assert values == [[5.0], [5.0]]


def forgotten(rank: int, world_size: int, directory: str) -> None:
    """Rank 1 dies in mid-save; the others are told by its absence, in time."""
    import engine.save.job as job_module

    job_module.ACKNOWLEDGE_SECS = 0.2
    storage = ControlledStorage(directory)
    with_storage(directory, storage)
    checkpointer = Checkpointer(directory, {"values": {"t": torch.ones(10)}}, timeout_secs=2)
    if rank == 1:
        storage.broken = lambda path: os._exit(1)
    answer = result(checkpointer, 1)
    (Path(directory) / f"answer-{rank}").write_text(answer)


def test_a_rank_that_dies_in_mid_save(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the process has died"), Ranks(2) as ranks:
        ranks.run(forgotten, str(tmp_path))
    assert "rank 1 did not report within" in (tmp_path / "answer-0").read_text()
    assert not list(tmp_path.glob("*/manifest.json"))
    shutil.rmtree(tmp_path)
