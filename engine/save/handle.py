"""What `save` returns, and how a failure reaches whoever did not ask."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from engine.directory.record import CheckpointRecord
from engine.errors import SaveFailedError, SaveStuckError
from engine.forks import Home


class SaveHandle:
    """One save in flight, done, or skipped. Safe to use from any thread.

    Attributes:
        step: the step that is being saved.
        skipped: the policy is `skip` and the one before was still being written; nothing was saved.
        most_secs: by then every deadline of the save has passed, whatever it is doing.
    """

    def __init__(self, step: int, *, skipped: bool = False, most_secs: float | None = None) -> None:
        self.step = step
        self.skipped = skipped
        self.most_secs = most_secs
        self._future: Future[CheckpointRecord | None] = Future()
        self._lock = threading.Lock()
        self._delivered = False
        self._home = Home()
        if skipped:
            self._future.set_result(None)

    def done(self) -> bool:
        """Whether the save has been committed, has failed, or was skipped."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> CheckpointRecord | None:
        """Wait for the committed record; None for a skipped save.

        Raises: SaveFailedError with the cause; TimeoutError when it takes longer than `timeout` seconds;
            SaveStuckError when it hangs in a call that never returns.
        """
        if self._home.left and not self._future.done():
            raise SaveFailedError(
                f"the save of step {self.step} belongs to process {self._home.pid}, and its outcome does "
                "not reach a forked child: ask for it in the parent"
            )
        try:
            record = self._future.result(self.most_secs if timeout is None else timeout)
        except SaveFailedError:
            with self._lock:
                self._delivered = True
            raise
        except FutureTimeoutError:
            if timeout is None:
                raise SaveStuckError(
                    f"the save of step {self.step} has no outcome after {self.most_secs:g} s of waiting: its "
                    "storage does not answer. Look at the kernel log and the mount"
                ) from None
            raise TimeoutError(f"the save of step {self.step} is not done after {timeout:g} s") from None
        return record

    def untold_failure(self) -> SaveFailedError | None:
        """The failure, if there is one that nobody has been told of yet. Never waits."""
        error = self._future.exception() if self._future.done() else None
        with self._lock:
            return error if isinstance(error, SaveFailedError) and not self._delivered else None

    def take_failure(self) -> SaveFailedError | None:
        """The same, and whoever asks is told with it."""
        error = self.untold_failure()
        if error is not None:
            self.mark_told()
        return error

    def mark_told(self) -> None:
        """Whoever asked for the save has its failure already."""
        with self._lock:
            self._delivered = True

    def failed(self) -> bool:
        """Whether the save is done and has failed."""
        return self._future.done() and self._future.exception() is not None

    def set_record(self, record: CheckpointRecord) -> None:
        """The save is committed."""
        self._future.set_result(record)

    def set_failure(self, error: SaveFailedError) -> None:
        """The save has failed."""
        self._future.set_exception(error)
