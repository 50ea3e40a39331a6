"""Digests of replicated tensors, so that ranks can compare what should be equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor, Replicate

from engine.format.digest import bytes_digest
from engine.format.layout import Chunk
from engine.snapshot.captured import PER_RANK_PREFIX, Captured


def replica_digests(captured: Captured, held: Sequence[Chunk]) -> dict[str, str]:
    """The digest of every box that other ranks hold as well, by "name offsets".

    Plain tensors are replicated on all ranks, DTensors along their `Replicate` dimensions. Reads every
    byte of them: a check for debugging, not for every day.
    """
    boxes = {chunk.name: chunk for chunk in held}
    digests = {}
    for name, tensor in captured.tensors.items():
        if name not in boxes or name.startswith(f"{PER_RANK_PREFIX}."):
            continue
        if isinstance(tensor, DTensor) and not any(isinstance(p, Replicate) for p in tensor.placements):
            continue
        with torch.no_grad():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            raw = local.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digests[f"{name} {list(boxes[name].offsets)}"] = bytes_digest(memoryview(raw))  # type: ignore[arg-type]
    return digests
