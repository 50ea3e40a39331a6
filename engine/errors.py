"""Every error that Holdfast raises on purpose, in one tree.

Each class also derives from the builtin that fits, so that code which knows nothing of Holdfast still
catches it as it would expect:

    HoldfastError (Exception)
    ├── ConfigError (ValueError)                 a flag or argument that cannot work
    │   └── UnsupportedPlatformError             not Linux
    ├── StateError (ValueError)                  the training state cannot be saved or restored as it is
    │   ├── UnsavableValueError (TypeError)      neither a tensor nor JSON, named by its key path
    │   ├── ReplicaMismatchError (SaveFailedError)  a value that must be equal on all ranks differs
    │   ├── TornSnapshotError                    the state changed while its snapshot was taken
    │   └── StateMismatchError                   checkpoint and destination do not fit; lists every tensor
    ├── SelectorError (LookupError)              no checkpoint answers to this name; lists what there is
    ├── DamagedError (ValueError)                bytes on disk are not what was written
    │   ├── HostilePathError                     a stored path that would leave the checkpoint
    │   └── NewerFormatError                     written by a newer Holdfast
    ├── StorageError (OSError)                   the directory or store did not do as told
    │   ├── NotFoundError (FileNotFoundError)
    │   ├── AlreadyExistsError (FileExistsError)
    │   ├── StorageFullError
    │   ├── StorageDeniedError (PermissionError)
    │   ├── NotOursError                     a link, a mount: not Holdfast's to change
    │   └── StorageUnavailableError              may succeed when tried again
    ├── DirectoryHeldError (RuntimeError)        another run writes to this directory
    ├── LeaseLostError (RuntimeError)            another run took the directory over
    ├── CoordinationError (RuntimeError)         ranks did not agree in time
    │   ├── LateRanksError (TimeoutError)        names the ranks that are late
    │   └── PeerFailedError                      another rank failed; carries its cause
    ├── SaveFailedError (RuntimeError)           a save did not commit; carries its cause
    │   └── SaveStuckError                       it hangs in a call that never returns
    ├── RestoreFailedError (RuntimeError)        a restore broke off; the state is undefined
    └── MemoryBudgetError (MemoryError)          the snapshot would not fit the budget
"""

from __future__ import annotations


class HoldfastError(Exception):
    """Base of every error that Holdfast raises on purpose.

    may_pass: whether a save that failed for it may succeed when it is tried again with the same state.
    """

    may_pass: bool = False


class ConfigError(HoldfastError, ValueError):
    """A flag or argument that cannot work."""


class UnsupportedPlatformError(ConfigError):
    """Holdfast runs on Linux only."""


class StateError(HoldfastError, ValueError):
    """The training state cannot be saved or restored as it is."""


class UnsavableValueError(StateError, TypeError):
    """A value in the state is neither a tensor nor JSON."""


class TornSnapshotError(StateError):
    """What was written is not the state of one moment; found on demand only (check_snapshots)."""


class StateMismatchError(StateError):
    """Checkpoint and destination do not fit; the message lists every tensor that differs."""


class SelectorError(HoldfastError, LookupError):
    """No checkpoint answers to a selector; the message lists what there is."""


class DamagedError(HoldfastError, ValueError):
    """Bytes in storage are not the bytes that were written, or break the format."""

    may_pass = True


class HostilePathError(DamagedError):
    """A stored path would leave the checkpoint directory."""


class NewerFormatError(DamagedError):
    """The checkpoint was written by a newer Holdfast."""


class StorageError(HoldfastError, OSError):
    """The directory or object store did not do as told."""

    may_pass = True


class NotFoundError(StorageError, FileNotFoundError):
    """The path does not exist, definitely."""


class AlreadyExistsError(StorageError, FileExistsError):
    """An exclusive creation found the path taken."""


class StorageFullError(StorageError):
    """No space, or the quota is used up."""


class StorageDeniedError(StorageError, PermissionError):
    """No permission, a read-only file system, or wrong credentials."""


class NotOursError(StorageError):
    """Holdfast was about to write or delete at a symbolic link or a mount, and left it alone."""


class StorageUnavailableError(StorageError):
    """The storage did not answer; the same call may succeed later."""


class DirectoryHeldError(HoldfastError, RuntimeError):
    """Another run holds the lease of this checkpoint directory."""


class LeaseLostError(HoldfastError, RuntimeError):
    """Another run has taken this checkpoint directory over."""


class CoordinationError(HoldfastError, RuntimeError):
    """The ranks did not come to an agreement."""

    may_pass = True


class LateRanksError(CoordinationError, TimeoutError):
    """Some ranks did not report before the deadline; the message names them, `ranks` where known."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


class PeerFailedError(CoordinationError):
    """Another rank failed; the message carries its cause, `may_pass` what that is."""

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class SaveFailedError(HoldfastError, RuntimeError):
    """A save did not commit; the message carries the cause, `may_pass` what that is."""

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class SaveStuckError(SaveFailedError):
    """A save hangs beyond every deadline, in a call that never returns; the message says at what."""


class ReplicaMismatchError(StateError, SaveFailedError):
    """A value that must be equal on several ranks differs. Every rank gets it as its save failure."""

    def __init__(self, message: str) -> None:
        SaveFailedError.__init__(self, message, may_pass=False)


class RestoreFailedError(HoldfastError, RuntimeError):
    """A restore broke off half-way: the state in memory is undefined."""


class MemoryBudgetError(HoldfastError, MemoryError):
    """The snapshot would need more host memory than its budget."""
