"""The bytes of a tensor in row-major order, without a copy where that is possible."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import torch

PIECE_BYTES = 64 << 20
"""A whole tensor is fetched from a device in pieces of this size."""


def host_bytes(tensor: torch.Tensor) -> memoryview | None:
    """The tensor's memory; None if it has gaps, is on a device, or has pending conjugation or negation.

    The caller must keep the tensor alive.
    """
    plain = (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
    if not plain:
        return None
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))


def some_bytes(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Bytes [begin, end) of a dense tensor as uint8, on its device; both are multiples of the item size."""
    if not tensor.numel():
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    first, last = begin // tensor.element_size(), end // tensor.element_size()
    rows = tensor.detach()
    if rows.is_contiguous():
        rows = rows.view(-1)
    while rows.dim() > 1:
        row = math.prod(rows.shape[1:])
        top, bottom = first // row, (last - 1) // row
        rows, first, last = rows.narrow(0, top, bottom - top + 1), first - top * row, last - top * row
        if bottom > top:
            break
        rows = rows[0]
    flat = rows.reshape(-1)[first:last].resolve_conj().resolve_neg()
    # Not `contiguous`: a single element counts as contiguous with any stride, yet cannot be viewed as bytes.
    return (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(
        torch.uint8
    )


def pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """All bytes of a dense tensor, fetched to host memory in pieces."""
    for begin in range(0, tensor.nbytes, PIECE_BYTES):
        piece = some_bytes(tensor, begin, min(tensor.nbytes, begin + PIECE_BYTES)).cpu()
        yield memoryview(piece.numpy())  # type: ignore[arg-type]
