"""A store client whose every call ends in time, also while the process that hosts the store stands still.

torch's client waits for the server's word without a limit: in `set`, `get`, `check`, and even when it gives a
`wait` up, whose end the server has to confirm (TCPStore.cpp, `doWait`, "we expect the server to respond in a
timely fashion"). A rank 0 that is stopped, swapped out or cut off without a reset would hold every other rank
for ever. So the calls are made by a thread of their own, and whoever asks waits only so long.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

ANSWER_SECS = 15.0
"""Within which a server that runs has answered, on the busiest of machines."""

_Asked = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Store(Protocol):
    """The part of torch's Store that ranks use."""

    def set(self, key: str, value: bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def delete_key(self, key: str, /) -> bool: ...


class AnsweringStore:
    """`Store` in front of another one. For one thread at a time, like the client behind it.

    Raises: besides what the store raises, dist.DistStoreError from `wait` and dist.DistNetworkError from all
        else when there is no answer. The call may still take effect later.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        # A daemon, and without a reference to this object: it ends with it, and nobody waits for it.
        threading.Thread(target=_serve, args=(self._asked,), name="store-client", daemon=True).start()
        weakref.finalize(self, self._asked.put, None)

    def set(self, key: str, value: bytes, /) -> None:
        self._ask(ANSWER_SECS, self._store.set, key, value)

    def get(self, key: str, /) -> bytes:
        value: bytes = self._ask(ANSWER_SECS, self._store.get, key)
        return value

    def wait(self, keys: list[str], timeout: timedelta, /) -> None:
        try:
            self._ask(timeout.total_seconds() + ANSWER_SECS, self._store.wait, keys, timeout)
        except _NoAnswer as error:
            raise dist.DistStoreError(str(error)) from None

    def check(self, keys: list[str], /) -> bool:
        return bool(self._ask(ANSWER_SECS, self._store.check, keys))

    def delete_key(self, key: str, /) -> bool:
        return bool(self._ask(ANSWER_SECS, self._store.delete_key, key))

    def _ask(self, within_secs: float, call: Callable[..., Any], *arguments: Any) -> Any:
        future: Future[Any] = Future()
        self._asked.put((future, call, arguments))
        try:
            return future.result(within_secs)
        except FutureTimeoutError:
            future.cancel()  # unless it is being made: then its answer will be nobody's
            raise _NoAnswer(f"the store did not answer within {within_secs:g} s") from None


class _NoAnswer(dist.DistNetworkError):
    """The server is silent; the connection may be there."""


def _serve(asked: queue.SimpleQueue[_Asked | None]) -> None:
    while (entry := asked.get()) is not None:
        future, call, arguments = entry
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del entry, future, call, arguments  # they hold the store, which holds the connection
