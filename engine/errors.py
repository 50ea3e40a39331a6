"""Every error that Holdfast raises on purpose, in one tree.

Each class also derives from the builtin that fits, so code that knows nothing of Holdfast catches it too:

    HoldfastError (Exception)
    ├── ConfigError (ValueError)                 a flag or argument that cannot work
    │   └── UnsupportedPlatformError             not Linux
    ├── StateError (ValueError)                  the training state cannot be saved or restored
    │   ├── UnsavableValueError (TypeError)      a value is neither a tensor nor JSON; names its key path
    │   ├── ReplicaMismatchError (SaveFailedError)  a value that must be equal on all ranks differs
    │   ├── TornSnapshotError                    the state changed while its snapshot was taken
    │   └── StateMismatchError                   checkpoint and live state do not match; lists every tensor
    ├── SelectorError (LookupError)              no checkpoint matches the selector; lists those there are
    ├── DamagedError (ValueError)                stored bytes differ from those written
    │   ├── HostilePathError                     a stored path leads out of the checkpoint
    │   └── NewerFormatError                     written by a newer Holdfast
    ├── StorageError (OSError)                   an operation on the directory or store failed
    │   ├── NotFoundError (FileNotFoundError)
    │   ├── AlreadyExistsError (FileExistsError)
    │   ├── StorageFullError
    │   ├── StorageDeniedError (PermissionError)
    │   ├── NotOursError                         a symbolic link or mount that Holdfast must not change
    │   └── StorageUnavailableError              no answer; a retry may succeed
    ├── DirectoryHeldError (RuntimeError)        another run writes to this directory
    ├── LeaseLostError (RuntimeError)            another run took over the directory
    ├── CoordinationError (RuntimeError)         the ranks could not coordinate
    │   ├── LateRanksError (TimeoutError)        some ranks missed the deadline; names them
    │   └── PeerFailedError                      another rank failed; says why
    ├── SaveFailedError (RuntimeError)           a save did not commit; says why
    │   └── SaveStuckError                       a save hangs in a call that never returns
    ├── RestoreFailedError (RuntimeError)        a restore stopped halfway; the state is undefined
    └── MemoryBudgetError (MemoryError)          the snapshot exceeds the memory budget
"""

from __future__ import annotations


class HoldfastError(Exception):
    """Base of every error that Holdfast raises on purpose.

    may_pass: whether a later save of the same state may succeed.
    """

    may_pass: bool = False


class ConfigError(HoldfastError, ValueError):
    """A flag or argument that cannot work."""


class UnsupportedPlatformError(ConfigError):
    """Holdfast runs on Linux only."""


class StateError(HoldfastError, ValueError):
    """The training state cannot be saved or restored."""


class UnsavableValueError(StateError, TypeError):
    """A value in the state is neither a tensor nor JSON."""


class TornSnapshotError(StateError):
    """The state changed while its snapshot was taken. Only `check_snapshots` finds this."""


class StateMismatchError(StateError):
    """Checkpoint and live state do not match; the message lists every tensor that differs."""


class SelectorError(HoldfastError, LookupError):
    """No checkpoint matches a selector; the message lists the checkpoints there are."""


class DamagedError(HoldfastError, ValueError):
    """Stored bytes differ from those written, or break the format."""

    may_pass = True


class HostilePathError(DamagedError):
    """A stored path leads out of the checkpoint directory."""


class NewerFormatError(DamagedError):
    """The checkpoint was written by a newer Holdfast."""


class StorageError(HoldfastError, OSError):
    """An operation on the directory or object store failed."""

    may_pass = True


class NotFoundError(StorageError, FileNotFoundError):
    """The path does not exist. Never raised for an outage."""


class AlreadyExistsError(StorageError, FileExistsError):
    """A file that had to be new exists already."""


class StorageFullError(StorageError):
    """No space is left, or the quota is used up."""


class StorageDeniedError(StorageError, PermissionError):
    """Permission denied, read-only file system, or wrong credentials."""


class NotOursError(StorageError):
    """Holdfast refused to write to or delete a symbolic link or a mount."""


class StorageUnavailableError(StorageError):
    """The storage did not answer; a retry may succeed."""


class DirectoryHeldError(HoldfastError, RuntimeError):
    """Another run holds the lease of this checkpoint directory."""


class LeaseLostError(HoldfastError, RuntimeError):
    """Another run has taken over this checkpoint directory."""


class CoordinationError(HoldfastError, RuntimeError):
    """The ranks could not coordinate."""

    may_pass = True


class LateRanksError(CoordinationError, TimeoutError):
    """Some ranks missed the deadline; the message names them, `ranks` lists them where known."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class PeerFailedError(CoordinationError):
    """Another rank failed; the message says why, and `may_pass` is that failure's."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class SaveFailedError(HoldfastError, RuntimeError):
    """A save did not commit; the message says why, and `may_pass` is the cause's."""

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class SaveStuckError(SaveFailedError):
    """A save is past every deadline, in a call that never returns; the message says in what it hangs."""


class ReplicaMismatchError(StateError, SaveFailedError):
    """A value that must be equal on several ranks differs. The save fails with it on every rank."""

    def __init__(self, message: str) -> None:
        SaveFailedError.__init__(self, message, may_pass=False)


class RestoreFailedError(HoldfastError, RuntimeError):
    """A restore stopped halfway: the state in memory is undefined."""


class MemoryBudgetError(HoldfastError, MemoryError):
    """The snapshot needs more host memory than its budget allows."""


def may_pass(error: BaseException) -> bool:
    """Whether a later save of the same state may succeed after this error."""
    return error.may_pass if isinstance(error, HoldfastError) else isinstance(error, OSError)
