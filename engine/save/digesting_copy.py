"""Copies host tensors as plain memory, bypassing the caches, and digests the bytes on the way.

torch's copies read the destination into the cache before they overwrite it. A snapshot is larger than any
cache and is not read again soon: without that read, a copy takes little more than half the time. The time
saved pays for the digests, whose bytes are in the processor anyway. Digests made later, beside training,
would read all of it from memory again and take cores from training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.format.digest import BLOCK_BYTES
from engine.native import kernels

Pair = tuple[torch.Tensor, torch.Tensor]
"""(destination in the staging buffer, source) of equal shape and dtype."""

LEAST_BYTES = 64 << 10
"""Smaller tensors are left to one call of torch: handling each would cost more than its copy."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [begin, end) of a shard file that starts at `address` in host memory."""

    file: str
    address: int
    file_bytes: int
    begin: int
    end: int

    @property
    def ends_file(self) -> bool:
        """Whether the span ends at the end of the file."""
        return self.end == self.file_bytes


def fill_span(span: Span, runs: Sequence[kernels.Run], digests: bytearray) -> None:
    """Copy the runs into the span, with as many threads as torch would use, and digest the span's blocks.

    The parts of the span that no run covers are in place already, and so is the rest of its first block.
    `digests` are the file's, packed; an incomplete last block is left to the next span.
    """
    begin = span.begin - span.begin % BLOCK_BYTES
    threads = torch.get_num_threads()
    kernels.fill(
        *(span.address, span.file_bytes, begin, span.end), runs, BLOCK_BYTES, threads=threads, digests=digests
    )


def plain_runs(pairs: Sequence[Pair]) -> tuple[list[kernels.Run], list[Pair]]:
    """Large plain tensors as runs of memory, in the same order, and the pairs left for torch to copy."""
    runs, rest = [], []
    for to, source in pairs:
        if source.nbytes >= LEAST_BYTES and _plain(to) and _plain(source):
            runs.append((to.data_ptr(), source.data_ptr(), source.nbytes))
        else:
            rest.append((to, source))
    return runs, rest


def _plain(tensor: torch.Tensor) -> bool:
    """Whether host memory has its elements as they are, one after the other."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
