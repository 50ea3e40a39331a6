"""Ranks by world size, started when first asked for and kept as long as the session.

Process groups that tests make (meshes, subgroups) keep three threads each until their process ends: ranks
that have gathered many of them are started anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.ranks import Ranks

MOST_THREADS = 60


@pytest.fixture(scope="session")
def world() -> Iterator[Callable[[int], Ranks]]:
    """world(n) is a process group of n ranks. One that has failed, or has many threads, is started anew."""
    started: dict[int, Ranks] = {}

    def get(world_size: int) -> Ranks:
        ranks = started.get(world_size)
        if ranks is not None and not ranks.closed and ranks.threads() > MOST_THREADS:
            ranks.close()
        if ranks is None or ranks.closed:
            started[world_size] = Ranks(world_size)
        return started[world_size]

    yield get
    for ranks in started.values():
        ranks.close()
