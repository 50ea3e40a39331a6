"""The floors of a save: the same bytes copied into a warm buffer, and written raw to the disk.

The code shares nothing with the engine, so that no mistake can hide in both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from bench.harness.sizes import share_of

_ALIGNMENT = 4096
_HUGE_PAGE = 2 << 20
_WRITE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Floor:
    """One pass of "copy" (into a warm buffer) or "write" (O_DIRECT and fsync) over the bytes of a save."""

    name: str
    repeat: int
    secs: float
    rank_bytes: int
    method: str


class Floors:
    """One rank's bytes, a prefaulted huge-page buffer of their size, and the two passes over them.

    Args:
        tensors: the state as this rank holds it.
        part, parts: the share of it that this rank would write: replicas divide the work.
        directory: a folder on the file system to measure.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], part: int, parts: int, directory: Path) -> None:
        flat = [local_part(tensor).contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        sizes = [piece.numel() for piece in flat]
        self._sources = [flat[item][begin:end] for item, begin, end in share_of(sizes, part, parts)]
        self.rank_bytes = sum(source.numel() for source in self._sources)
        self._device = self._sources[0].device
        self._map, self._offset = _huge_buffer(self.rank_bytes)
        self._buffer = torch.frombuffer(
            self._map, dtype=torch.uint8, count=self.rank_bytes, offset=self._offset
        )
        self._pinned = self._device.type == "cuda" and _pin(self._buffer)
        ends = torch.tensor([source.numel() for source in self._sources]).cumsum(0).tolist()
        self._targets = [
            self._buffer[end - source.numel() : end] for source, end in zip(self._sources, ends, strict=True)
        ]
        self._file = directory / f"floor-{part}-{os.getpid()}"

    def copy(self, repeat: int) -> Floor:
        """Copy every tensor into its place in the buffer, one after the other."""
        self._synchronize()
        begin = time.perf_counter()
        with torch.no_grad():
            for target, source in zip(self._targets, self._sources, strict=True):
                target.copy_(source, non_blocking=self._pinned)
        self._synchronize()
        method = "pinned" if self._pinned else "huge pages"
        return Floor("copy", repeat, time.perf_counter() - begin, self.rank_bytes, method)

    def write(self, repeat: int) -> Floor:
        """Write the buffer to a new file, with O_DIRECT if the file system supports it, and fsync it."""
        view = memoryview(self._map)[self._offset : self._offset + self._padded_bytes]
        begin = time.perf_counter()
        fd, method = _create(self._file)
        try:
            for offset in range(0, len(view), _WRITE_BYTES):
                _write(fd, view[offset : offset + _WRITE_BYTES], offset)
            os.fsync(fd)
        finally:
            os.close(fd)
        secs = time.perf_counter() - begin
        view.release()
        self._file.unlink()
        return Floor("write", repeat, secs, self.rank_bytes, method)

    @property
    def _padded_bytes(self) -> int:
        return -(-self.rank_bytes // _ALIGNMENT) * _ALIGNMENT

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def state_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Every tensor of the training state, once."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [
        value
        for parameter in parameters
        for value in optimizer.state[parameter].values()
        if isinstance(value, torch.Tensor)
    ]
    return [*parameters, *model.buffers(), *moments]


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank holds, without gradients."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _huge_buffer(size: int) -> tuple[mmap.mmap, int]:
    """A private, prefaulted mapping, and the offset of its first huge page."""
    pages = mmap.mmap(-1, size + 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    offset = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % _HUGE_PAGE
    with contextlib.suppress(OSError):  # this kernel has none: the floor is what this machine can do
        pages.madvise(mmap.MADV_HUGEPAGE)
    for position in range(offset, offset + size + _ALIGNMENT, _ALIGNMENT):
        pages[position] = 0
    return pages, offset


def _pin(buffer: torch.Tensor) -> bool:
    runtime: Any = torch.cuda
    return int(runtime.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)) == 0


def _create(path: Path) -> tuple[int, str]:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    try:
        return os.open(path, flags | os.O_DIRECT), "O_DIRECT"
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        path.unlink(missing_ok=True)
        return os.open(path, flags), "buffered: no O_DIRECT here"


def _write(fd: int, view: memoryview, offset: int) -> None:
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], offset + written)
