"""What became of the saves so far, and whether training goes on after one that failed.

A failure of storage or coordination may have passed by the next save: by default it is logged, and the next
save tries again. A state that cannot be saved stays so: that is always raised.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterable
from dataclasses import dataclass

from engine import errors
from engine.directory.record import CheckpointRecord
from engine.errors import HoldfastError, SaveFailedError
from engine.options import FailurePolicy


@dataclass(slots=True)
class Outcomes:
    """The saves of one Checkpointer, as this rank knows them.

    policy: whether training goes on after a failure that may pass, and how often in a row.
    """

    policy: FailurePolicy
    failed: int = 0
    """How many in a row have failed, up to the newest."""
    last_committed: CheckpointRecord | None = None

    def note(self, record: CheckpointRecord | None) -> None:
        """A save is committed, or has failed."""
        if record is None:
            self.failed += 1
        else:
            self.failed, self.last_committed = 0, record

    def endures(self, error: BaseException, *, more: int = 0) -> bool:
        """Whether training goes on after this failure. `more`: that many are yet to be noted, with it."""
        if self.policy.on_failure == "raise" or not may_pass(error):
            return False
        return self.failed + more < self.policy.max_failures

    def final(self, failure: SaveFailedError) -> SaveFailedError:
        """What to raise for a failure that is not endured."""
        if self.policy.on_failure == "raise" or not may_pass(failure):
            return failure
        count = f"{self.failed} save{'s' * (self.failed != 1)} in a row failed"
        last = SaveFailedError(f"{count} (max_failures={self.policy.max_failures}), the last one: {failure}")
        last.__cause__ = failure
        return last


def may_pass(error: BaseException) -> bool:
    """Whether a later save may succeed although this error came."""
    return error.may_pass if isinstance(error, HoldfastError) else isinstance(error, OSError)


def all_may_pass(descriptions: Iterable[str]) -> bool:
    """The same of failures as ranks describe them to each other: "Kind: message"."""
    return all(_kind_may_pass(description.partition(":")[0]) for description in descriptions)


def _kind_may_pass(name: str) -> bool:
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if not isinstance(kind, type):
        return False
    return kind.may_pass if issubclass(kind, HoldfastError) else issubclass(kind, OSError)
