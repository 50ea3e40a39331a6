"""What has been logged: clean-up runs after every save, and logs the same thing once."""

from __future__ import annotations

import threading

_MOST = 4096
_said: dict[tuple[str, ...], None] = {}
_lock = threading.Lock()


def first_time(*about: str) -> bool:
    """Whether this process has not said it yet. Of very many things the oldest are forgotten."""
    with _lock:
        if about in _said:
            return False
        _said[about] = None
        if len(_said) > _MOST:
            del _said[next(iter(_said))]
        return True
