"""Which boxes of which global tensors this rank has in its memory.

DCP's save planner lists them for plain tensors and DTensors. A plain local tensor may also hold boxes of a
larger global one: the `CheckpointableTensor` of torch 2.15. It is recognised by its four attributes, as in
torch, so that a torch without that class works too:

    global_shape    shape of the global tensor
    global_offsets  for each box, where it begins in the global tensor
    local_offsets   for each box, where it begins in the local tensor, which may also have padding
    local_sizes     the shape of each box

A local tensor with fewer dimensions holds rows of a view that merges leading ones: a box is then a run of
its rows, in the box's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from engine.errors import UnsavableValueError
from engine.format.layout import Chunk, check_tensor
from engine.state.tensor_format import check_savable, from_torch

_FIELDS = ("global_shape", "global_offsets", "local_offsets", "local_sizes")


@dataclass(frozen=True, slots=True)
class Box:
    """The box [offsets, offsets + sizes) of a global tensor, and the view of local memory that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensor: torch.Tensor


def carries_boxes(tensor: torch.Tensor) -> bool:
    """Whether the tensor declares which boxes of a global one it holds."""
    return all(hasattr(tensor, name) for name in _FIELDS)


def global_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the global tensor behind a plain tensor, a DTensor or a carrier of boxes."""
    return tuple(map(int, _field(tensor, "global_shape") if carries_boxes(tensor) else tensor.shape))


def geometry(tensor: torch.Tensor) -> tuple[object, ...]:
    """A value that changes when a tensor's boxes do; () for a tensor that carries none."""
    return tuple(_field(tensor, name) for name in _FIELDS) if carries_boxes(tensor) else ()


def detached(tensor: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor without gradients and with its boxes, which `detach` alone would drop.

    `like`: a tensor that carries the boxes where `tensor` does not: a state dict has detached it already, or
    it is an optimizer's state of a parameter.
    """
    found = tensor.detach()
    source = tensor if carries_boxes(tensor) or like is None else like
    if carries_boxes(source) and source.shape == tensor.shape:
        for name in _FIELDS:
            setattr(found, name, _field(source, name))
    return found


def boxes_of(tensor: torch.Tensor, name: str) -> list[Box]:
    """The boxes that a tensor carries, as views of its memory.

    Raises: UnsavableValueError naming the tensor when its attributes contradict each other.
    """
    shape = global_shape(tensor)
    per_box = [_field(tensor, field) for field in _FIELDS[1:]]
    if len({len(entries) for entries in per_box}) != 1:
        raise UnsavableValueError(
            f"{name}: global_offsets, local_offsets and local_sizes describe "
            f"{', '.join(str(len(entries)) for entries in per_box)} boxes; each must describe every box"
        )
    return [
        _box(tensor, name, shape, *(tuple(map(int, entry)) for entry in entries))
        for entries in zip(*per_box, strict=True)
    ]


def _box(
    tensor: torch.Tensor,
    name: str,
    shape: tuple[int, ...],
    offsets: tuple[int, ...],
    local: tuple[int, ...],
    sizes: tuple[int, ...],
) -> Box:
    merged = len(sizes) - tensor.ndim
    taken = sizes if merged <= 0 else (math.prod(sizes[: merged + 1]), *sizes[merged + 1 :])
    fits = (
        len(offsets) == len(sizes) == len(shape)
        and len(local) == len(taken) == tensor.ndim
        and _inside(offsets, sizes, shape)
        and _inside(local, taken, tuple(tensor.shape))
        and (merged == 0 or (taken[1:] == tuple(tensor.shape[1:]) and not any(local[1:])))
    )
    if not fits:
        raise UnsavableValueError(
            f"{name}: the box of shape {list(sizes)} at {list(offsets)} of the global shape {list(shape)} "
            f"does not fit at {list(local)} of the local tensor of shape {list(tensor.shape)}; correct "
            "global_shape, global_offsets, local_offsets and local_sizes"
        )
    view = tensor.detach()
    for dim, (begin, size) in enumerate(zip(local, taken, strict=True)):
        view = view.narrow(dim, begin, size)
    return Box(offsets, sizes, view.view(sizes) if merged else view)


def _inside(begin: tuple[int, ...], sizes: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return all(b >= 0 and s >= 0 and b + s <= w for b, s, w in zip(begin, sizes, whole, strict=True))


def _field(tensor: torch.Tensor, name: str) -> Any:
    return getattr(tensor, name)


@dataclass(frozen=True, slots=True)
class LocalBox:
    """One box of a global tensor and the local tensor, of the box's sizes, that holds its elements."""

    chunk: Chunk
    tensor: torch.Tensor


def local_boxes(tensors: Mapping[str, torch.Tensor]) -> list[LocalBox]:
    """The boxes that this rank holds of each named tensor, plain or DTensor, in planner order.

    A tensor may have several boxes, or none (a DTensor whose mesh does not include this rank). No collective.
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
            held.append(LocalBox(chunk, planner.lookup_object(item.index).detach()))
        for name, tensor in carriers.items():
            dtype, shape = from_torch(tensor.dtype, name), global_shape(tensor)
            held += [
                LocalBox(Chunk(name, dtype, shape, box.offsets, box.sizes), box.tensor)
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
