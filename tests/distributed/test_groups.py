"""Checkpointers of some of the ranks: subgroups, short-lived groups, ranks without a Checkpointer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpointer import Checkpointer
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]
TIMEOUT_SECS = 2.0
NEAR_SECS = 15.0


def state(value: float) -> dict[str, Any]:
    return {"values": {"t": torch.full((10,), value)}}


def save_and_restore(checkpointer: Checkpointer, mine: dict[str, Any], step: int) -> tuple[Any, float]:
    record = checkpointer.save(step).result()
    assert record is not None
    expected = float(mine["values"]["t"][0])
    mine["values"]["t"].zero_()
    restored = checkpointer.restore("latest")
    assert restored is not None
    assert float(mine["values"]["t"][0]) == expected
    return restored.step, expected


def two_groups(rank: int, world_size: int, directory: str) -> Any:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = rank // 2
    mine = state(half + 1.0)
    with Checkpointer(
        f"{directory}/{half}", mine, process_group=halves[half], timeout_secs=30
    ) as checkpointer:
        place = (checkpointer.rank, checkpointer.world_size)
        found = save_and_restore(checkpointer, mine, 10 + half)
    dist.barrier()
    return place, found


def test_two_groups_of_one_job_have_a_directory_each(world: World, tmp_path: Path) -> None:
    found = world(4).run(two_groups, str(tmp_path))
    assert found == [((0, 2), (10, 1.0)), ((1, 2), (10, 1.0)), ((0, 2), (11, 2.0)), ((1, 2), (11, 2.0))]


def one_directory(rank: int, world_size: int, directory: str) -> Any:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = rank // 2
    mine = state(half + 1.0)
    started = time.monotonic()

    def work() -> Any:
        made = Checkpointer(directory, mine, process_group=halves[half], timeout_secs=TIMEOUT_SECS)
        dist.barrier(halves[half])
        with made:
            found = save_and_restore(made, mine, 1)
            time_taken = time.monotonic() - started
            dist.barrier()
            assert time_taken < NEAR_SECS
            return found

    answer = outcome(work)
    if isinstance(answer, str):
        dist.barrier()
    dist.barrier()
    return answer, time.monotonic() - started < NEAR_SECS


def test_two_groups_in_one_directory_are_refused(world: World, tmp_path: Path) -> None:
    found = world(4).run(one_directory, str(tmp_path))
    assert all(near for _, near in found)
    answers = [answer for answer, _ in found]
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]
    (refused,) = {answer for answer in answers if isinstance(answer, str)}
    assert refused.startswith("DirectoryHeldError")
    assert sum(isinstance(answer, tuple) for answer in answers) == 2


def only_some(rank: int, world_size: int, directory: str, makers: list[int]) -> Any:
    started = time.monotonic()

    def make() -> Any:
        with Checkpointer(f"{directory}/some", state(1.0), timeout_secs=TIMEOUT_SECS):
            return "made"

    answer = outcome(make) if rank in makers else None
    near = time.monotonic() - started < NEAR_SECS
    dist.barrier()
    total = torch.ones(1)
    dist.all_reduce(total)  # training's own collectives are undisturbed
    mine = state(2.0)
    with Checkpointer(f"{directory}/all", mine, timeout_secs=30) as checkpointer:
        found = save_and_restore(checkpointer, mine, 1)
    return answer, near, float(total), found


def test_a_checkpointer_that_only_some_ranks_make(world: World, tmp_path: Path) -> None:
    words = {0: "rank 1 and rank 2 did not make a Checkpointer within 2 s", 1: "rank 0 did not make its"}
    for makers in ([0], [1], [0, 1], [1, 2]):
        found = world(3).run(only_some, str(tmp_path), makers)
        assert [rest for _, *rest in found] == [[True, 3.0, (1, 2.0)]] * 3
        for rank in makers:
            answer = found[rank][0]
            assert answer.startswith("LateRanksError")
            assert "give it their process_group" in answer
            expected = words[1] if 0 not in makers else words[0] if makers == [0] else "rank 2 did not make"
            assert expected in answer
        assert not list(tmp_path.glob("some/*"))


def one_bad_state(rank: int, world_size: int, directory: str) -> Any:
    started = time.monotonic()
    bad: dict[str, Any] = {"values": {"t": torch.ones(2)}, "odd": 3 if rank == 1 else {"n": 3}}
    answer = outcome(lambda: Checkpointer(f"{directory}/bad", bad, timeout_secs=60))
    near = time.monotonic() - started < NEAR_SECS
    dist.barrier()
    mine = state(2.0)
    with Checkpointer(f"{directory}/good", mine, timeout_secs=30) as checkpointer:
        return answer, near, save_and_restore(checkpointer, mine, 1)


def test_a_state_that_one_rank_refuses_stops_all_at_once(world: World, tmp_path: Path) -> None:
    for answer, near, rest in world(2).run(one_bad_state, str(tmp_path)):
        assert answer.startswith("UnsavableValueError: the state entry 'odd' is a int")
        assert near
        assert rest == (1, 2.0)


def other_directories(rank: int, world_size: int, directory: str) -> Any:
    return outcome(lambda: Checkpointer(f"{directory}/{rank}", state(1.0), timeout_secs=TIMEOUT_SECS))


def test_ranks_with_other_directories_are_refused(world: World, tmp_path: Path) -> None:
    for answer in world(2).run(other_directories, str(tmp_path)):
        assert answer.startswith(
            f"StorageError: rank 1 does not see in {tmp_path}/1 the file that rank 0 wrote to"
        )
        assert "process_group" in answer


def groups_that_come_and_go(rank: int, world_size: int, directory: str) -> Any:
    mine = state(3.0)
    first = Checkpointer(directory, mine, timeout_secs=30)
    handle = first.save(1)
    dist.barrier()
    dist.destroy_process_group()
    record = handle.result()
    first.save(2)  # the ranks still know each other
    first.close()
    dist.init_process_group("gloo", init_method=f"file://{directory}/again", rank=rank, world_size=world_size)
    with Checkpointer(directory, mine, timeout_secs=30) as second:
        found = save_and_restore(second, mine, 3)
    dist.barrier()
    return record and record.step, found


def test_a_group_may_be_destroyed_and_made_anew(tmp_path: Path) -> None:
    with Ranks(2) as ranks:
        assert ranks.run(groups_that_come_and_go, str(tmp_path)) == [(1, (3, 3.0))] * 2
