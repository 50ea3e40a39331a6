"""How far the arena holds the current snapshot, so that writing can follow copying.

And what copying found on the way: the digests of whole files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Filling:
    """Bytes [0, reached) of the arena belong to the snapshot. The copying thread advances, the writer waits.

    Args:
        settle: called by the waiter once the bytes are there: waits for a device's copies.
    """

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self._changed = threading.Condition()
        self._settle = settle
        self._reached = 0
        self._error: BaseException | None = None
        self._digests: dict[str, bytes] = {}

    def note_digests(self, file: str, packed: bytes) -> None:
        """The digests of all blocks of a file, taken while it was copied. Before `advance` to its end."""
        self._digests[file] = packed

    def digests_of(self, file: str) -> bytes | None:
        """What was noted of a file, None if nothing was. After `wait_until` its end."""
        return self._digests.get(file)

    def advance(self, reached_bytes: int) -> None:
        """Everything before `reached_bytes` has been copied, or its copy has been started."""
        with self._changed:
            self._reached = max(self._reached, reached_bytes)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The snapshot will not be completed; whoever waits for it gets the error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def wait_until(self, end_bytes: int) -> None:
        """Return once bytes [0, end_bytes) are there. Raises what `fail` was given."""
        with self._changed:
            self._changed.wait_for(lambda: self._reached >= end_bytes or self._error is not None)
            if self._error is not None:
                raise self._error
        self._settle()
