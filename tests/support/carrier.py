"""Plain tensors with the attributes of torch 2.15's `CheckpointableTensor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Boxes = Sequence[Sequence[int]]


def carry(
    local: torch.Tensor,
    global_shape: Sequence[int],
    global_offsets: Boxes,
    local_offsets: Boxes,
    local_sizes: Boxes,
) -> torch.Tensor:
    """`local`, which from now on says which boxes of a global tensor it holds."""
    marked: Any = local
    marked.global_shape = tuple(global_shape)
    marked.global_offsets = tuple(map(tuple, global_offsets))
    marked.local_offsets = tuple(map(tuple, local_offsets))
    marked.local_sizes = tuple(map(tuple, local_sizes))
    return local


def every_nth_row(whole: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """A rank's rows of a tensor dealt out like cards: one box a row, and a row of padding at the end."""
    rows = list(range(rank, whole.shape[0], world_size))
    local = torch.cat([whole[rows], torch.full_like(whole[:1], -1)])
    rest = tuple(whole.shape[1:])
    zeros = (0,) * len(rest)
    return carry(
        local,
        whole.shape,
        [(row, *zeros) for row in rows],
        [(at, *zeros) for at in range(len(rows))],
        [(1, *rest) for _ in rows],
    )
