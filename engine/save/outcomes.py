"""What becomes of saves: the handle of each, and whether training continues after a failure.

A failure of storage or coordination may not occur again: by default it is logged, and the next save tries
again. A state that cannot be saved stays so: that failure is always raised.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from engine.directory.record import CheckpointRecord
from engine.errors import SaveFailedError, SaveStuckError, may_pass
from engine.forks import Home
from engine.options import FailurePolicy


class SaveHandle:
    """One save: in flight, done, or skipped. Safe to use from any thread.

    Attributes:
        step: the step that is being saved.
        skipped: nothing was saved: the previous save was still being written, and `busy` is "skip".
        most_secs: after this time every deadline of the save has passed.
    """

    def __init__(self, step: int, *, skipped: bool = False, most_secs: float | None = None) -> None:
        self.step = step
        self.skipped = skipped
        self.most_secs = most_secs
        self._future: Future[CheckpointRecord | None] = Future()
        self._lock = threading.Lock()
        self._reported = False
        """Whether the caller has received the failure."""
        self._home = Home()
        if skipped:
            self._future.set_result(None)

    def done(self) -> bool:
        """Whether the save is committed, has failed, or was skipped."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> CheckpointRecord | None:
        """Wait for the record of the committed checkpoint; None for a skipped save.

        Raises: SaveFailedError with the cause; TimeoutError after `timeout` seconds; SaveStuckError when the
            save hangs in a call that never returns.
        """
        if self._home.left and not self._future.done():
            raise SaveFailedError(
                f"the save of step {self.step} belongs to process {self._home.pid}, and a forked child "
                "cannot learn its outcome: ask for it in the parent"
            )
        try:
            return self._future.result(self.most_secs if timeout is None else timeout)
        except SaveFailedError:
            self.mark_reported()
            raise
        except FutureTimeoutError:
            if timeout is None:
                raise SaveStuckError(
                    f"the save of step {self.step} has no outcome after {self.most_secs:g} s of waiting: its "
                    "storage does not answer. Check the kernel log and the mount"
                ) from None
            raise TimeoutError(f"the save of step {self.step} is not done after {timeout:g} s") from None

    def unreported_failure(self) -> SaveFailedError | None:
        """The failure, unless there is none or the caller has received it. Never waits."""
        error = self._future.exception() if self._future.done() else None
        with self._lock:
            return error if isinstance(error, SaveFailedError) and not self._reported else None

    def take_failure(self) -> SaveFailedError | None:
        """The same, and the failure counts as reported from now on."""
        error = self.unreported_failure()
        if error is not None:
            self.mark_reported()
        return error

    def mark_reported(self) -> None:
        """The caller has received the failure."""
        with self._lock:
            self._reported = True

    def failed(self) -> bool:
        """Whether the save is done and has failed."""
        return self._future.done() and self._future.exception() is not None

    def set_record(self, record: CheckpointRecord) -> None:
        """The save is committed."""
        self._future.set_result(record)

    def set_failure(self, error: SaveFailedError) -> None:
        """The save has failed."""
        self._future.set_exception(error)


@dataclass(slots=True)
class Outcomes:
    """The outcomes of one Checkpointer's saves, as this rank knows them.

    policy: whether training continues after a failure that may pass, and after how many in a row.
    """

    policy: FailurePolicy
    failed: int = 0
    """How many saves in a row have failed, up to and including the newest."""
    last_committed: CheckpointRecord | None = None

    def note(self, record: CheckpointRecord | None) -> None:
        """Count a save that is committed, or, for None, has failed."""
        if record is None:
            self.failed += 1
        else:
            self.failed, self.last_committed = 0, record

    def tolerates(self, error: BaseException, *, uncounted: int = 0) -> bool:
        """Whether training continues after this failure. `uncounted`: failures still to be noted."""
        if self.policy.on_failure == "raise" or not may_pass(error):
            return False
        return self.failed + uncounted < self.policy.max_failures

    def final(self, failure: SaveFailedError) -> SaveFailedError:
        """The error to raise for a failure that is not tolerated."""
        if self.policy.on_failure == "raise" or not may_pass(failure):
            return failure
        count = f"{self.failed} save{'s' * (self.failed != 1)} in a row failed"
        last = SaveFailedError(f"{count} (max_failures={self.policy.max_failures}), the last one: {failure}")
        last.__cause__ = failure
        return last
