"""Decides which parameters get weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's two parameter groups: tensors of two dimensions or more decay, biases and norms do not.

    Returns both groups even if one is empty: the optimizer's structure does not depend on the model.
    Call it right after building the model: after a no-grad evaluation, FSDP2's root exposes plain, whole
    tensors instead of its sharded parameters, and the optimizer would update copies.

    Args:
        model: plain, DDP or FSDP2; a DTensor counts with its global dimensions.
        weight_decay: rate for the decayed group, at least 0.

    Raises:
        ValueError: a negative rate.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, not {weight_decay}")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
