"""The modes by name, in the order of the tables. Loading one imports what it needs, and no other does."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from bench.records import NONE

HOLDFAST = "holdfast"
REFERENCE = "dcp.async_save"
"""What ratios are taken of: torch's own asynchronous save with its defaults."""
FLUSHED = " + fsync"
"""Ends the row of a mode that is measured again with a flush."""

_CLASSES: Mapping[str, tuple[str, str]] = {
    "torch.save": ("bench.modes.torch_save", "TorchSave"),
    "dcp.save": ("bench.modes.dcp", "DcpSave"),
    REFERENCE: ("bench.modes.dcp", "DcpAsyncSave"),
    "dcp.async_save+stager": ("bench.modes.dcp", "DcpAsyncReused"),
    "dcp.async_save+process": ("bench.modes.dcp", "DcpAsyncProcess"),
    "torch_checkpointing": ("bench.modes.peers", "TorchCheckpointing"),
    "torchsnapshot": ("bench.modes.peers", "TorchSnapshot"),
    HOLDFAST: ("bench.modes.holdfast", "Holdfast"),
}

MODES = tuple(_CLASSES)


def choose(names: list[str]) -> tuple[str, ...]:
    """The modes to measure, in the order of the tables; `none` is always measured and may be named.

    Raises:
        ValueError: a name that there is not.
    """
    unknown = [name for name in names if name not in (*MODES, NONE)]
    if unknown:
        raise ValueError(f"--modes: no mode is called {', '.join(unknown)}; there are {', '.join(MODES)}")
    return tuple(name for name in MODES if name in names)


def load(name: str) -> Any:
    """The class of a mode. Raises whatever its import raises."""
    module, attribute = _CLASSES[name]
    return getattr(importlib.import_module(module), attribute)


def mode_of(row: str) -> str:
    """The mode behind a row of the tables."""
    return row.removesuffix(FLUSHED)
