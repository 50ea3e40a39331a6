"""Objects that are no optimizers and keep some: a list of them behind one state_dict().

Such an object is handed its state by its own load_state_dict, and torch's casts moments to the dtype of their
parameter on the way. What was saved is put back in place of what was cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from engine.state.optimizer_kinds import keeps_optimizers


def put_back(entry: Any, saved: Any) -> None:
    """Give the optimizers inside of an object the saved tensors where torch has cast them."""
    if keeps_optimizers(entry):
        _walk(saved, entry.state_dict(), inside=False)


def _walk(saved: Any, live: Any, *, inside: bool) -> None:
    """inside: below the state dict of an optimizer, whose state is the live one and no copy of it."""
    if isinstance(saved, Mapping) and isinstance(live, Mapping):
        inside = inside or {"state", "param_groups"} <= saved.keys()
        for key, value in saved.items():
            now = live.get(key)
            if inside and isinstance(live, dict) and isinstance(now, torch.Tensor) and _was_cast(value, now):
                live[key] = value.to(now.device)
            else:
                _walk(value, now, inside=inside)
    elif isinstance(saved, list | tuple) and isinstance(live, list | tuple) and len(saved) == len(live):
        for value, now in zip(saved, live, strict=True):
            _walk(value, now, inside=inside)


def _was_cast(saved: Any, live: torch.Tensor) -> bool:
    if not isinstance(saved, torch.Tensor):
        return False
    return saved.dtype != live.dtype and saved.shape == live.shape and not isinstance(live, DTensor)
