"""The element types of safetensors that the format uses, by their names there.

Types of less than a byte are left out: a chunk's begin could fall inside a byte.
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
}
"""Bytes of one element, by safetensors name."""


def itemsize(dtype: str) -> int:
    """Bytes of one element. DamagedError for a name that is not in the table."""
    try:
        return ITEMSIZES[dtype]
    except (KeyError, TypeError):
        known = ", ".join(ITEMSIZES)
        raise DamagedError(f"unknown element type {str(dtype)[:40]!r}: this Holdfast reads {known}") from None
