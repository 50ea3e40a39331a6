"""`make soak`: two thousand saves of a small state with random faults and restarts. Ends by itself.

Every fault of the fault layer, on either rank, at any operation, over and over in one directory and one
process; every few dozen saves the job ends and another one takes over. The invariants are checked throughout.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from engine.directory.listing import highest_sequence, list_checkpoints
from engine.directory.verify import verify_checkpoint
from engine.errors import HoldfastError
from engine.storage.local import LocalStorage
from tests.faults.invariants import committed_steps, engine_threads, leftovers, open_files, resident_bytes
from tests.faults.layer import STORAGE_FAULTS, SYSTEM_FAULTS
from tests.faults.world import job

SAVES = 2000
MOST_SECS = 15 * 60


def soak(saves: int, most_secs: float, seed: int) -> dict[str, int]:
    """Returns how many saves were asked for, failed and committed, and how often the job was restarted."""
    dice = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="holdfast-soak-")) / "checkpoints"
    count = {"saves": 0, "failed": 0, "committed": 0, "restarts": 0, "faults": 0}
    until = time.monotonic() + most_secs
    files = memory = step = newest = 0
    try:
        while count["saves"] < saves and time.monotonic() < until:
            count["restarts"] += 1
            with job(root, 2) as world:
                restored = world.restore()
                assert newest == 0 or restored[0].step == newest, f"I1: {restored}, not {newest}"  # type: ignore[union-attr]
                for _ in range(dice.randint(10, 60)):
                    step += 1
                    rank = dice.choice(world.ranks)
                    if dice.random() < 0.5:
                        kind, target = dice.choice(sorted(SYSTEM_FAULTS)), rank.disk
                        target.arm(
                            dice.randrange(30),
                            SYSTEM_FAULTS[kind],
                            sticky=kind.startswith("E") and kind != "EINTR" and dice.random() < 0.2,
                        )
                    elif dice.random() < 0.6:
                        kind, target = dice.choice(sorted(STORAGE_FAULTS)), rank.asked
                        target.arm(dice.randrange(30), STORAGE_FAULTS[kind], sticky=dice.random() < 0.2)
                    else:
                        target = rank.disk
                    outcomes = world.save(step, metrics={"val_loss": dice.random()})
                    world.settle()
                    target.disarm()
                    count["saves"] += 1
                    count["faults"] += bool(target.fired)
                    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
                    assert len(failed) in (0, 2), f"I3: {outcomes}"
                    assert all(isinstance(error, HoldfastError) for error in failed), failed
                    count["failed" if failed else "committed"] += 1
                    listed = list_checkpoints(LocalStorage(root))
                    steps = [item.record.step for item in listed if item.record is not None]
                    assert failed or step in steps, f"I1: step {step} was reported committed"
                    newest = max(steps, default=0)
                step += 1
                assert not isinstance(world.save(step)[0], BaseException), "I5"
                world.settle()
                newest = step
                assert leftovers(root) == [], f"I6: {leftovers(root)}"
                assert newest in committed_steps(root)
            assert engine_threads(but=()) == [], "I6"
            if count["restarts"] == 5:
                files, memory = open_files(), resident_bytes()
            if files:
                assert open_files() <= files, "I6: descriptors"
                assert resident_bytes() < memory + (128 << 20), "I6: memory"
        assert highest_sequence(list_checkpoints(LocalStorage(root))) >= count["committed"]
        newest_id = committed_steps(root)[newest]
        assert verify_checkpoint(LocalStorage(root), newest_id).ok
    finally:
        shutil.rmtree(root.parent, ignore_errors=True)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=SAVES)
    parser.add_argument("--most_secs", type=float, default=MOST_SECS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    begun = time.monotonic()
    count = soak(arguments.saves, arguments.most_secs, arguments.seed)
    words = ", ".join(f"{value:,} {name}" for name, value in count.items())
    print(f"{words}; nothing lost, {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
