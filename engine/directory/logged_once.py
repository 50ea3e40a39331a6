"""Log each message once, although clean-up runs after every save."""

from __future__ import annotations

import threading

_MAX_REMEMBERED = 4096
_logged: dict[tuple[str, ...], None] = {}
_lock = threading.Lock()


def first_time(*about: str) -> bool:
    """Whether this process has not logged it yet. It remembers the last 4096."""
    with _lock:
        if about in _logged:
            return False
        _logged[about] = None
        if len(_logged) > _MAX_REMEMBERED:
            del _logged[next(iter(_logged))]
        return True
