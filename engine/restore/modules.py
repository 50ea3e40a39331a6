"""Modules: their tensors are filled in place, their extra state is handed back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from engine.snapshot.modules import EXTRA_STATE, canonical


def set_extra_state(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give submodules what their get_extra_state() returned, under canonical names."""
    for name, child in module.named_modules():
        prefix = canonical(module, name) if name else ""
        key = f"{prefix}.{EXTRA_STATE}" if prefix else EXTRA_STATE
        # A wrapper (DDP, torch.compile) has the canonical name of what it wraps.
        has_some = type(child).get_extra_state is not nn.Module.get_extra_state
        if has_some and key in saved:
            child.set_extra_state(saved[key])
