"""After a power cut at any call, on any disk state that POSIX allows, nothing reported as committed is gone
and nothing partial is listed."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

from engine.directory.listing import committed, list_checkpoints
from engine.directory.retention import Retention
from engine.directory.verify import verify_checkpoint
from engine.storage.local import LocalStorage
from tests.faults.power import Journal, make, states
from tests.faults.world import Rank, World, job


def whole(root: Path) -> set[int]:
    """Steps of everything that is listed, verified block by block."""
    storage = LocalStorage(root)
    listed = list_checkpoints(storage)
    damaged = [item for item in listed if item.status == "damaged"]
    assert not damaged, f"I2: {damaged[0].id} is listed as damaged: {damaged[0].reason}"
    records = committed(listed)
    for record in records:
        result = verify_checkpoint(storage, record.id)
        assert result.ok, f"I2: {record.id} is listed and not whole: {result.damage[0].sentence}"
    return {record.step for record in records}


def test_every_disk_state_after_every_call_of_three_saves(root: Path, covered: Callable[[int], None]) -> None:
    """Two ranks save three times on one journalled disk; retention and all. I1 and I2 on every state."""
    root.mkdir(parents=True)
    journal = Journal(str(root))
    world = World(root, 2, storage=lambda rank: LocalStorage(root, system=journal))
    marks: list[tuple[int, int]] = []
    with job(root, 2, world=world, retention=Retention(rolling=2)):
        for step in (1, 2, 3):

            def save(rank: Rank, step: int = step) -> None:
                rank.fill(step)
                rank.ckpt.save(step).result()

            world.each(save)
            # The outcome reaches rank 1 before rank 0's clean-up: by now it is reported.
            marks.append((len(journal.ops), step))
            world.settle()
    seen, count = set(), 0
    for end in range(len(journal.ops) + 1):
        reported = {step for at, step in marks if at <= end}
        for tree, contents in states(journal.ops[:end]):
            key = repr((sorted((d, sorted(n.items())) for d, n in tree.items()), sorted(contents.items())))
            if (hash(key), frozenset(reported)) in seen:
                continue
            seen.add((hash(key), frozenset(reported)))
            where = root.parent / "state"
            make(where, tree, contents)
            found = whole(where)
            kept = reported & set(sorted(reported | found)[-2:])  # retention may have taken older ones
            assert kept <= found, f"I1: after call {end} a cut loses {kept - found}"
            shutil.rmtree(where)
            count += 1
    # The states depend on how the two ranks' calls interleave (260 to 858 were seen); the calls do not.
    assert len(journal.ops) >= 113
    assert count >= len(journal.ops)
    covered(count)


def test_a_disk_that_does_not_sync_is_found_out(root: Path) -> None:
    """The instrument itself: without either kind of fsync there are states that break I1 or I2."""
    for kind in ("fsync", "fsync_dir"):
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        journal = Journal(str(root))
        storage = LocalStorage(root, system=journal)
        with job(root, 1, world=World(root, 1, storage=lambda _, storage=storage: storage)) as world:
            world.save(1)
        ops = [op for op in journal.ops if op.kind != kind]
        broken = 0
        for tree, contents in itertools.islice(states(ops), 200):
            make(root.parent / "state", tree, contents)
            try:
                broken += whole(root.parent / "state") != {1}
            except AssertionError:
                broken += 1
            shutil.rmtree(root.parent / "state")
        assert broken, kind
