"""What must hold after any fault. I1 to I6 of docs/guarantees.md, as checks of a directory and a process."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Collection
from pathlib import Path

from engine.directory.listing import list_checkpoints
from engine.directory.verify import verify_checkpoint
from engine.save.staging_buffer import StagingBuffer
from engine.storage.local import LocalStorage


def committed_steps(root: Path) -> dict[int, str]:
    """step -> id of everything that is listed as committed, every block of it verified (I2)."""
    storage = LocalStorage(root)
    found = {}
    for item in list_checkpoints(storage):
        assert item.status != "damaged", f"{item.id}: {item.reason}"
        if item.status != "committed":
            continue
        assert item.record is not None
        result = verify_checkpoint(storage, item.id)
        assert result.ok, f"{item.id} is listed and not whole: {result.damage}"
        found[item.record.step] = item.id
    return found


def leftovers(root: Path) -> list[str]:
    """Everything in the directory that is neither part of a committed checkpoint nor the lease (I6)."""
    stray = []
    for folder in root.iterdir():
        if folder.is_dir() and (folder / "manifest.json").exists():
            stray += [str(path.relative_to(root)) for path in folder.iterdir() if path.suffix == ".tmp"]
        elif not folder.name.startswith("lease-") or folder.suffix == ".tmp":
            stray.append(folder.name)
    return sorted(stray)


def open_files() -> int:
    """How many descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))


def engine_threads(but: Collection[str] = ("holdfast-lease",)) -> list[str]:
    """Names of the engine's living threads."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("holdfast") and name not in but]


def living_staging_buffers() -> int:
    """How many snapshot buffers this process holds: one a saving rank, whatever has failed before (I6)."""
    gc.collect()
    return sum(isinstance(thing, StagingBuffer) for thing in gc.get_objects())


def resident_bytes() -> int:
    """Memory that this process occupies."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
