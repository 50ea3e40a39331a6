"""Ranks as threads of this process, talking over a store of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from engine.ranks.coordination import Channel

DEADLINE_SECS = 60.0


class MemoryStore:
    """What a channel needs of torch's TCPStore. `wait` blocks until the key is set, like the real one."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.changed = threading.Condition()

    def set(self, key: str, value: bytes, /) -> None:
        with self.changed:
            self.values[key] = value
            self.changed.notify_all()

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.check(keys), timeout.total_seconds()):
                raise dist.DistStoreError(f"{keys} were not set in time")

    def check(self, keys: list[str], /) -> bool:
        return all(key in self.values for key in keys)

    def delete_key(self, key: str, /) -> bool:
        return self.values.pop(key, None) is not None


class ImpatientStore(MemoryStore):
    """Whatever is not there at once never comes: time passes on the test's own clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.waits: list[float] = []

    def clock(self) -> float:
        return self.now

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        self.waits.append(timeout.total_seconds())
        if not self.check(keys):
            self.now += timeout.total_seconds()
            raise dist.DistStoreError(f"{keys} were not set in time")


class BrokenStore(MemoryStore):
    """The connection is gone."""

    def _gone(self, *arguments: Any) -> Any:
        raise dist.DistNetworkError("connection reset by peer")

    set = get = wait = check = delete_key = _gone


def on_ranks(world_size: int, work: Callable[[Channel], Any], store: MemoryStore | None = None) -> list[Any]:
    """Run `work` on that many ranks at once. Returns each rank's result, or what it raised."""
    shared = store or MemoryStore()

    def run(rank: int) -> Any:
        try:
            return work(Channel(rank, world_size, shared if world_size > 1 else None))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return [future.result(DEADLINE_SECS) for future in [pool.submit(run, r) for r in range(world_size)]]
