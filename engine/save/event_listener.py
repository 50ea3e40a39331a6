"""Whoever listens to the events. Its own failure is logged: on one rank alone it must stop nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]


def guarded(listener: Listener | None) -> Listener:
    """The listener, which no longer raises; one that does nothing for None."""

    def call(event: dict[str, Any]) -> None:
        if listener is not None:
            try:
                listener(event)
            except Exception:
                log.exception("a listener failed on %s", event["event"])

    return call
