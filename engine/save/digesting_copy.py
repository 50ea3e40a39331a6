"""Copies between host tensors as plain memory, past the caches, that digest what they copy.

torch's copies read the destination into the cache before they overwrite it. A snapshot is larger than any
cache and is not looked at again soon: without that, a copy takes little more than half the time. What that
saves pays for the digests: they are made of bytes that are in the processor anyway. Made afterwards, beside
training, they read all of it from memory once more and take the cores that training computes on.
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
"""Smaller tensors stay in one call of torch: naming each would cost more than its copy."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [begin, end) of a shard file that lies in host memory from `address` on."""

    file: str
    address: int
    file_bytes: int
    begin: int
    end: int

    @property
    def ends_file(self) -> bool:
        """Whether the file is whole when this span is."""
        return self.end == self.file_bytes


def fill_span(span: Span, runs: Sequence[kernels.Run], digests: bytearray) -> None:
    """Copy the runs into their places, with as many threads as torch would use, and digest the span's blocks.

    What of the span no run covers is there already, as is everything before it in its first block. `digests`
    are the file's, packed; a last block that the span does not complete is left to the next one.
    """
    begin = span.begin - span.begin % BLOCK_BYTES
    threads = torch.get_num_threads()
    kernels.fill(
        *(span.address, span.file_bytes, begin, span.end), runs, BLOCK_BYTES, threads=threads, digests=digests
    )


def plain_runs(pairs: Sequence[Pair]) -> tuple[list[kernels.Run], list[Pair]]:
    """The large plain ones as runs of memory, in the same order, and what is left for torch to copy."""
    runs, rest = [], []
    for to, source in pairs:
        if source.nbytes >= LEAST_BYTES and _plain(to) and _plain(source):
            runs.append((to.data_ptr(), source.data_ptr(), source.nbytes))
        else:
            rest.append((to, source))
    return runs, rest


def _plain(tensor: torch.Tensor) -> bool:
    """Whether its elements lie in host memory as they read, one after the other."""
    return (
        tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
