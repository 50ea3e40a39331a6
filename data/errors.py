"""Every error that this package raises on purpose, in one tree.

Programs print the message and exit with status 2. Each message says what happened, to which file, and what to
do next.

    DataError (ValueError)
    ├── SourceError                        source text cannot be found, read or decoded
    ├── OutputError (OSError)              the prepared dataset cannot be written to its folder
    ├── DatasetNotFoundError (FileNotFoundError)   no dataset, or no such split
    ├── ShardError                         a shard or its description is damaged or in an unknown format
    ├── DatasetChangedError                the dataset differs from the one in a loader's saved state
    └── BatchError                         sequences, batches and ranks do not divide evenly
"""

from __future__ import annotations


class DataError(ValueError):
    """Base of every error that this package raises on purpose."""


class SourceError(DataError):
    """Source text cannot be found, read or decoded."""


class OutputError(DataError, OSError):
    """The prepared dataset cannot be written to its folder."""


class DatasetNotFoundError(DataError, FileNotFoundError):
    """There is no dataset in the folder, or it has no such split."""


class ShardError(DataError):
    """A shard, or the file that describes the shards, is damaged or in an unknown format."""


class DatasetChangedError(DataError):
    """The dataset differs from the one in a loader's saved state; the message has both fingerprints."""


class BatchError(DataError):
    """Sequences, batches and ranks do not divide evenly; the message shows the arithmetic."""
