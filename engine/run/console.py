"""Console output of rank 0: a progress line about once a second, and a line per checkpoint."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TextIO

from engine.run.events import Event
from engine.text import readable_bytes

PROGRESS_SECS = 1.0


class Console:
    """Prints on rank 0 only (`speaks`)."""

    def __init__(
        self, *, speaks: bool, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._speaks, self._out, self._clock = speaks, out, clock
        self._shown_at = float("-inf")

    def say(self, line: str) -> None:
        """Print and flush a line. If the terminal is gone or its disk full, only the line is lost."""
        if self._speaks:
            with contextlib.suppress(OSError):
                print(line, file=self._out or sys.stdout, flush=True)

    def progress(self, event: Event, last_step: int, *, force: bool = False) -> None:
        """Print a `step` event, at most once a second unless `force`."""
        now = self._clock()
        if not force and now - self._shown_at < PROGRESS_SECS:
            return
        self._shown_at = now
        self.say(
            f"step {event['step']}/{last_step} | loss {event['loss']:.4f} | lr {event['lr']:.2e} | "
            f"{event['step_secs'] * 1e3:.0f} ms | {event['step_tokens'] / event['step_secs']:,.0f} tokens/s"
        )

    def checkpoint(self, event: Event) -> None:
        """Print the outcome of a save, a copy to the mirror, or a restore."""
        line = checkpoint_line(event)
        if line:
            self.say(line)


def checkpoint_line(event: Event) -> str | None:
    """The line for an engine event, or None if the event is not worth a line."""
    step, reasons = event.get("step"), ", ".join(event.get("reasons") or ())
    why = f" ({reasons})" if reasons else ""
    match event.get("event"):
        case "save_committed":
            size, secs = _size(event.get("bytes")), event.get("secs")
            took = f" in {secs:.2f} s" if secs is not None else ""
            blocked = event.get("blocked_secs")
            waited = f", training waited {blocked:.2f} s" if blocked is not None else ""
            where = f" -> {event['path']}" if event.get("path") else ""
            return f"checkpoint: step {step}{why} committed, {size}{took}{waited}{where}"
        case "save_failed":
            return f"checkpoint: step {step}{why} FAILED: {event.get('cause')}"
        case "mirror_copied":
            size, sent = _size(event.get("bytes")), event.get("sent_bytes")
            part = f"{readable_bytes(sent)} of " if sent not in (None, event.get("bytes")) else ""
            pending = f", {event['owed']} pending" if event.get("owed") else ""
            took = f"{event['secs']:.2f} s"
            return f"mirror: step {step} copied, {part}{size} in {took}{pending} -> {event['path']}"
        case "mirror_failed":
            return f"mirror: FAILED, {event['owed']} pending: {event.get('cause')}"
        case "restored":
            return f"restored: step {step}{' from ' + str(event['path']) if event.get('path') else ''}"
    return None


def _size(count: int | None) -> str:
    return "unknown size" if count is None else readable_bytes(count)
