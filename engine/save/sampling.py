"""Chooses the bytes of replicas that one save compares. Pure: all ranks that hold them choose the same.

Small tensors are compared whole, large ones by a block that moves from save to save. If there are too many
for one save, several saves take turns.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

SMALL_BYTES = 16 << 10
"""Tensors up to this size are compared whole: a block of a large one costs about as much."""

BLOCK_BYTES = 4 << 10

MOST_SMALL_BYTES = 16 << 20
MOST_BLOCKS = 2048
"""Per save. 10,000 small tensors take 1.5 ms, 2,048 blocks 1 ms."""

MOST_RUNS = 16384
"""Small tensors per save."""

MOST_ON_DEVICE = 256
"""The limit for both on a device: gathering each for the copy takes some 10 microseconds."""

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes [begin, end) of an item, in row-major order."""

    item: int
    begin: int
    end: int


class Sampler:
    """Chooses runs among items of these sizes, save by save.

    Args:
        sizes: bytes of each item.
        full: everything at every save.
        most_runs, most_blocks: small items and blocks of large ones per save.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        full: bool = False,
        most_runs: int = MOST_RUNS,
        most_blocks: int = MOST_BLOCKS,
    ) -> None:
        self._sizes = sizes
        self._full = full
        self._small = [Run(item, 0, size) for item, size in enumerate(sizes) if size <= SMALL_BYTES]
        self._large = [(item, size, *_walk(size)) for item, size in enumerate(sizes) if size > SMALL_BYTES]
        small_bytes = sum(run.end for run in self._small)
        self._turns = max(1, -(-small_bytes // MOST_SMALL_BYTES), -(-len(self._small) // most_runs))
        if self._turns > 1:
            # Every save takes each n-th one. In the order given, those could be the largest ones of all.
            self._small.sort(key=lambda run: run.end)
        self._large_turns = max(1, -(-len(self._large) // most_blocks))

    @property
    def always(self) -> list[Run]:
        """The runs that begin every choice without fresh items."""
        return [] if self._full or self._turns > 1 else self._small

    def choose(self, number: int, fresh: Collection[int] = ()) -> list[Run]:
        """The runs of save `number`, the same on every rank. `fresh`: items to compare whole."""
        if self._full or len(fresh) == len(self._sizes):
            return [Run(item, 0, size) for item, size in enumerate(self._sizes)]
        chosen = self._small[number % self._turns :: self._turns]
        if fresh:
            chosen = [run for run in chosen if run.item not in fresh]
        turn = number // self._large_turns
        for item, size, count, stride in self._large[number % self._large_turns :: self._large_turns]:
            if item not in fresh:
                begin = turn * stride % count * BLOCK_BYTES
                chosen.append(Run(item, begin, min(size, begin + BLOCK_BYTES)))
        return chosen + [Run(item, 0, self._sizes[item]) for item in sorted(fresh)]


def _walk(size: int) -> tuple[int, int]:
    """(blocks, stride) of a walk that visits every block of an item, each far from the previous one."""
    count = -(-size // BLOCK_BYTES)
    stride = max(1, round(count * _GOLDEN))
    while math.gcd(stride, count) > 1:
        stride += 1
    return count, stride
