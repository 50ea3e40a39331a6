"""Holdfast: asynchronous, sharded, verifiable checkpoints for PyTorch training.

Importing this package is cheap: each name is loaded at its first use, so programs that only list or verify
checkpoints never import torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from engine.errors import (
    AlreadyExistsError,
    ConfigError,
    CoordinationError,
    DamagedError,
    DirectoryHeldError,
    HoldfastError,
    HostilePathError,
    LateRanksError,
    LeaseLostError,
    MemoryBudgetError,
    NewerFormatError,
    NotFoundError,
    NotOursError,
    PeerFailedError,
    ReplicaMismatchError,
    RestoreFailedError,
    SaveFailedError,
    SaveStuckError,
    SelectorError,
    StateError,
    StateMismatchError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnavailableError,
    TornSnapshotError,
    UnsavableValueError,
    UnsupportedPlatformError,
)

if TYPE_CHECKING:
    from engine.checkpointer import Checkpointer
    from engine.directory.listing import Listed
    from engine.directory.record import CheckpointRecord
    from engine.directory.retention import Retention
    from engine.loaders import ReshardableLoader
    from engine.options import Checks, FailurePolicy, MirrorOptions, StorageOptions
    from engine.save.outcomes import SaveHandle
    from engine.stopping import StopSignals

if sys.platform != "linux":
    raise UnsupportedPlatformError(
        f"Holdfast runs only on Linux, because it needs O_DIRECT, /proc and Linux's mmap; "
        f"this is {sys.platform}"
    )

__all__ = [
    "AlreadyExistsError",
    "CheckpointRecord",
    "Checkpointer",
    "Checks",
    "ConfigError",
    "CoordinationError",
    "DamagedError",
    "DirectoryHeldError",
    "FailurePolicy",
    "HoldfastError",
    "HostilePathError",
    "LateRanksError",
    "LeaseLostError",
    "Listed",
    "MemoryBudgetError",
    "MirrorOptions",
    "NewerFormatError",
    "NotFoundError",
    "NotOursError",
    "PeerFailedError",
    "ReplicaMismatchError",
    "ReshardableLoader",
    "RestoreFailedError",
    "Retention",
    "SaveFailedError",
    "SaveHandle",
    "SaveStuckError",
    "SelectorError",
    "StateError",
    "StateMismatchError",
    "StopSignals",
    "StorageDeniedError",
    "StorageError",
    "StorageFullError",
    "StorageOptions",
    "StorageUnavailableError",
    "TornSnapshotError",
    "UnsavableValueError",
    "UnsupportedPlatformError",
]

_HOMES = {
    "CheckpointRecord": "engine.directory.record",
    "Checkpointer": "engine.checkpointer",
    "Checks": "engine.options",
    "FailurePolicy": "engine.options",
    "Listed": "engine.directory.listing",
    "MirrorOptions": "engine.options",
    "ReshardableLoader": "engine.loaders",
    "Retention": "engine.directory.retention",
    "SaveHandle": "engine.save.outcomes",
    "StopSignals": "engine.stopping",
    "StorageOptions": "engine.options",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
