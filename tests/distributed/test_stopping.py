"""A signal to one rank stops all of them before the same batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from engine import StopSignals
from tests.support.ranks import Ranks


def loop(rank: int, world_size: int) -> tuple[list[int], bool, int | None]:
    seen = []
    with StopSignals() as stop:
        for batch in stop.batches(range(10)):
            seen.append(batch)
            if rank == 1 and batch == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
    return seen, stop.requested, stop.signum


def test_all_ranks_stop_at_the_same_step(world: Callable[[int], Ranks]) -> None:
    first, second = world(2).run(loop)
    assert first == ([0, 1, 2, 3], True, None)
    assert second == ([0, 1, 2, 3], True, signal.SIGUSR1)
