"""The short version of `make soak`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.faults.soak import soak


@pytest.mark.slow
def test_saves_with_random_faults_and_restarts(covered: Callable[[int], None]) -> None:
    count = soak(300, 90.0, seed=1)
    assert count["failed"] > 20
    assert count["committed"] > 20
    covered(count["saves"])
