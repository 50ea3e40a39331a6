"""Ranks by world size, started when first asked for and kept for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], Ranks]]:
    """world(n) is a process group of n ranks. One that has failed is started anew."""
    started: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        if world_size not in started or started[world_size].closed:
            started[world_size] = Ranks(world_size)
        return started[world_size]

    yield get
    for ranks in started.values():
        ranks.close()
