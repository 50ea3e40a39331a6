"""Which tensors a checkpoint can hold, and what to do with the others."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from engine.errors import UnsavableValueError


def check_savable(name: str, tensor: torch.Tensor) -> None:
    """Refuse what has no dense memory of its own, before torch fails at it and does not say where.

    Raises: UnsavableValueError naming the tensor and what to do.
    """
    kind, remedy = _odd(tensor)
    if kind:
        raise UnsavableValueError(f"{name}: {kind} tensor cannot be saved or restored as it is; {remedy}")


def dtype_remedy(dtype: torch.dtype) -> str:
    """What to do with a tensor whose element type safetensors does not have."""
    if dtype.is_complex:
        return "store torch.view_as_real() of it"
    if str(dtype).startswith("torch.q"):
        return "store its int_repr(), scale and zero point, or its dequantize()"
    return "store its .view(torch.uint8), or convert it"


def _odd(tensor: torch.Tensor) -> tuple[str, str]:
    """(what a tensor is that cannot be stored, what to do); empty for any other."""
    if is_lazy(tensor):
        return "an uninitialised", "run the module once first, so that it makes its parameters"
    if tensor.is_nested:
        return "a nested", "store its unbind() as a list, or a padded tensor and the lengths"
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.").removeprefix("_")
        instead = "" if layout == "mkldnn" else ", or its indices and values as tensors of their own"
        return f"a {layout}", f"store its to_dense(){instead}"
    if tensor.is_quantized:
        return f"a quantized ({str(tensor.dtype).removeprefix('torch.')})", dtype_remedy(tensor.dtype)
    if isinstance(tensor, DTensor) and hasattr(type(tensor.to_local()), "__tensor_flatten__"):
        inside = type(tensor.to_local()).__qualname__
        return f"a distributed {inside}", "shards of tensors made of tensors have no place in the whole"
    if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        return "a partial", "redistribute() it to Replicate or Shard placements, which adds up its parts"
    if tensor.device.type == "meta":
        return "a meta", "give the module memory with to_empty() and initialise it first"
    return "", ""
