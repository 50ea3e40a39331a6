"""A save by a mode that flushes nothing, with the flush that makes it comparable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from bench.cases.modes.base import Mode, Save


def save_and_flush(mode: Mode, number: int, flush: Callable[[Path], None] | None = None) -> Save:
    """Save, then flush; the save ends with the flush.

    Rank 0 flushes for all: when its own save is over, every rank has written. It flushes on the thread that
    the mode itself works on: the training thread, or one beside it.
    """
    inner = mode.save(number)
    if mode.context.rank != 0:
        return inner
    outer = Save(inner.path)

    def finish(timeout_secs: float) -> None:
        inner.wait(timeout_secs)
        outer.causes, outer.path = inner.causes, inner.path
        if inner.error is not None:
            raise inner.error
        (flush or flush_tree)(inner.path)

    if inner.over:
        outer.end_after(lambda: finish(0))
    else:
        outer.end_beside(lambda: finish(mode.context.timeout_secs))
    return outer


def flush_tree(path: Path) -> None:
    """fsync every file of a checkpoint, then every directory, deepest first, then the one that holds it."""
    for entry in checkpoint_entries(path):
        fd = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def checkpoint_entries(path: Path) -> list[Path]:
    """What to flush, in order: a name is worth nothing before what it names."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file())
    directories = [entry for entry in path.rglob("*") if entry.is_dir()]
    return [*files, *sorted(directories, key=lambda entry: -len(entry.parts)), path, path.parent]
