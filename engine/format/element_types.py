"""The element types that the format uses, by their safetensors names.

Types smaller than a byte are excluded: a chunk could begin inside a byte. `F4` comes in pairs, as in torch:
an element is a byte of two values, and only a safetensors header counts the values.
"""

from __future__ import annotations

from engine.errors import DamagedError

ITEMSIZES: dict[str, int] = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F4": 1,
}
"""Bytes per element, by safetensors name."""

_VALUES_EACH = {"F4": 2}
"""Values per element, for types whose header counts values."""


def header_sizes(dtype: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in a safetensors header for these sizes. ValueError for a scalar of pairs."""
    each = _VALUES_EACH.get(dtype, 1)
    if each == 1:
        return sizes
    if not sizes:
        raise ValueError(f"a scalar of {dtype} has no shape in safetensors: give it one dimension")
    return (*sizes[:-1], sizes[-1] * each)


def sizes_of_header(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of `header_sizes`. DamagedError if the values do not fill whole elements."""
    each = _VALUES_EACH.get(dtype, 1)
    if each == 1:
        return shape
    if not shape or shape[-1] % each:
        raise DamagedError(f"{dtype} {list(shape)} does not fill whole bytes")
    return (*shape[:-1], shape[-1] // each)


def itemsize(dtype: str) -> int:
    """Bytes per element. DamagedError for an unknown name."""
    try:
        return ITEMSIZES[dtype]
    except (KeyError, TypeError):
        known = ", ".join(ITEMSIZES)
        raise DamagedError(f"unknown element type {str(dtype)[:40]!r}: this Holdfast reads {known}") from None
