"""Torch tensors in the format's terms: element types, bytes, and tensors that cannot be saved."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from engine.errors import DamagedError, UnsavableValueError

_TO_TORCH: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F4": torch.float4_e2m1fn_x2,
}
_FROM_TORCH = {dtype: name for name, dtype in _TO_TORCH.items()}


def to_torch(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name. Raises DamagedError for a name without one."""
    try:
        return _TO_TORCH[name]
    except KeyError:
        raise DamagedError(f"this Holdfast cannot load the element type {name[:40]!r}") from None


def from_torch(dtype: torch.dtype, where: str) -> str:
    """The safetensors name of a torch dtype. Raises UnsavableValueError naming the tensor (`where`)."""
    try:
        return _FROM_TORCH[dtype]
    except KeyError:
        raise UnsavableValueError(
            f"{where}: tensors of {dtype} have no safetensors type; {dtype_remedy(dtype)}"
        ) from None


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor in the order of its elements, in the same memory.

    Not `view(-1)`: torch calls a tensor of one element contiguous whatever its stride is, and then refuses
    to view it as bytes.
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def check_savable(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor without dense memory of its own, before torch fails and does not name it.

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
    """(kind of a tensor that cannot be saved, what to do); two empty texts for any other tensor."""
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
    kind = type(tensor)
    own = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if own and not hasattr(kind, "__tensor_flatten__") and not isinstance(tensor, DTensor):
        return f"a {kind.__qualname__}", "store the tensors that it is made of by themselves"
    if isinstance(tensor, DTensor) and hasattr(type(tensor.to_local()), "__tensor_flatten__"):
        inside = type(tensor.to_local()).__qualname__
        return f"a distributed {inside}", "the parts of its shards have no position in the global tensor"
    if isinstance(tensor, DTensor) and any(placement.is_partial() for placement in tensor.placements):
        return "a partial", "redistribute() it to Replicate or Shard placements, which adds up its parts"
    if tensor.device.type == "meta":
        return "a meta", "give the module memory with to_empty() and initialise it first"
    return "", ""
