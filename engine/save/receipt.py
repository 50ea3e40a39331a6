"""What ranks tell rank 0 about their part of a save. Values and their JSON; no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import DamagedError, StorageFullError
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.manifest import FileReceipt, ShardReceipt


@dataclass(frozen=True, slots=True)
class Receipt:
    """One rank's report of one save: what it has made durable, or why it could not.

    shared: digest of each JSON value that is not the rank's own, by state key.
    replicas: digests of what other ranks hold as well, by group, as text (`engine.save.replicas`).
    secs: seconds by cause (write, digest, fsync, ...).
    error: the failure, in words; a receipt with one carries no shard.
    """

    rank: int
    attempt: str
    shard: ShardReceipt | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    replicas: Mapping[str, str] = field(default_factory=dict)
    secs: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def __post_init__(self) -> None:
        if (self.shard is None) != bool(self.error):
            raise ValueError(f"rank {self.rank}: a receipt has either a shard or an error")

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        shard = self.shard and {
            "files": [[file.file, file.bytes, file.digest] for file in self.shard.files],
            "index": [self.shard.index.file, self.shard.index.bytes, self.shard.index.digest],
        }
        return canonical_bytes(
            {
                "rank": self.rank,
                "attempt": self.attempt,
                "shard": shard,
                "shared": dict(self.shared),
                "replicas": dict(self.replicas),
                "secs": dict(self.secs),
                "error": self.error,
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> Receipt:
        """The inverse of `to_bytes`. Raises DamagedError."""
        document: dict[str, Any] = parse_canonical(raw, what="a receipt")
        try:
            shard = document.pop("shard")
            if shard is not None:
                files = tuple(FileReceipt(*entry) for entry in shard["files"])
                shard = ShardReceipt(document["rank"], files, FileReceipt(*shard["index"]))
            return cls(shard=shard, **document)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"a receipt does not parse: {error}") from error


def failures(receipts: list[Receipt]) -> str:
    """Every rank's failure in one sentence each, or "". Pure."""
    return "; ".join(f"rank {receipt.rank}: {receipt.error}" for receipt in receipts if receipt.error)


def lacked_space(receipts: list[Receipt]) -> bool:
    """Whether some rank failed, and none for another reason than a full disk. Pure."""
    errors = [receipt.error for receipt in receipts if receipt.error]
    return bool(errors) and all(error.startswith(f"{StorageFullError.__name__}: ") for error in errors)
