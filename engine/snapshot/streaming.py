"""Copies between host tensors as plain memory, past the caches.

torch's copies read the destination into the cache before they overwrite it. A snapshot is larger than any
cache and is not looked at again soon: without that, a copy takes little more than half the time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.native import kernels

Pair = tuple[torch.Tensor, torch.Tensor]
"""(destination in the arena, source) of equal shape and dtype."""

LEAST_BYTES = 64 << 10
"""Smaller tensors stay in one call of torch: naming each would cost more than its copy."""


def stream_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """Copy the large plain ones, with as many threads as torch would use. Returns what is left to copy."""
    if kernels.library is None:
        return list(pairs)
    runs, rest = [], []
    for to, source in pairs:
        if source.nbytes >= LEAST_BYTES and _plain(to) and _plain(source):
            runs.append((to.data_ptr(), source.data_ptr(), source.nbytes))
        else:
            rest.append((to, source))
    if runs:
        kernels.copy_runs(runs, torch.get_num_threads())
    return rest


def _plain(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in host memory as they read, one after the other."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
