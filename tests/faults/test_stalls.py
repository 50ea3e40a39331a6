"""Processes that stand still: a rank within a save, and the holder of a lease that another one takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.test_kill_sweep import sweep


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_in_time_and_refused_when_it_wakes(
    victim: int, root: Path, covered: Callable[[int], None]
) -> None:
    """SIGSTOP before every call of a save. With rank 0 the store stands still, too: it answers nobody."""
    points = sweep("rank", victim, root, "stall_sweep")
    assert points >= (24 if victim == 0 else 12)
    covered(points)


@pytest.mark.slow
def test_a_stopped_holder_wakes_after_its_lease_was_taken(root: Path, covered: Callable[[int], None]) -> None:
    """SIGSTOP before every call of a save: whatever it does then, it neither commits nor harms."""
    points = sweep("holder", 0, root, "stall_sweep")
    assert points >= 24
    covered(points)
