"""Values that rank 0 alone decides: saved from rank 0, whatever the others have, and restored on all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpointer import Checkpointer
from tests.support.ranks import Ranks, outcome

World = Callable[[int], Ranks]


class Trainer:
    """Rank 0 keeps a history, with tensors; the others do not even have a state to give."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.values: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


def history(length: int) -> dict[str, Any]:
    return {"best": 0.5, "losses": [torch.full((3,), float(n)) for n in range(length)], "note": "rank 0's"}


def plain(values: dict[str, Any]) -> Any:
    return {**values, "losses": [loss.tolist() for loss in values.get("losses", [])]}


def one_decides(rank: int, world_size: int, directory: str, phase: str) -> Any:
    trainer = Trainer(rank)
    log: dict[str, Any] = {"lines": ["from", "before"]} if rank == 0 else {"other": rank}
    state = {"trainer": trainer, "log": log, "values": {"t": torch.ones(4)}}
    with Checkpointer(directory, state, rank0=("trainer", "log"), timeout_secs=30) as checkpointer:
        if phase == "save":
            for step in (1, 2):  # the second one has more tensors than the first, on rank 0 only
                trainer.values = history(step) if rank == 0 else {"best": rank}
                checkpointer.save(step).result()
        record = checkpointer.restore("latest")
        assert record is not None
        dist.barrier()
        return record.step, plain(trainer.values), log


def test_rank_0s_values_are_everybodys(world: World, tmp_path: Path) -> None:
    expected = (2, plain(history(2)), {"lines": ["from", "before"]})
    assert world(2).run(one_decides, str(tmp_path), "save") == [expected] * 2
    assert world(3).run(one_decides, str(tmp_path), "restore") == [expected] * 3
    assert world(1).run(one_decides, str(tmp_path), "restore") == [expected]


def not_declared(rank: int, world_size: int, directory: str) -> Any:
    trainer = {"best": {"loss": 0.5 + rank}}
    with Checkpointer(directory, {"trainer": trainer}, timeout_secs=30) as checkpointer:
        return outcome(lambda: checkpointer.save(1).result())


def test_undeclared_ones_differ_by_key_path_and_both_values(world: World, tmp_path: Path) -> None:
    for found in world(2).run(not_declared, str(tmp_path)):
        assert "trainer.best.loss differs on rank 1: 1.5 there, 0.5 on rank 0" in found
        assert "rank0" in found


def declared_apart(rank: int, world_size: int, directory: str) -> list[str]:
    missing = {"model": {"t": torch.ones(2)}} | ({"log": {"rank": rank}} if rank else {})
    both = {"log": {"rank": rank}}
    mine = ("log",) if rank else ()
    return [
        outcome(lambda: Checkpointer(directory, missing, rank0=mine, timeout_secs=30)),
        outcome(lambda: Checkpointer(directory, both, rank0=mine, timeout_secs=30)),
        outcome(lambda: Checkpointer(directory, both, per_rank=mine, timeout_secs=30)),
        outcome(lambda: Checkpointer(directory, both, read_only=rank == 1, timeout_secs=30)),
    ]


def test_a_key_that_ranks_declare_differently_is_refused(world: World, tmp_path: Path) -> None:
    for missing, rank0, per_rank, read_only in world(2).run(declared_apart, str(tmp_path)):
        assert "rank 0 does not have it" in missing
        assert "rank 1 in rank0" in rank0
        assert "rank 1 in per_rank" in per_rank
        assert "read_only is True on rank 1 and False on rank 0" in read_only
        kinds = {found.partition(":")[0] for found in (missing, rank0, per_rank, read_only)}
        assert kinds == {"ConfigError"}
