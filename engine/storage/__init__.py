"""Storage of checkpoints: one small interface over local file systems and fsspec stores. No torch here.

Every error that leaves this package is a StorageError (or DamagedError, HostilePathError, ConfigError)
whose one sentence names the place, without secrets, and what to do.
"""
