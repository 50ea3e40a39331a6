"""What rank 0 tells the person at the terminal: one line now and then, and one for every checkpoint."""

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
    """Prints on rank 0, and nowhere else."""

    def __init__(
        self, *, speaks: bool, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._speaks, self._out, self._clock = speaks, out, clock
        self._shown_at = float("-inf")

    def say(self, line: str) -> None:
        """Print a line at once. A terminal that is gone, or a full disk behind it, costs the line only."""
        if self._speaks:
            with contextlib.suppress(OSError):
                print(line, file=self._out or sys.stdout, flush=True)

    def progress(self, event: Event, last_step: int, *, force: bool = False) -> None:
        """A line for a `step` event, at most one a second unless `force`."""
        now = self._clock()
        if not force and now - self._shown_at < PROGRESS_SECS:
            return
        self._shown_at = now
        self.say(
            f"step {event['step']}/{last_step} | loss {event['loss']:.4f} | lr {event['lr']:.2e} | "
            f"{event['step_secs'] * 1e3:.0f} ms | {event['step_tokens'] / event['step_secs']:,.0f} tokens/s"
        )

    def checkpoint(self, event: Event) -> None:
        """A line for what became of a save or a restore."""
        line = checkpoint_line(event)
        if line:
            self.say(line)


def checkpoint_line(event: Event) -> str | None:
    """The line for an event of the engine, None for one that says nothing new to a person."""
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
            owed = f", {event['owed']} still owed" if event.get("owed") else ""
            took = f"{event['secs']:.2f} s"
            return f"mirror: step {step} copied, {part}{size} in {took}{owed} -> {event['path']}"
        case "mirror_failed":
            return f"mirror: FAILED, {event['owed']} owed: {event.get('cause')}"
        case "restored":
            return f"restored: step {step}{' from ' + str(event['path']) if event.get('path') else ''}"
    return None


def _size(count: int | None) -> str:
    return "unknown size" if count is None else readable_bytes(count)
