"""Which slices of which saved chunks fill this rank's tensors, as DCP's load planner says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from engine.format.index import ShardFile
from engine.format.layout import Chunk, PlacedChunk
from engine.format.manifest import Manifest, TensorInfo
from engine.geometry import intersect, within
from engine.restore.chunk_locations import ChunkLocation, Indexes
from engine.state.local_boxes import boxes_of, carries_boxes, global_shape
from engine.state.tensor_format import to_torch

Located = Mapping[str, Sequence[tuple[ShardFile, PlacedChunk]] | Mapping[int, tuple[ShardFile, PlacedChunk]]]
"""By tensor name, each saved chunk and its file, by the chunk's number when the reads were planned."""


@dataclass(frozen=True, slots=True)
class Slice:
    """A box of a saved chunk and the local memory that it fills.

    `chunk` is the chunk's position among the tensor's chunks; the box is [offsets, offsets + lengths) inside
    that chunk; `to` has the shape `lengths` (a scalar has none).
    """

    name: str
    chunk: int
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    to: torch.Tensor


@torch.no_grad()  # otherwise each access to a local tensor would add a node to the autograd graph
def plan_slices(
    tensors: Mapping[str, torch.Tensor],
    infos: Mapping[str, TensorInfo],
    chunks: Mapping[str, Sequence[Chunk]],
) -> list[Slice]:
    """What to read to fill `tensors` (plain, DTensor, or carriers of boxes) in place. No collective.

    Args:
        tensors: destinations by name. One may have more rows than were saved: the others keep their values.
        infos: dtype and global shape of each saved tensor.
        chunks: the saved chunks of each tensor, which together cover it.
    """
    slices = [
        # Planned without DCP: for 600 of them DCP took a sixth of the planning time of a warm restore.
        Slice(name, 0, (0,) * tensor.ndim, tuple(tensor.shape), tensor.detach())
        for name, tensor in tensors.items()
        if _is_one_chunk(tensor, chunks[name])
    ]
    shards = _Shards()
    planned = {item.name for item in slices}
    for name, tensor in tensors.items():
        found = shards.slices(name, tensor, chunks[name])
        if found is not None:
            slices += found
            planned.add(name)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in planned}
    saved = {
        name: TensorStorageMetadata(
            TensorProperties(dtype=to_torch(infos[name].dtype)),
            # The destination's shape: the planner would refuse a tensor that has grown.
            torch.Size(global_shape(tensor)),
            [_storage_metadata(chunk.offsets, chunk.sizes) for chunk in chunks[name]],
        )
        for name, tensor in tensors.items()
    }
    carriers = {name: tensor for name, tensor in tensors.items() if carries_boxes(tensor)}
    plain = {name: tensor for name, tensor in tensors.items() if name not in carriers}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    metadata = Metadata({name: saved[name] for name in plain})
    planner.set_up_planner(plain, metadata, is_coordinator=False)
    for item in planner.create_local_plan().items:
        slices.append(_slice(item, planner.resolve_tensor(item).detach()))
    for name, tensor in carriers.items():
        slices += _slices_of_boxes(name, tensor, saved[name])
    return slices


def _is_one_chunk(tensor: torch.Tensor, chunks: Sequence[Chunk]) -> bool:
    """Whether this rank has the whole tensor and one saved chunk has all of it."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not carries_boxes(tensor)
        and len(chunks) == 1
        and chunks[0].sizes == tuple(tensor.shape)
    )


class _Shards:
    """Plans DTensors as DCP would, but calls DCP once for each kind of shard.

    A model has hundreds of tensors and a dozen kinds; calling DCP for each tensor is most of the time that
    the planning of a resharding restore takes.
    """

    def __init__(self) -> None:
        self._boxes: dict[Hashable, list[ChunkStorageMetadata]] = {}

    def slices(self, name: str, tensor: torch.Tensor, chunks: Sequence[Chunk]) -> list[Slice] | None:
        """The slices for a DTensor whose local tensor is plain; None for any other, which DCP plans."""
        if type(tensor) is not DTensor or carries_boxes(tensor):
            return None
        if tensor.device_mesh.get_coordinate() is None:  # this rank is not in the mesh
            return None
        local = tensor.to_local().detach()
        if type(local) is not torch.Tensor:  # it may have boxes of its own
            return None
        boxes = self._boxes_of(tensor)
        if len(boxes) != 1 or boxes[0].sizes != local.shape:
            return None
        found = (_overlap(name, number, chunk, boxes[0], local) for number, chunk in enumerate(chunks))
        return [item for item in found if item is not None]

    def _boxes_of(self, tensor: DTensor) -> list[ChunkStorageMetadata]:
        kind = (tensor.device_mesh, tensor.placements, tensor.shape)
        if kind not in self._boxes:
            # DCP's planner calls it. For a plain local tensor it depends on nothing else; a test compares.
            self._boxes[kind] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
        return self._boxes[kind]


def _overlap(
    name: str, number: int, chunk: Chunk, box: ChunkStorageMetadata, local: torch.Tensor
) -> Slice | None:
    """The part of a saved chunk in this rank's box, whose elements are `local`; None if there is none."""
    shared = intersect(chunk, box)
    if shared is None:
        return None
    to = local
    for dim, (begin, length) in enumerate(zip(within(shared, box), shared.sizes, strict=True)):
        if length != box.sizes[dim]:
            to = to.narrow(dim, begin, length)
    return Slice(name, number, within(shared, chunk), shared.sizes, to)


def _slices_of_boxes(name: str, tensor: torch.Tensor, saved: TensorStorageMetadata) -> list[Slice]:
    boxes = boxes_of(tensor, name)
    wanted = [_storage_metadata(box.offsets, box.sizes) for box in boxes]
    slices = []
    for item in create_read_items_for_chunk_list(name, saved, wanted):
        assert item.dest_index.index is not None, "DCP has stopped naming the box by position"
        to = boxes[item.dest_index.index].tensor
        for dim, (begin, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            to = to.narrow(dim, begin, length)
        slices.append(_slice(item, to))
    return slices


def _slice(item: ReadItem, to: torch.Tensor) -> Slice:
    index = item.storage_index.index
    assert index is not None, "DCP's planner has stopped naming the saved chunk by position"
    return Slice(item.dest_index.fqn, index, tuple(item.storage_offsets), tuple(item.lengths), to)


def _storage_metadata(offsets: Sequence[int], sizes: Sequence[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def plan_reads(
    tensors: Mapping[str, torch.Tensor],
    sources: Mapping[str, str],
    manifest: Manifest,
    places: Mapping[str, list[ChunkLocation]],
    indexes: Indexes,
) -> tuple[list[Slice], Located]:
    """The slices to read, and where their chunks and digests are; reads the indexes that they need.

    Args:
        tensors: what to fill, by a name of the destination.
        sources: the saved name of each.
        places: where every saved chunk is.
    """
    held = {name: places[saved] for name, saved in sources.items()}
    slices = plan_slices(
        tensors,
        {name: manifest.tensors[saved] for name, saved in sources.items()},
        {name: [place.placed.chunk for place in found] for name, found in held.items()},
    )
    used = {(item.name, item.chunk): held[item.name][item.chunk] for item in slices}
    read = indexes.fetch({place.rank for place in used.values()})
    shards = {shard.file: shard for index in read for shard in index.files}
    found: dict[str, dict[int, tuple[ShardFile, PlacedChunk]]] = defaultdict(dict)
    for (name, number), place in used.items():
        found[name][number] = (shards[place.file], place.placed)
    return slices, found
