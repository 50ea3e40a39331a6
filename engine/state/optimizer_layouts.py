"""Device, placements and strides of an optimizer's state tensors: derived from the parameter, else saved.

By default a state tensor with its parameter's shape has the parameter's layout. Any other is a plain tensor
for a plain parameter, and a replicated one for a DTensor. A layout that differs is described in the
optimizer's document, so that a fresh optimizer gets it without taking a step:

    {"device": "cpu"}                       on the CPU, with a parameter that is not
    {"device": "parameter"}                 a step count on its parameter's device
    {"placements": ["shard:0", "replicate"]}    a DTensor on the parameter's mesh
    {"placements": None}                    a plain tensor whose parameter is a DTensor
    {"strides": [1, 3]}                     of a plain tensor: matrix products round differently with others
    {"same": "0.weight.step"}               the same object as the state tensor of that path
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed import tensor as dtensors
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from engine.state.composites import is_composite
from engine.state.local_boxes import carries_boxes, detached, global_shape

Layout = Mapping[str, Any]

STEP = "step"
"""The only field that torch keeps on the CPU: `Optimizer._process_value_according_to_param_policy`."""


SAME = "same"


def on_device(group: Mapping[str, Any]) -> bool:
    """Whether a group's step counts are on the device of its parameters."""
    return bool(group.get("capturable") or group.get("fused"))


def shared_paths(described: Mapping[str, Layout]) -> dict[str, str]:
    """Path -> first path, for the state tensors that are one object under several paths."""
    found = {path: str(layout[SAME]) for path, layout in described.items() if SAME in layout}
    return found | {first: first for first in found.values()}


def describe(
    field: str, value: torch.Tensor, parameter: torch.Tensor, group: Mapping[str, Any]
) -> dict[str, Any]:
    """A state tensor's layout as far as it differs from the default; {} when it does not."""
    found: dict[str, Any] = {}
    expected = "parameter" if field != STEP or on_device(group) else "cpu"
    if parameter.device.type != "cpu":
        actual = "cpu" if value.device.type == "cpu" else "parameter"
        if actual != expected:
            found["device"] = actual
    placements = value.placements if isinstance(value, DTensor) else None
    if placements != _derived(global_shape(value), parameter):
        found["placements"] = None if placements is None else [_text(p) for p in placements]
    plain = placements is None and not carries_boxes(value) and not isinstance(parameter, DTensor)
    if plain and not (value.is_contiguous() and parameter.is_contiguous()):
        strides = value.stride()
        if strides != _strides(global_shape(value), parameter) and strides == _dense(value):
            found["strides"] = list(strides)
    return found


def _strides(shape: Sequence[int], parameter: torch.Tensor) -> tuple[int, ...]:
    """The default strides of a plain state tensor."""
    if parameter.is_contiguous() or tuple(shape) != tuple(parameter.shape):
        return torch.empty(tuple(shape), device="meta").stride()
    return _dense(parameter)


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """A tensor's strides, or those of a copy where it has holes or overlaps."""
    return torch.empty_like(tensor, device="meta").stride()


def allocate(
    dtype: torch.dtype,
    shape: Sequence[int],
    field: str,
    parameter: torch.Tensor,
    group: Mapping[str, Any],
    layout: Layout,
    *,
    zeros: bool = False,
) -> torch.Tensor:
    """Memory for a state tensor of the saved dtype and global shape, in the saved layout."""
    shape = tuple(shape)
    device = parameter.device
    if not shape and not on_device(group):
        where = layout.get("device", "cpu" if field == STEP else "parameter")
        device = torch.device("cpu") if where == "cpu" else device
    elif shape and layout.get("device") == "cpu":
        device = torch.device("cpu")
    derived = _derived(shape, parameter)
    if "placements" in layout and isinstance(parameter, DTensor):
        derived = _placements(layout["placements"], parameter)
    if "strides" in layout and not isinstance(parameter, DTensor) and not carries_boxes(parameter):
        return torch.empty_strided(shape, tuple(layout["strides"]), dtype=dtype, device=device)
    alike = shape == global_shape(parameter) and derived == _of(parameter) and device == parameter.device
    if alike and not is_composite(parameter):
        like = torch.zeros_like if zeros else torch.empty_like
        return detached(like(parameter.detach(), dtype=dtype), like=parameter)
    if derived is not None:
        assert isinstance(parameter, DTensor)
        make = dtensors.zeros if zeros else dtensors.empty
        return make(*shape, dtype=dtype, device_mesh=parameter.device_mesh, placements=derived)
    return torch.zeros(shape, dtype=dtype, device=device)


def _of(tensor: torch.Tensor) -> tuple[Placement, ...] | None:
    return tuple(tensor.placements) if isinstance(tensor, DTensor) else None


def _derived(shape: Sequence[int], parameter: torch.Tensor) -> tuple[Placement, ...] | None:
    if not isinstance(parameter, DTensor):
        return None
    if tuple(shape) == global_shape(parameter):
        return tuple(parameter.placements)
    return (Replicate(),) * parameter.device_mesh.ndim if shape else None


def _text(placement: Placement) -> str:
    # A strided shard has no public constructor: it is restored as a replica with the same global value.
    return f"shard:{placement.dim}" if type(placement) is Shard else "replicate"


def _placements(texts: Any, parameter: DTensor) -> tuple[Placement, ...] | None:
    if texts is None:
        return None
    ndim = parameter.device_mesh.ndim
    if len(texts) != ndim:  # the saved mesh had another number of dimensions
        return (Replicate(),) * ndim
    return tuple(Shard(int(text[6:])) if text.startswith("shard:") else Replicate() for text in texts)
