"""Eight defects that stock checkpointing shows on the same machine, and that must not exist here.

Each was reproduced on `torch.distributed.checkpoint` of torch 2.13; the docstrings say what it does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpointer import Checkpointer
from engine.directory.listing import list_checkpoints
from engine.errors import DamagedError, SaveFailedError, StorageFullError
from engine.restore import read
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps, leftovers
from tests.faults.world import COLUMNS, ROWS, Rank, job


def test_a_no_space_in_a_writer_thread_fails_the_save(root: Path) -> None:
    """DCP returns success and commits 2 of 8 items."""

    def full(name: str, real: Callable[[], Any]) -> Any:
        if name == "pwrite":
            raise OSError(28, "No space left on device")
        return real()

    with job(root, 2) as world:
        world.ranks[1].disk.arm(0, full, sticky=True)
        for outcome in world.save(1):
            assert isinstance(outcome, SaveFailedError)
            assert "rank 1" in str(outcome)
            assert StorageFullError.__name__ in str(outcome)
        world.settle()
        assert list_checkpoints(LocalStorage(root)) == []


def test_b_one_flipped_bit_is_noticed(root: Path) -> None:
    """DCP loads the changed value without a word."""
    with job(root, 1) as world:
        (record,) = world.save(1)
        shard = root / record.id / "shard-00000.safetensors"  # type: ignore[union-attr]
        raw = bytearray(shard.read_bytes())
        raw[len(raw) // 2] ^= 0x40
        shard.write_bytes(raw)
        (outcome,) = world.restore()
        assert isinstance(outcome, DamagedError)
        assert "digest" in str(outcome)


def test_c_a_save_that_fails_before_its_commit_changes_nothing(root: Path) -> None:
    """Saving into the same directory, DCP keeps the old metadata over the new, uncommitted values."""

    def broken(name: str, real: Callable[[], Any]) -> Any:
        raise OSError(5, "died before the commit")

    with job(root, 2) as world:
        world.save(1)
        world.settle()
        world.ranks[0].disk.arm(
            0, lambda name, real: broken(name, real) if name == "link" else real(), sticky=True
        )
        assert all(isinstance(outcome, SaveFailedError) for outcome in world.save(1))
        world.settle()
        world.ranks[0].disk.disarm()
        assert [record.step for record in world.restore()] == [1, 1]  # type: ignore[union-attr]
        assert [rank.shows() for rank in world.ranks] == [1, 1]
        assert leftovers(root) == []


def test_d_no_machine_wide_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP's fsspec writer calls os.sync(), which flushes every disk of the machine."""
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("os.sync() was called"))
    with Checkpointer("memory://peer-defects/d", {"model": {"w": torch.ones(10)}}) as ckpt:
        ckpt.save(1).result()


def test_e_every_rank_gets_its_own_values_back(root: Path) -> None:
    """DCP gives all ranks the values of one of them, RNG included."""
    with job(root, 2) as world:
        world.save(4)
        world.settle()
        world.restore()
        assert [float(rank.state["mine"]["v"][0]) for rank in world.ranks] == [40.0, 41.0]


def test_e_a_value_that_should_be_the_same_and_is_not_is_an_error(root: Path) -> None:
    with job(root, 2) as world:

        def save(rank: Rank) -> None:
            rank.fill(1)
            rank.state["counter"]["step"] = rank.rank
            rank.ckpt.save(1).result()

        for outcome in world.each(save):
            assert isinstance(outcome, SaveFailedError)
            assert "counter.step differs on rank 1: 1 there, 0 on rank 0" in str(outcome)
        world.settle()
        assert committed_steps(root) == {}


def test_f_a_failure_of_the_background_writer_ends_with_that_save(root: Path) -> None:
    """Once DCP's background process has died, every later save of the run fails."""

    def boom(name: str, real: Callable[[], Any]) -> Any:
        raise RuntimeError("the writer died of something unforeseen")

    with job(root, 2) as world:
        world.ranks[0].asked.arm(1, boom)
        assert all(isinstance(outcome, SaveFailedError) for outcome in world.save(1))
        world.settle()
        world.ranks[0].asked.disarm()
        assert not any(isinstance(outcome, BaseException) for outcome in world.save(2))


def test_g_saves_in_quick_succession_do_not_deadlock(root: Path) -> None:
    """Overlapping async saves of DCP on one process group deadlock. Here one is in flight at a time."""
    with job(root, 2) as world:

        def burst(rank: Rank) -> list[int]:
            handles = []
            for step in range(1, 31):
                rank.fill(step)
                handles.append(rank.ckpt.save(step))
            return [handle.result().step for handle in handles]  # type: ignore[union-attr]

        assert world.each(burst) == [list(range(1, 31))] * 2
        world.settle()


def test_h_a_resharded_load_reads_little_more_than_it_needs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved by rows on 2 ranks, loaded on 4, DCP fetches up to 4 times the bytes that are needed."""
    stats: list[read.ReadStats] = []
    real = read.read_slices
    monkeypatch.setattr(
        "engine.restore.chosen.read_slices",
        lambda *args, **given: stats.append(real(*args, **given)) or stats[-1],
    )
    with job(root, 2, per_rank=(), check_replicas="off") as world:  # each rank's own values differ
        assert not any(isinstance(outcome, BaseException) for outcome in world.save(1))
    with job(root, 4, per_rank=(), read_only=True) as world:
        world.restore()
        for rank in world.ranks:
            assert float(rank.state["model"]["w"].sum()) == ROWS * COLUMNS
    needed = sum(stat.needed_bytes for stat in stats)
    assert len(stats) == 4
    assert sum(stat.read_bytes for stat in stats) < 2.5 * needed
