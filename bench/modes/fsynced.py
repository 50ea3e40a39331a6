"""A mode that does not flush what it wrote, with the flush that makes it comparable."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from bench.modes.base import Durability, Mode, Save


def save_and_flush(mode: Mode, number: int, flush: Callable[[Path], None] | None = None) -> Save:
    """Save, and flush when that is done; the save ends with the flush.

    Rank 0 flushes for all: when its own save is over, every rank has written. It does so where the mode
    itself does its work, on the training thread or beside it.
    """
    flush = flush or flush_tree
    inner = mode.save(number)
    if mode.context.rank != 0:
        return inner
    outer = Save(inner.path)

    def finish(timeout_secs: float) -> None:
        try:
            inner.wait(timeout_secs)
            outer.causes, outer.path = inner.causes, inner.path
            if inner.error is None:
                flush(inner.path)
        except Exception as error:
            outer.end(error)
        else:
            outer.end(inner.error)

    if inner.over:
        finish(0)
        return outer
    arguments = (mode.context.timeout_secs,)
    threading.Thread(target=finish, args=arguments, name="bench-flush", daemon=True).start()
    return outer


def flush_tree(path: Path) -> None:
    """fsync every file of a checkpoint, then every directory, deepest first, and the one that it lies in."""
    for entry in checkpoint_entries(path):
        fd = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def checkpoint_entries(path: Path) -> list[Path]:
    """What has to be flushed, in order: names are worth nothing before what they name."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    directories = [entry for entry in path.rglob("*") if entry.is_dir()]
    return [*files, *sorted(directories, key=lambda entry: -len(entry.parts)), path, path.parent]


def wants_flush(mode: Mode) -> bool:
    """Whether a mode is measured a second time with a flush."""
    return mode.durability is Durability.NOTHING
