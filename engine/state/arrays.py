"""NumPy's scalars and arrays as JSON and tensors, bit for bit.

A scalar's bytes are in the JSON. An array becomes a tensor: of the same element type where safetensors has
it, else of the array's bytes (text, times, complex128).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.errors import DamagedError, UnsavableValueError

Json = Any

_DTYPE = re.compile(r"[<>|]([biufcSUmM])([0-9]+)(?:\[[0-9A-Za-z/]+\])?", re.ASCII)
_AS_THEY_ARE = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8"}
_AS_WORDS = {"c16": np.float64, "M8": np.int64, "m8": np.int64}


def encode_scalar(value: np.generic, path: str) -> Json:
    """The form of a NumPy scalar. Raises: UnsavableValueError for a kind that has no fixed bytes."""
    _check(value.dtype, path)
    raw = value.tobytes()[: value.dtype.itemsize]  # empty text has an itemsize of 0 and still gives bytes
    return {"$scalar": [value.dtype.str, raw.hex()]}


def decode_scalar(inner: Json) -> Any:
    """The inverse of `encode_scalar`."""
    try:
        text, raw = inner
        dtype, data = _dtype(text), bytes.fromhex(raw)
        if len(data) != dtype.itemsize:
            raise ValueError(f"{len(data)} bytes")
        return np.frombuffer(data, dtype)[0] if data else np.zeros((), dtype)[()]
    except (ValueError, TypeError) as error:
        raise DamagedError(f"a stored $scalar holds {str(inner)[:40]!a}: {error}") from None


def encode_array(value: np.ndarray[Any, Any], path: str, keep: Callable[[torch.Tensor], Json]) -> Json:
    """The form of an array; `keep` stores its elements and returns the reference to them.

    Raises: UnsavableValueError for elements that are not plain data.
    """
    _check(value.dtype, path)
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    return {
        "$array": {
            "dtype": value.dtype.str,
            "shape": list(value.shape),
            "order": order,
            "data": keep(_elements(value)),
        }
    }


def decode_array(inner: Json, tensor: Callable[[str], torch.Tensor]) -> np.ndarray[Any, Any]:
    """The inverse of `encode_array`; shares the tensor's memory where that is possible."""
    try:
        dtype, shape, name = _dtype(inner["dtype"]), tuple(inner["shape"]), inner["data"]["$tensor"]
        found = tensor(name).numpy(force=True)
        if _kind(dtype) in _AS_THEY_ARE:
            array = found.astype(dtype, copy=False).reshape(shape)
        else:
            flat = np.ascontiguousarray(found).reshape(-1)
            array = flat.view(dtype).reshape(shape) if flat.size else np.empty(shape, dtype)
        return np.asfortranarray(array) if inner["order"] == "F" else array
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"a stored $array is malformed: {error}") from None


def _kind(dtype: np.dtype[Any]) -> str:
    return f"{dtype.kind}{dtype.itemsize}"


def _check(dtype: np.dtype[Any], path: str) -> None:
    if not _DTYPE.fullmatch(dtype.str) or (dtype.kind in "fc" and _kind(dtype) not in _FLOATS):
        raise UnsavableValueError(
            f"{path}: NumPy's {dtype} is not plain data of a fixed size; turn it into a list, or into "
            "an array of numbers, text or times, in state_dict()"
        )


_FLOATS = {"f2", "f4", "f8", "c8", "c16"}  # not the 10-byte ones, which differ between machines


def _dtype(text: Any) -> np.dtype[Any]:
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise ValueError(f"{str(text)[:40]!a} is not an element type")
    return np.dtype(text)


def _elements(value: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor over the array's own memory, or over a copy where torch cannot use that memory."""
    kind = _kind(value.dtype)
    if kind not in _AS_THEY_ARE:
        flat = np.ascontiguousarray(value).reshape(-1)
        words = _AS_WORDS.get(kind, np.dtype(np.uint8)) if value.dtype.isnative else np.uint8
        return torch.from_numpy(flat.view(words).copy() if flat.size else np.empty(0, words))
    native = value.astype(value.dtype.newbyteorder("="), copy=False)
    if not native.flags.writeable or any(stride % native.itemsize or stride < 0 for stride in native.strides):
        native = native.copy()
    return torch.from_numpy(native)
