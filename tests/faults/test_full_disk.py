"""Full disks: said before anything is written; survived by deleting expired checkpoints, and nothing else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.directory.marks import hold, release
from engine.errors import SaveFailedError, StorageFullError
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps, leftovers
from tests.faults.layer import Act, fails_with
from tests.faults.world import World, job


def save_well(world: World, *steps: int) -> None:
    for step in steps:
        for outcome in world.save(step):
            assert not isinstance(outcome, BaseException), repr(outcome)
        world.settle()


def full_until_something_goes(root: Path, at_least: int) -> Act:
    """No space for shards for as long as that many checkpoints are there."""

    def act(name: str, real: Callable[[], Any]) -> Any:
        if name == "write_shard" and len(list(root.glob("step-*/manifest.json"))) >= at_least:
            raise StorageFullError("injected: no space")
        return real()

    return act


@pytest.mark.parametrize("faulty", [0, 1])
def test_expired_ones_are_deleted_and_the_save_is_tried_once_more(faulty: int, root: Path) -> None:
    storage = LocalStorage(root)
    with job(root, 2) as world:
        save_well(world, 1)
        hold(storage, committed_steps(root)[1])
        save_well(world, 2, 3)
        release(storage, committed_steps(root)[1])
        world.ranks[faulty].asked.arm(0, full_until_something_goes(root, 3), sticky=True)
        save_well(world, 4)
        assert set(committed_steps(root)) == {3, 4}
        assert leftovers(root) == []
        assert [key for key in world.store.keys if "again" in key] == []


@pytest.mark.parametrize("faulty", [0, 1])
def test_nothing_committed_is_deleted_when_nothing_has_expired(faulty: int, root: Path) -> None:
    with job(root, 2) as world:
        save_well(world, 1, 2)
        world.ranks[faulty].asked.arm(0, full_until_something_goes(root, 1), sticky=True)
        for outcome in world.save(3):
            assert isinstance(outcome, SaveFailedError)
            assert f"rank {faulty}: StorageFullError" in str(outcome)
        world.settle()
        assert set(committed_steps(root)) == {1, 2}
        assert leftovers(root) == []


def test_a_held_checkpoint_does_not_give_way(root: Path) -> None:
    with job(root, 2) as world:
        save_well(world, 1)
        hold(LocalStorage(root), committed_steps(root)[1])
        save_well(world, 2, 3)
        world.ranks[0].asked.arm(0, full_until_something_goes(root, 3), sticky=True)
        assert all(isinstance(outcome, SaveFailedError) for outcome in world.save(4))
        world.settle()
        assert set(committed_steps(root)) == {1, 2, 3}


def test_the_second_failure_is_the_answer(root: Path) -> None:
    """Room was made and did not suffice: no third attempt, and nothing else is deleted."""
    storage = LocalStorage(root)
    with job(root, 2) as world:
        save_well(world, 1)
        hold(storage, committed_steps(root)[1])
        save_well(world, 2, 3)
        release(storage, committed_steps(root)[1])
        world.ranks[1].asked.arm(0, full_until_something_goes(root, 0), sticky=True)
        assert all(isinstance(outcome, SaveFailedError) for outcome in world.save(4))
        world.settle()
        assert world.ranks[1].asked.fired.count("write_shard") == 2
        assert set(committed_steps(root)) == {2, 3}
        assert leftovers(root) == []


def test_too_little_space_is_said_with_figures_before_anything_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with job(root, 1) as world:
        save_well(world, 1)
        monkeypatch.setattr(LocalStorage, "free_bytes", lambda self: 1234)
        world.ranks[0].disk.arm(10**6, fails_with(errno.EIO))
        (outcome,) = world.save(2)
        assert isinstance(outcome, SaveFailedError)
        assert "1,234 bytes free" in str(outcome)
        assert "takes 1" in str(outcome)
        assert "create" not in world.ranks[0].disk.names
        monkeypatch.undo()
        assert set(committed_steps(root)) == {1}


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_real_full_file_system(tmp_path: Path) -> None:
    """tmpfs of 1 MiB: three saves of a third of it fit, the fourth does not, and nothing is lost."""
    mount = tmp_path / "small"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {mount} 2>/dev/null"):
        pytest.skip("mounting is not permitted here")
    try:
        with job(mount / "c", 1, retention=None) as world:
            outcomes = [world.save(step)[0] for step in range(1, 6)]
            good = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
            bad = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
            assert good
            assert all("free" in str(error) for error in bad)
            assert bad
            world.settle()
            assert len(committed_steps(mount / "c")) == len(good)
            assert leftovers(mount / "c") == []
    finally:
        os.system(f"umount {mount}")
