"""Makes ranks fail and stop together: an early error on one rank, or a signal to one, reaches all.

Uses the default process group, and only from the main thread. The engine's background saves never use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.errors import PeerFailedError
from engine.run.preemption import SIGNALS

T = TypeVar("T")


class Stopped(Exception):
    """A signal asked a rank to stop, and all ranks know. Not an error: it ends the program.

    `where` says after which step, and what is lost; it completes the last line on the console.
    """

    def __init__(self, signum: int, where: str = "before the first step: nothing to save") -> None:
        super().__init__(f"stopped by signal {signum} {where}")
        self.signum = signum


@dataclass(frozen=True, slots=True)
class Vote:
    """The result of one reduction: a sum, a signal that reached a rank, whether a rank must stop."""

    total: float
    signum: int | None
    stop: bool


@dataclass(slots=True)
class Agreement:
    """Agreement among `world_size` ranks; a single rank agrees with itself at once.

    `signum` returns the signal that this rank received, or None.
    """

    rank: int
    world_size: int
    signum: Callable[[], int | None]
    failed: bool = False
    """Whether the last `together` failed, in which case rank 0 prints the error for all."""

    def together(self, action: Callable[[], T], *, heed_signals: bool = True) -> T:
        """Run `action` on every rank, and return only if it succeeds on all of them.

        Collective. A rank that fails raises its own error, the others PeerFailedError with its text. All
        raise Stopped if one received a signal, unless `heed_signals` is off.
        """
        result, error = self._attempt(action)
        outcomes = self._gather((None if error is None else str(error) or repr(error), self.signum()))
        self.failed = any(failure is not None for failure, _ in outcomes)
        if error is not None:
            raise error
        for rank, (failure, _) in enumerate(outcomes):
            if failure is not None:
                raise PeerFailedError(f"rank {rank}: {failure}")
        for _, signum in outcomes:
            if heed_signals and signum is not None:
                raise Stopped(signum)
        assert result is not None
        return result[0]

    def from_first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and broadcast its result; errors and signals as in `together`."""
        box: list[Any] = [self.together(action if self.rank == 0 else lambda: None)]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def highest(self, value: int) -> int:
        """The largest of the ranks' values. Collective."""
        box = torch.tensor(value, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return int(box.item())

    def vote(self, value: torch.Tensor, *, stop: bool = False) -> Vote:
        """Sum a float64 scalar over the ranks, with their signals and votes to stop, in one reduction."""
        signum = self.signum()
        flags = [float(signum == one) for one in SIGNALS] + [float(stop)]
        packed = torch.cat([value.reshape(1), value.new_tensor(flags)])
        if self.world_size > 1:
            dist.all_reduce(packed)
        total, *votes, stops = packed.tolist()
        # SIGTERM, the last, wins: its sender is about to take the machine away.
        agreed = [one for one, count in zip(SIGNALS, votes, strict=True) if count > 0]
        return Vote(total, agreed[-1] if agreed else None, stops > 0)

    def _attempt(self, action: Callable[[], T]) -> tuple[tuple[T] | None, Exception | None]:
        try:
            return (action(),), None
        except Exception as error:  # even a bug on one rank must not leave the others waiting
            return None, error

    def _gather(self, mine: tuple[str | None, int | None]) -> list[tuple[str | None, int | None]]:
        if self.world_size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, mine)
        return everyone
