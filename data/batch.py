"""Divides a global batch of sequences over ranks and accumulation steps. Pure arithmetic.

A run keeps its global batch; at another world size only this division changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.errors import BatchError


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """`rows` sequences per rank and step, as `accumulation` micro-batches of `micro_batch` sequences."""

    rows: int
    micro_batch: int
    accumulation: int

    def __post_init__(self) -> None:
        assert self.rows == self.micro_batch * self.accumulation > 0, self


def split_batch(global_batch: int, world_size: int, micro_batch: int | None = None) -> BatchSplit:
    """Divide `global_batch` sequences over `world_size` ranks; without `micro_batch`, no accumulation.

    Raises BatchError, with the arithmetic, if something does not divide evenly.
    """
    if global_batch < 1 or world_size < 1:
        raise BatchError(
            f"a global batch of {global_batch} sequences over {world_size} ranks: both must be at least 1"
        )
    rows, rest = divmod(global_batch, world_size)
    if rest:
        nearest = " or ".join(str(n * world_size) for n in (rows, rows + 1) if n)
        ranks = ", ".join(str(n) for n in divisors(global_batch))
        raise BatchError(
            f"a global batch of {global_batch} sequences cannot be divided over {world_size} ranks: "
            f"{global_batch} = {world_size} x {rows} + {rest}; use {ranks} ranks or, for a new run, "
            f"--global_batch {nearest}"
        )
    micro_batch = rows if micro_batch is None else micro_batch
    if micro_batch < 1 or rows % micro_batch:
        fitting = ", ".join(str(n) for n in divisors(rows))
        raise BatchError(
            f"a micro-batch of {micro_batch} sequences does not fit: a global batch of {global_batch} / "
            f"{world_size} ranks = {rows} sequences per rank, not a multiple of {micro_batch}; use "
            f"--micro_batch {fitting}"
        )
    return BatchSplit(rows, micro_batch, rows // micro_batch)


def fit_micro_batch(rows: int, at_most: int) -> int:
    """The largest micro-batch of at most `at_most` sequences that divides a rank's `rows`; at least 1."""
    return max(n for n in divisors(rows) if n <= max(1, at_most))


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
