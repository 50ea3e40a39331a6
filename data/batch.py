"""Dividing a global batch of sequences over ranks and accumulation steps. Pure arithmetic.

The global batch is fixed in sequences for a whole run; at another world size only these numbers change.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.errors import BatchError


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """`rows` sequences a rank and step, as `accumulation` micro-batches of `micro_batch` sequences."""

    rows: int
    micro_batch: int
    accumulation: int

    def __post_init__(self) -> None:
        assert self.rows == self.micro_batch * self.accumulation > 0, self


def split_batch(global_batch: int, world_size: int, micro_batch: int | None = None) -> BatchSplit:
    """Divide `global_batch` sequences over `world_size` ranks; no `micro_batch` takes a rank's rows at once.

    Raises BatchError, showing the arithmetic, where something does not divide.
    """
    if global_batch < 1 or world_size < 1:
        raise BatchError(
            f"a global batch of {global_batch} sequences over {world_size} ranks: both must be positive"
        )
    rows, rest = divmod(global_batch, world_size)
    if rest:
        nearest = " or ".join(str(n * world_size) for n in (rows, rows + 1) if n)
        ranks = ", ".join(str(n) for n in divisors(global_batch))
        raise BatchError(
            f"a global batch of {global_batch} sequences cannot be divided over {world_size} ranks: "
            f"{global_batch} = {world_size} x {rows} + {rest}; use {ranks} ranks, or, for a new run, a "
            f"--global_batch of {nearest}"
        )
    micro_batch = rows if micro_batch is None else micro_batch
    if micro_batch < 1 or rows % micro_batch:
        fitting = ", ".join(str(n) for n in divisors(rows))
        raise BatchError(
            f"a micro-batch of {micro_batch} sequences does not fit: a global batch of {global_batch} / "
            f"{world_size} ranks = {rows} sequences a rank, which is no multiple of {micro_batch}; use a "
            f"--micro_batch of {fitting}"
        )
    return BatchSplit(rows, micro_batch, rows // micro_batch)


def fit_micro_batch(rows: int, at_most: int) -> int:
    """The largest micro-batch that divides a rank's `rows` and does not exceed `at_most` sequences (>= 1)."""
    return max(n for n in divisors(rows) if n <= max(1, at_most))


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
