"""The floor of a restore: the same bytes read raw. It shares nothing with the engine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.harness.sizes import share_of

_READ_BYTES = 16 << 20


class RawRead:
    """One rank's share of the bytes of some files, and a prefaulted buffer for it."""

    def __init__(self, files: Sequence[Path], part: int, parts: int) -> None:
        self._files, self._part, self._parts = files, part, parts
        self._sizes = [file.stat().st_size for file in files]
        self.rank_bytes = sum(end - begin for _, begin, end in share_of(self._sizes, part, parts))
        self._buffer = torch.ones(self.rank_bytes, dtype=torch.uint8)

    def read(self, threads: int) -> float:
        """Read it all through the page cache, 16 MiB at a time; returns seconds."""
        # Equal parts of an equal part: the threads' shares, one after the other, are the rank's.
        shares = [
            share_of(self._sizes, self._part * threads + thread, self._parts * threads)
            for thread in range(threads)
        ]
        with ThreadPoolExecutor(threads) as pool:
            begun = time.perf_counter()
            position, reads = 0, []
            for share in shares:
                reads.append(pool.submit(self._read_share, share, position))
                position += sum(end - begin for _, begin, end in share)
            for read in reads:
                read.result()
            return time.perf_counter() - begun

    def _read_share(self, share: Sequence[tuple[int, int, int]], position: int) -> None:
        view = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        for item, begin, end in share:
            fd = os.open(self._files[item], os.O_RDONLY)
            try:
                while begin < end:
                    room = min(end - begin, _READ_BYTES)
                    count = os.preadv(fd, [view[position : position + room]], begin)
                    assert count, "the file has become shorter"
                    begin += count
                    position += count
            finally:
                os.close(fd)


def drop(files: Sequence[Path]) -> None:
    """Remove files from the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(files: Sequence[Path]) -> None:
    """Read files into the page cache."""
    buffer = bytearray(_READ_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
