"""The rows of both benchmarks by name, in the order of the tables. A mode is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

NONE = "none"
"""The row that saves nothing: all others are compared with it."""
HOLDFAST = "holdfast"
FLUSHED = " + fsync"
"""The end of a row's name: a mode that is measured a second time with a flush."""

SAVE_REFERENCE = "dcp.async_save"
"""What the ratios of saves refer to: torch's own asynchronous save with its defaults."""
LOAD_REFERENCE = "dcp.load"
"""What the ratios of restores refer to: torch's own load of its own checkpoint."""

_SAVES: Mapping[str, tuple[str, str]] = {
    "torch.save": ("torch_save", "TorchSave"),
    "dcp.save": ("dcp", "DcpSave"),
    SAVE_REFERENCE: ("dcp", "DcpAsyncSave"),
    "dcp.async_save+stager": ("dcp", "DcpAsyncReused"),
    "dcp.async_save+process": ("dcp", "DcpAsyncProcess"),
    "torch_checkpointing": ("libraries", "TorchCheckpointing"),
    "torchsnapshot": ("libraries", "TorchSnapshot"),
    HOLDFAST: ("holdfast", "Holdfast"),
}
_LOADS: Mapping[str, tuple[str, str]] = {
    HOLDFAST: ("holdfast", "Holdfast"),
    LOAD_REFERENCE: ("dcp", "DcpSave"),
    "HuggingFaceStorageReader": ("holdfast", "StockReader"),
    "torch_checkpointing": ("libraries", "TorchCheckpointing"),
    "torch.load": ("torch_save", "TorchSave"),
}

SAVES, LOADS = tuple(_SAVES), tuple(_LOADS)


def mode_class(row: str) -> Any:
    """The class behind a row that saves or restores. Raises whatever its import raises."""
    module, name = {**_SAVES, **_LOADS}[row]
    return getattr(importlib.import_module(f"bench.cases.modes.{module}"), name)
