"""Which slices of which saved chunks fill this rank's tensors, as DCP's load planner says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from engine.dcp.dtypes import to_torch
from engine.format.layout import Chunk
from engine.format.manifest import TensorInfo


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a saved chunk and the local memory that it fills.

    `chunk` is a position in the list that was planned with; the box is
    [offsets, offsets + lengths) inside that chunk; `to` has the shape `lengths` (a scalar has none).
    """

    name: str
    chunk: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    to: torch.Tensor


def plan_slices(
    tensors: Mapping[str, torch.Tensor],
    infos: Mapping[str, TensorInfo],
    chunks: Mapping[str, Sequence[Chunk]],
) -> list[Slice]:
    """What to read to fill `tensors` (plain or DTensor) in place. No collective.

    Args:
        tensors: destinations by name. One may have more rows than was saved: those are left as they are.
        infos: dtype and global shape of each saved tensor.
        chunks: the saved chunks of each tensor that together cover it.
    """
    metadata = Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=to_torch(infos[name].dtype)),
                # The destination's own: the planner would refuse a tensor that has grown.
                tensor.shape,
                [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in chunks[name]],
            )
            for name, tensor in tensors.items()
        }
    )
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    slices = []
    with torch.no_grad():
        planner.set_up_planner(dict(tensors), metadata, is_coordinator=False)
        for item in planner.create_local_plan().items:
            index = item.storage_index.index
            assert index is not None, "DCP's planner has stopped naming the saved chunk by position"
            slices.append(
                Slice(
                    item.dest_index.fqn,
                    index,
                    tuple(item.storage_offsets),
                    tuple(item.lengths),
                    planner.resolve_tensor(item).detach(),
                )
            )
    return slices
