"""The events of a save, and the listener that receives them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]


def guarded(listener: Listener | None) -> Listener:
    """A listener that never raises: its errors are logged, so that one rank's listener cannot stop that rank.

    For None, a listener that does nothing.
    """

    def call(event: dict[str, Any]) -> None:
        if listener is not None:
            try:
                listener(event)
            except Exception:
                log.exception("the on_event listener failed on %s", event)

    return call


def started(step: int, reasons: Sequence[str]) -> dict[str, Any]:
    """`save` has begun."""
    return {"event": "save_started", "step": step, "reasons": list(reasons)}


def snapshotted(step: int, blocked_secs: float, size_bytes: int, secs: Mapping[str, float]) -> dict[str, Any]:
    """`save` returns: training was blocked for so long."""
    causes = [cause for cause in ("wait", "capture", "compare", "copy") if cause in secs]
    return {
        "event": "save_snapshotted",
        "step": step,
        "blocked_secs": blocked_secs,
        "bytes": size_bytes,
        "secs_by_cause": {cause: round(secs[cause], 6) for cause in causes},
    }


def ended(
    event: str,
    step: int,
    reasons: Sequence[str],
    *,
    blocked_secs: float,
    total_secs: float,
    secs: Mapping[str, float],
    size_bytes: int,
    **more: Any,
) -> dict[str, Any]:
    """The save is committed or has failed."""
    return {
        "event": event,
        "step": step,
        "blocked_secs": blocked_secs,
        "secs": total_secs,
        "reasons": list(reasons),
        "secs_by_cause": {cause: round(value, 6) for cause, value in secs.items()},
        "bytes": size_bytes,
        **more,
    }
