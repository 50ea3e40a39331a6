"""Every error that this package raises on purpose, in one tree.

Programs print the message and exit with code 2; each message says what happened, to which file, and what to
do.

    DataError (ValueError)
    ├── SourceError                        text to prepare cannot be found, read or decoded
    ├── OutputError (OSError)              the prepared dataset cannot be written where it should go
    ├── DatasetNotFoundError (FileNotFoundError)   no dataset, or not the split asked for
    ├── ShardError                         a shard or its description is damaged or of another format
    ├── DatasetChangedError                not the dataset that a loader's state was taken on
    └── BatchError                         sequences, batches and ranks do not fit together
"""

from __future__ import annotations


class DataError(ValueError):
    """Base of every error that this package raises on purpose."""


class SourceError(DataError):
    """Text to prepare cannot be found, read or decoded."""


class OutputError(DataError, OSError):
    """The prepared dataset cannot be written where it should go."""


class DatasetNotFoundError(DataError, FileNotFoundError):
    """There is no dataset in the folder, or it lacks the split asked for."""


class ShardError(DataError):
    """A shard, or the file that describes the shards, is damaged or of another format."""


class DatasetChangedError(DataError):
    """The dataset is not the one that a loader's state was taken on; the message has both fingerprints."""


class BatchError(DataError):
    """Sequences, batches and ranks do not fit together; the message shows the arithmetic."""
