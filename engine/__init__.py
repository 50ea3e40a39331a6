"""Holdfast: asynchronous, sharded, verifiable checkpoints for PyTorch training.

Importing this package is cheap: names are loaded when they are first used, so that programs which only list
or verify checkpoints never import torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from engine.errors import HoldfastError, UnsupportedPlatformError

if TYPE_CHECKING:
    from engine.checkpointer import Checkpointer
    from engine.directory.record import CheckpointRecord
    from engine.directory.retention import Retention
    from engine.loaders import ReshardableLoader
    from engine.save.handle import SaveHandle
    from engine.stopping import StopSignals

if sys.platform != "linux":
    raise UnsupportedPlatformError(
        f"Holdfast runs on Linux only, this is {sys.platform}: it relies on O_DIRECT, /proc and Linux's mmap"
    )

__all__ = [
    "CheckpointRecord",
    "Checkpointer",
    "HoldfastError",
    "ReshardableLoader",
    "Retention",
    "SaveHandle",
    "StopSignals",
]

_HOMES = {
    "CheckpointRecord": "engine.directory.record",
    "Checkpointer": "engine.checkpointer",
    "ReshardableLoader": "engine.loaders",
    "Retention": "engine.directory.retention",
    "SaveHandle": "engine.save.handle",
    "StopSignals": "engine.stopping",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
