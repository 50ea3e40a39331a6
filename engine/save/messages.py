"""Messages between ranks in a save: receipts to rank 0, its outcome to all. Values and their JSON; no I/O."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine import errors
from engine.directory.record import CheckpointRecord
from engine.errors import (
    DamagedError,
    HoldfastError,
    ReplicaMismatchError,
    SaveFailedError,
    StorageFullError,
    may_pass,
)
from engine.format.best import BestRule
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.manifest import FileReceipt, ShardReceipt


@dataclass(frozen=True, slots=True)
class Receipt:
    """One rank's report of one save: what it has made durable, or why it could not.

    shared: digest of each JSON value that is not the rank's own, by state key.
    replicas: digests of values that other ranks hold, too, by group, as text (`engine.save.replicas`).
    secs: seconds by cause (write, digest, fsync, ...).
    error: the failure, as "Kind: message"; a receipt with an error has no shard.
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
    """Every rank's failure, or "". Pure."""
    return "; ".join(f"rank {receipt.rank}: {receipt.error}" for receipt in receipts if receipt.error)


def lacked_space(receipts: list[Receipt]) -> bool:
    """Whether some rank failed, and every failure is a full disk. Pure."""
    causes = [receipt.error for receipt in receipts if receipt.error]
    return bool(causes) and all(cause.startswith(f"{StorageFullError.__name__}: ") for cause in causes)


def all_may_pass(causes: Iterable[str]) -> bool:
    """Whether a later save may succeed after these failures, each given as "Kind: message"."""
    return all(_kind_may_pass(cause.partition(":")[0]) for cause in causes)


def _kind_may_pass(name: str) -> bool:
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if not isinstance(kind, type):
        return False
    return kind.may_pass if issubclass(kind, HoldfastError) else issubclass(kind, OSError)


RETRY = b"again"
"""Rank 0's outcome that is none yet: every rank writes its shards once more."""


def outcome_to_bytes(record: CheckpointRecord | None, failure: BaseException | None) -> bytes:
    """Rank 0's outcome of a save: the committed record, or the failure."""
    return canonical_bytes(
        {
            "error": "" if failure is None else message_of(failure),
            "may_pass": failure is not None and may_pass(failure),
            "replicas": isinstance(failure, ReplicaMismatchError),
            "record": record and record_to_json(record),
        }
    )


def outcome_from_bytes(raw: bytes) -> CheckpointRecord | None:
    """The committed record; None for `RETRY`. Raises: the failure that rank 0 sent."""
    if raw == RETRY:
        return None
    document = parse_canonical(raw, what="the outcome of a save")
    if document["replicas"]:
        raise ReplicaMismatchError(document["error"])
    if document["error"]:
        raise SaveFailedError(document["error"], may_pass=document["may_pass"])
    fields = document["record"]
    fields["reasons"] = tuple(fields["reasons"])
    fields["best"] = BestRule(**fields["best"])
    fields["metrics"] = {name: float(value) for name, value in fields["metrics"].items()}
    return CheckpointRecord(**fields)


def record_to_json(record: CheckpointRecord) -> dict[str, Any]:
    """A record as JSON that `outcome_from_bytes` reads."""
    return {name: getattr(record, name) for name in record.__slots__} | {
        "best": record.best.to_json(),
        "reasons": list(record.reasons),
        "metrics": {name: str(value) for name, value in record.metrics.items()},
    }


def message_of(error: BaseException) -> str:
    """The error's message, or its class if it has none."""
    return str(error) or type(error).__name__
