"""The bytes of a tensor, as a tensor."""

from __future__ import annotations

import torch


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor in the order of its elements, in the same memory.

    Not `view(-1)` alone: torch calls a tensor of one element contiguous whatever its stride is, and
    then refuses to view it as bytes.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
