"""Element types of torch and of safetensors, one to one."""

from __future__ import annotations

import torch

from engine.errors import DamagedError, UnsavableValueError
from engine.state.savable import dtype_remedy

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
    """The torch dtype of a safetensors name. Raises DamagedError for one that torch does not have."""
    try:
        return _TO_TORCH[name]
    except KeyError:
        raise DamagedError(f"this Holdfast cannot load the element type {name[:40]!r}") from None


def from_torch(dtype: torch.dtype, where: str) -> str:
    """The safetensors name of a torch dtype. Raises UnsavableValueError naming `where` it stands."""
    try:
        return _FROM_TORCH[dtype]
    except KeyError:
        raise UnsavableValueError(
            f"{where}: tensors of {dtype} have no safetensors type; {dtype_remedy(dtype)}"
        ) from None
