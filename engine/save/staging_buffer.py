"""One host buffer per rank, laid out as the shard files themselves.

A fresh allocation costs more in page faults (0.4 to 1 s for 1.5 GB) than the copy into it (0.1 s), so the
buffer is taken once, prefaulted, and reused by every save. Its pages are made for direct I/O
(`storage/aligned_memory.py`), and pinned on CUDA, so that the device copies without a bounce buffer.

Each file starts on a 4 KiB boundary and is followed by zeros up to the next one, so that aligned writes
of whole pages can go straight from here to the disk.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from engine.errors import MemoryBudgetError
from engine.format.layout import PlacedChunk, ShardLayout
from engine.save.host_memory import available_bytes
from engine.state.tensor_format import to_torch
from engine.storage.aligned_memory import PAGE_BYTES, map_pages
from engine.text import readable_bytes

log = logging.getLogger(__name__)

_PREFAULT_SLICE_BYTES = 64 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it.


@dataclass(frozen=True, slots=True)
class FileSlot:
    """Where one shard file lies in the staging buffer: bytes [begin, begin + layout.file_bytes)."""

    layout: ShardLayout
    begin: int

    @property
    def padded_bytes(self) -> int:
        """The file's size rounded up to whole pages."""
        return _round_up(self.layout.file_bytes, PAGE_BYTES)


def place_files(layouts: Sequence[ShardLayout]) -> tuple[FileSlot, ...]:
    """Lay files one after the other, each on a page boundary. Pure."""
    slots = []
    begin = 0
    for layout in layouts:
        slots.append(FileSlot(layout, begin))
        begin += _round_up(layout.file_bytes, PAGE_BYTES)
    return tuple(slots)


class StagingBuffer:
    """A page-aligned host buffer that holds this rank's shard files.

    A background thread faults its pages in, because that can take seconds if the kernel must first make huge
    pages. Call `wait_ready` before the first copy.

    Args:
        layouts: the files, headers included.
        pin: register the memory with CUDA.
        budget_bytes: the most to allocate; None for no limit.
    Raises: MemoryBudgetError with both figures.
    """

    def __init__(self, layouts: Sequence[ShardLayout], *, pin: bool, budget_bytes: int | None = None) -> None:
        self.slots = place_files(layouts)
        self.file_bytes = sum(slot.layout.file_bytes for slot in self.slots)
        self.size_bytes = sum(slot.padded_bytes for slot in self.slots)
        check_budget(self.size_bytes, budget_bytes, available_bytes())
        log.info("allocating %s of host memory for snapshots", readable_bytes(self.size_bytes))
        self._map, self._skip = map_pages(self.size_bytes)
        self._stop = False
        self.buffer = torch.frombuffer(self._map, dtype=torch.uint8, count=self.size_bytes, offset=self._skip)
        self.memory = memoryview(self._map)[self._skip : self._skip + self.size_bytes]
        self._pinned = False
        for slot in self.slots:
            header = slot.layout.header
            self.memory[slot.begin : slot.begin + len(header)] = header
        # A new thread's device is the first one: pinning there would make every rank open a context on it.
        device = torch.cuda.current_device() if pin else None
        self._prefaulting = threading.Thread(
            target=self._prefault, args=(device,), name="holdfast-prefault", daemon=True
        )
        self._prefaulting.start()

    def wait_ready(self) -> None:
        """Wait until every page is present, and pinned if requested."""
        self._prefaulting.join()

    @property
    def pinned(self) -> bool:
        """Whether CUDA copies to this memory without a bounce buffer. Valid after `wait_ready`."""
        return self._pinned

    def view(self, slot: FileSlot, placed: PlacedChunk) -> torch.Tensor:
        """The buffer's bytes of one chunk as a tensor of the chunk's dtype and sizes."""
        begin, end = slot.begin + placed.begin, slot.begin + placed.end
        return self.buffer[begin:end].view(to_torch(placed.chunk.dtype)).view(placed.chunk.sizes)

    def padded(self, slot: FileSlot) -> memoryview:
        """One file's bytes, rounded up to whole pages."""
        return self.memory[slot.begin : slot.begin + slot.padded_bytes]

    def release(self) -> None:
        """Free the memory. Its views must be gone or never used again."""
        self._stop = True
        self.wait_ready()
        if self._pinned:
            cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            cudart.cudaHostUnregister(self.buffer.data_ptr())
            self._pinned = False
        del self.memory, self.buffer
        # The map is freed with its last view; closing it here would raise while one is alive.
        del self._map

    def _prefault(self, device: int | None) -> None:
        prefault(self.buffer.data_ptr(), self.size_bytes, lambda: self._stop)
        if device is not None and not self._stop:
            with torch.cuda.device(device):
                self._pinned = _pin(self.buffer)


def prefault(address: int, size_bytes: int, stopped: Callable[[], bool] = lambda: False) -> None:
    """Fault in every page of [address, address + size_bytes); `address` is on a page boundary.

    Nothing else may write there meanwhile: without MADV_POPULATE_WRITE (kernels before 5.14), a byte of each
    page is rewritten with its own value.
    """
    # Not mmap.madvise, which holds the GIL.
    libc = ctypes.CDLL(None, use_errno=True)
    for offset in range(0, size_bytes, _PREFAULT_SLICE_BYTES):
        length = min(_PREFAULT_SLICE_BYTES, _round_up(size_bytes - offset, PAGE_BYTES))
        begin = address + offset
        if stopped():
            return
        if libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), _MADV_POPULATE_WRITE) != 0:
            for page in range(begin, begin + length, PAGE_BYTES):
                ctypes.memmove(page, page, 1)


def check_budget(need_bytes: int, budget_bytes: int | None, available: int) -> None:
    """Raise MemoryBudgetError if the snapshot exceeds its budget or the available memory. Pure."""
    if budget_bytes is not None and need_bytes > budget_bytes:
        raise MemoryBudgetError(
            f"the snapshot of this rank needs {need_bytes:,} bytes of host memory, but the budget is "
            f"{budget_bytes:,} bytes; raise memory_budget_bytes or save from more ranks"
        )
    if need_bytes > available:
        raise MemoryBudgetError(
            f"the snapshot of this rank needs {need_bytes:,} bytes of host memory, but only {available:,} "
            "bytes are available; free memory, or save from more ranks"
        )


def _pin(buffer: torch.Tensor) -> bool:
    """Register memory with CUDA. A refusal (a locked-memory limit) is logged; copies are then slower."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    status = cudart.cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    if int(status) != 0:
        log.warning("CUDA could not pin the snapshot buffer (error %s); copies will be slower", status)
        return False
    return True


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
