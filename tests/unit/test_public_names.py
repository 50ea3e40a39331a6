"""The exact public names of `engine`: adding one is a decision, not an accident."""

from __future__ import annotations

import inspect
import subprocess
import sys

import engine
from engine import errors
from engine.errors import HoldfastError

OTHERS = {
    "CheckpointRecord",
    "Checkpointer",
    "Checks",
    "FailurePolicy",
    "Listed",
    "MirrorOptions",
    "ReshardableLoader",
    "Retention",
    "SaveHandle",
    "StopSignals",
    "StorageOptions",
}
ERRORS = {
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, HoldfastError)
}
NAMES = OTHERS | ERRORS

CHECKPOINTER = {
    "close",
    "failed_saves",
    "guard",
    "last_committed",
    "list",
    "poll",
    "prepare",
    "read",
    "restore",
    "save",
    "wait",
}


def public(names: list[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def test_engine_exports_exactly_these() -> None:
    assert set(engine.__all__) == NAMES
    for name in NAMES:
        assert getattr(engine, name).__name__ == name


def test_star_import_gives_exactly_these() -> None:
    code = (
        "before = set(globals())\nfrom engine import *\nprint(*sorted(set(globals()) - before - {'before'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert set(ran.stdout.split()) == NAMES


def test_the_checkpointer_has_exactly_these_methods() -> None:
    assert public(dir(engine.Checkpointer)) == CHECKPOINTER


def test_the_signatures_that_loops_rely_on() -> None:
    made = inspect.signature(engine.Checkpointer).parameters
    assert list(made)[:2] == ["directory", "state"]
    assert {"per_rank", "retention", "config", "busy", "timeout_secs"} <= set(made)
    assert {"check_replicas", "check_snapshots"} <= set(made)
    save = inspect.signature(engine.Checkpointer.save).parameters
    assert list(save)[:2] == ["self", "step"]
    assert {"epoch", "tokens", "metrics", "reasons"} <= set(save)
    restore = inspect.signature(engine.Checkpointer.restore).parameters
    assert list(restore)[:2] == ["self", "selector"]
    assert restore["selector"].default == "latest"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(engine, "Manager")
