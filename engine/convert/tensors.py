"""The tensor interface of all conversions: reads tensors window by window from any source."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from engine.errors import ConfigError
from engine.format.manifest import TensorInfo
from engine.state.tensor_format import to_torch

WINDOW_BYTES = 32 << 20
"""Most bytes of a tensor in memory at a time, unless a single row is longer."""

Progress = Callable[[int], None]
"""Called with the number of bytes just processed."""

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
"""Values of `--dtype`, with the format's names."""

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class TensorSource(Protocol):
    """Named tensors of known dtype and shape."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""
        ...

    def windows(self, name: str) -> Iterator[torch.Tensor]:
        """Consecutive rows of a tensor, contiguous, in order; a scalar or an empty tensor is one window."""
        ...


def ignore_progress(count: int) -> None:
    """A `Progress` that does nothing."""


def row_spans(shape: tuple[int, ...], itemsize: int, most_bytes: int | None = None) -> list[tuple[int, int]]:
    """The rows [begin, end) of each window of a tensor; a scalar has the one span (0, 1)."""
    if not shape or not math.prod(shape):
        return [(0, shape[0] if shape else 1)]
    rows = max(1, (most_bytes or WINDOW_BYTES) // (math.prod(shape[1:]) * itemsize))
    return [(begin, min(begin + rows, shape[0])) for begin in range(0, shape[0], rows)]


def windows_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The windows of a tensor in memory."""
    if tensor.ndim == 0:
        yield tensor.contiguous()
        return
    for begin, end in row_spans(tuple(tensor.shape), tensor.element_size()):
        yield tensor[begin:end].contiguous()


def whole(source: TensorSource, name: str) -> torch.Tensor:
    """Read a whole tensor."""
    info = source.infos[name]
    out = torch.empty(info.shape, dtype=to_torch(info.dtype))
    fill(out, source.windows(name))
    return out


def transposed_windows(source: TensorSource, name: str) -> Iterator[torch.Tensor]:
    """The transpose of a matrix, in windows."""
    tensor = whole(source, name).t()
    for begin, end in row_spans(tuple(tensor.shape), tensor.element_size()):
        yield tensor[begin:end].contiguous()


def fill(out: torch.Tensor, windows: Iterator[torch.Tensor], progress: Progress = ignore_progress) -> None:
    """Copy windows into `out`, and convert them to its dtype."""
    begin = 0
    for window in windows:
        if out.ndim == 0:
            out.copy_(window)
        else:
            out[begin : begin + window.shape[0]].copy_(window)
            begin += window.shape[0]
        progress(out.element_size() * window.numel())


def raw_bytes(window: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(window.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def same_bytes(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether two contiguous tensors of one dtype are equal bit for bit, including NaNs and signed zeros."""
    return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))


def is_float(dtype: str) -> bool:
    """Whether a format's dtype is one that `--dtype` converts and `merge` averages."""
    return dtype in _FLOATS


def target_dtype(option: str | None) -> str | None:
    """The format's name for a value of `--dtype`, or None. Raises ConfigError."""
    if option is None:
        return None
    if option not in DTYPES:
        raise ConfigError(f"--dtype is {option!r}: it must be one of {', '.join(DTYPES)}")
    return DTYPES[option]


def converted(info: TensorInfo, dtype: str | None) -> TensorInfo:
    """A tensor's dtype and shape after `--dtype`: only floating-point tensors change."""
    return TensorInfo(dtype, info.shape) if dtype is not None and is_float(info.dtype) else info


def cast(windows: Iterator[torch.Tensor], dtype: str) -> Iterator[torch.Tensor]:
    """The windows in another dtype."""
    wanted = to_torch(dtype)
    return (window.to(wanted) for window in windows)
