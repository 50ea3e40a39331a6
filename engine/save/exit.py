"""Saves that nobody waited for finish before the interpreter takes its thread pools away.

`atexit` would be too late: at exit the interpreter first shuts down concurrent.futures, then joins threads,
then runs `atexit`. A save still being written would find that it can no longer start the threads that it
writes with.
"""

from __future__ import annotations

# Imported for its own hook, which has to be registered before ours: hooks run last in, first out.
import concurrent.futures.thread  # noqa: F401
import itertools
import threading
from collections.abc import Callable

_waiting: dict[int, Callable[[], None]] = {}
_numbers = itertools.count()
_lock = threading.Lock()
_registered = False


def call_at_exit(finish: Callable[[], None]) -> Callable[[], None]:
    """Have `finish` called when the main thread has ended. Returns what takes it back again."""
    global _registered
    with _lock:
        number = next(_numbers)
        _waiting[number] = finish
        if not _registered:
            # Underscored, but concurrent.futures has no other way either; a test notices when it moves.
            threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
            _registered = True

    def forget() -> None:
        with _lock:
            _waiting.pop(number, None)

    return forget


def _finish_all() -> None:
    while True:
        with _lock:
            if not _waiting:
                return
            _, finish = _waiting.popitem()
        finish()
