"""What the disk and the page cache allow: the same bytes read raw. It shares nothing with the engine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.sizes import share_of

_READ_BYTES = 16 << 20


class RawRead:
    """One rank's share of some files' bytes, and a prefaulted buffer for them."""

    def __init__(self, files: Sequence[Path], part: int, parts: int) -> None:
        self._files = files
        self._share = share_of([file.stat().st_size for file in files], part, parts)
        self.rank_bytes = sum(end - begin for _, begin, end in self._share)
        self._buffer = torch.ones(self.rank_bytes, dtype=torch.uint8)

    def read(self, threads: int) -> float:
        """Read it all through the page cache, 16 MiB at a time; returns seconds."""
        sizes = [end - begin for _, begin, end in self._share]
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            reads = [
                pool.submit(self._read_part, share_of(sizes, part, threads), sizes) for part in range(threads)
            ]
            for read in reads:
                read.result()
            return time.perf_counter() - begin

    def _read_part(self, pieces: Sequence[tuple[int, int, int]], sizes: Sequence[int]) -> None:
        view = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        for item, begin, end in pieces:
            file, file_begin, _ = self._share[item]
            before = sum(sizes[:item])
            fd = os.open(self._files[file], os.O_RDONLY)
            try:
                while begin < end:
                    to = min(end, begin + _READ_BYTES)
                    count = os.preadv(fd, [view[before + begin : before + to]], file_begin + begin)
                    assert count, "the file has become shorter"
                    begin += count
            finally:
                os.close(fd)


def drop(files: Sequence[Path]) -> None:
    """Take files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(files: Sequence[Path]) -> None:
    """Bring files into the page cache."""
    buffer = bytearray(_READ_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def disk_bytes() -> int:
    """Bytes that this process has had read from the disk so far."""
    with open("/proc/self/io", encoding="ascii") as file:
        fields = dict(line.split(": ") for line in file.read().splitlines())
    return int(fields["read_bytes"])
