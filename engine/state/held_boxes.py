"""Which boxes of which global tensors this rank holds, as DCP's save planner says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from engine.errors import UnsavableValueError
from engine.format.layout import Chunk, check_tensor
from engine.state.box_tensors import boxes_of, carries_boxes, global_shape
from engine.state.savable import check_savable
from engine.state.torch_dtypes import from_torch


@dataclass(frozen=True, slots=True)
class Held:
    """One box of a global tensor and the local tensor, of the box's sizes, that holds its elements."""

    chunk: Chunk
    tensor: torch.Tensor


def held_chunks(tensors: Mapping[str, torch.Tensor]) -> list[Held]:
    """The boxes that this rank holds of each named tensor, plain or DTensor, in planner order.

    A tensor may have several boxes (`engine.state.box_tensors`) or none (a DTensor whose mesh leaves this
    rank out). No collective.
    Raises: UnsavableValueError naming a tensor that safetensors cannot hold.
    """
    for name, tensor in tensors.items():
        _check(name, tensor)
    carriers = {name: tensor for name, tensor in tensors.items() if carries_boxes(tensor)}
    # Replicated tensors are divided over their holders later, so every rank plans as the coordinator
    # would: all that it holds.
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        planner.set_up_planner(
            {name: tensor for name, tensor in tensors.items() if name not in carriers}, is_coordinator=True
        )
        plan = planner.create_local_plan()
        held = []
        for item in plan.items:
            data = item.tensor_data
            assert data is not None, f"{item.index.fqn} is not a tensor"
            chunk = Chunk(
                name=item.index.fqn,
                dtype=from_torch(data.properties.dtype, item.index.fqn),
                shape=tuple(data.size),
                offsets=tuple(data.chunk.offsets),
                sizes=tuple(data.chunk.sizes),
            )
            held.append(Held(chunk, planner.lookup_object(item.index).detach()))
        for name, tensor in carriers.items():
            dtype, shape = from_torch(tensor.dtype, name), global_shape(tensor)
            held += [
                Held(Chunk(name, dtype, shape, box.offsets, box.sizes), box.tensor)
                for box in boxes_of(tensor, name)
            ]
    return held


def _check(name: str, tensor: torch.Tensor) -> None:
    check_savable(name, tensor)
    dtype = from_torch(tensor.dtype, name)
    try:
        check_tensor(name, dtype, global_shape(tensor))
    except ValueError as error:
        raise UnsavableValueError(f"{name[:80]}: {error}; rename its key") from error
