"""Modules: their tensors are filled in place, their extra state is handed back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from engine.snapshot.state_dicts import EXTRA_STATE
from engine.snapshot.wrappers import places


def set_extra_state(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give submodules what their get_extra_state() returned, under canonical names."""
    for place in places(module):
        key = place.name + EXTRA_STATE
        # A wrapper (DDP, torch.compile) has the canonical name of what it wraps.
        has_some = type(place.module).get_extra_state is not nn.Module.get_extra_state
        if has_some and key in saved:
            place.module.set_extra_state(saved[key])
