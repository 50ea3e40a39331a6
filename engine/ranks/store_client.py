"""A store client whose every call ends in time, even if the process that hosts the store is frozen.

torch's client waits for the server without a limit: in `set`, `get` and `check`, and even when a `wait` times
out, because the server has to confirm that (TCPStore.cpp, `doWait`, "we expect the server to respond in a
timely fashion"). A rank 0 that is stopped, swapped out or cut off without a reset would block every other
rank forever. So a thread of its own makes the calls, and the caller waits for it with a limit.
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
"""A running server answers within this time, even on a busy machine."""

_Asked = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]


class Store(Protocol):
    """The part of torch's Store that ranks use."""

    def set(self, key: str, value: bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def delete_key(self, key: str, /) -> bool: ...


class AnsweringStore:
    """A `Store` that wraps another one. For one thread at a time, like the client it wraps.

    Raises: the store's own errors. Without an answer, dist.DistStoreError from `wait` and
        dist.DistNetworkError from the other calls; the call may still take effect later.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        # A daemon thread without a reference to this object: it ends with the object, and nothing joins it.
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
            future.cancel()  # no effect on a call that is running: its answer is then ignored
            raise _NoAnswer(f"the store did not answer within {within_secs:g} s") from None


class _NoAnswer(dist.DistNetworkError):
    """The server does not answer, although the connection may be alive."""


def _serve(asked: queue.SimpleQueue[_Asked | None]) -> None:
    while (entry := asked.get()) is not None:
        future, call, arguments = entry
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call(*arguments))
            except BaseException as error:
                future.set_exception(error)
        del entry, future, call, arguments  # they keep the store, and so its connection, alive
