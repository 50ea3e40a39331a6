"""Every operation of a retention pass fails once, or is the last that works; several have expired."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.directory.marks import hold, release
from engine.errors import HoldfastError
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps, engine_threads, leftovers, open_files
from tests.faults.layer import STORAGE_FAULTS, SYSTEM_FAULTS, lost, swallowed
from tests.faults.world import Rank, World, job

SURPLUS = 3
DISK_FAULTS = {**SYSTEM_FAULTS, "lost": lost}
ASKED_FAULTS = {**STORAGE_FAULTS, "lost": swallowed}
"""Beside what fails, what reports success and does nothing."""
QUICK = ("ENOSPC", "EINTR", "503", "answer lost")
"""What `make test` sweeps, beside the two that last; the others are for `make test-all`."""


def save_well(world: World, step: int) -> str:
    record = world.save(step)[0]
    assert not isinstance(record, BaseException), repr(record)
    world.settle()
    return record.id


def with_expired(world: World, step: int) -> int:
    """Save SURPLUS checkpoints that retention would remove, and two that it keeps; the newest step."""
    storage = LocalStorage(world.root)
    expired = []
    for _ in range(SURPLUS):
        step += 1
        expired.append(save_well(world, step))
        hold(storage, expired[-1])
    for _ in range(2):
        step += 1
        save_well(world, step)
    for name in expired:
        release(storage, name)
    return step


def passes() -> list[Any]:
    """Level, fault, and whether it lasts: from that operation on nothing works, as after a crash."""
    disk = [("disk", fault, False) for fault in DISK_FAULTS]
    asked = [("asked", fault, False) for fault in ASKED_FAULTS]
    once = [pytest.param(*one, marks=() if one[1] in QUICK else pytest.mark.slow) for one in disk + asked]
    return [*once, ("disk", "EIO", True), ("asked", "reset", True)]


@pytest.mark.parametrize(("level", "fault", "lasts"), passes())
def test_every_operation_of_a_retention_pass_fails_once(
    level: str, fault: str, lasts: bool, root: Path, covered: Callable[[int], None]
) -> None:
    """What is to stay stays whole, nothing is ever listed without its data, and the next pass clears up."""
    act = (DISK_FAULTS if level == "disk" else ASKED_FAULTS)[fault]

    def clean_up(rank: Rank) -> None:
        if rank.rank == 0:
            rank.ckpt._directory.delete_expired()

    with job(root, 2) as world:
        target = getattr(world.ranks[0], level)
        step = k = files = 0
        while True:
            step = with_expired(world, step)
            target.arm(k, act, sticky=lasts)
            (outcome, _) = world.each(clean_up)
            target.disarm()
            where = f"operation {k} ({target.fired[:1]})"
            assert outcome is None or isinstance(outcome, HoldfastError), f"{where}: {outcome!r}"
            listed = committed_steps(root)
            assert {step - 1, step} <= set(listed), f"I1, {where}: {listed}"
            assert {record.step for record in world.restore()} == {step}, where  # type: ignore[union-attr]
            assert [rank.shows() for rank in world.ranks] == [step, step], where
            if not target.fired:
                break
            step += 1
            save_well(world, step)
            assert set(committed_steps(root)) == {step - 1, step}, f"I5, {where}"
            assert leftovers(root) == [], f"I6, {where}"
            assert engine_threads() == [], f"I6, {where}"
            files = files or open_files()
            assert open_files() <= files, f"I6, {where}"
            k += 1
    # A manifest, its directory's sync, four files and the directory, of each.
    assert k >= SURPLUS * (7 if level == "disk" else 3)
    covered(k)


THEIRS = {"NOTES.txt": b"precious", "eval/scores.json": b"{}", "shard-00000.safetensors.bak": b"older"}


@pytest.mark.parametrize(
    ("level", "fault"),
    [
        ("disk", "EIO"),
        ("asked", "answer lost"),
        ("disk", "lost"),
        ("asked", "reset"),
    ],
)
def test_whatever_fails_in_a_clean_up_peoples_files_and_arriving_copies_stay(
    level: str, fault: str, root: Path, covered: Callable[[int], None]
) -> None:
    """Each call of a pass fails once: over a checkpoint with foreign files and a link, half a copy beside."""
    act = (DISK_FAULTS if level == "disk" else ASKED_FAULTS)[fault]
    arriving = root / "step-00009999-abcdef01"
    names = {*(name.split("/")[0] for name in THEIRS), "linked"}
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "data").write_bytes(b"precious")
    with job(root, 1) as world:
        arriving.mkdir()
        (arriving / "shard-00000.json").write_bytes(b"half")
        target = getattr(world.ranks[0], level)
        step = k = 0
        fired = True
        while fired:
            save_well(world, step := step + 1)
            id = save_well(world, step := step + 1)
            hold(LocalStorage(root), id)
            for _ in range(2):
                save_well(world, step := step + 1)
            for name, raw in THEIRS.items():
                (root / id / name).parent.mkdir(exist_ok=True)
                (root / id / name).write_bytes(raw)
            (root / id / "linked").symlink_to(outside)
            release(LocalStorage(root), id)
            target.arm(k, act)
            world.each(lambda rank: rank.ckpt._directory.delete_expired())
            target.disarm()
            fired = bool(target.fired)
            save_well(world, step := step + 1)
            where = f"operation {k} ({target.fired[:1]})"
            assert {path.name for path in (root / id).iterdir()} == names, where
            assert all((root / id / name).read_bytes() == raw for name, raw in THEIRS.items()), where
            assert (outside / "data").read_bytes() == b"precious", where
            assert (arriving / "shard-00000.json").read_bytes() == b"half", where
            shutil.rmtree(root / id)  # each pass looks at it
            k += 1
    assert k >= 6
    covered(k - 1)
