"""Receipts survive the wire and say which ranks failed."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import DamagedError
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.manifest import FileReceipt, ShardReceipt
from engine.save.messages import Receipt, failures

DIGEST = "0123456789abcdef" * 2


def shard(rank: int = 0, files: int = 1) -> ShardReceipt:
    names = [f"shard-{rank:05d}{f'-{part}' if part else ''}.safetensors" for part in range(files)]
    return ShardReceipt(
        rank,
        tuple(FileReceipt(name, 4096 + part, DIGEST) for part, name in enumerate(names)),
        FileReceipt(f"shard-{rank:05d}.json", 100, DIGEST),
    )


def receipt(rank: int = 0, **more: Any) -> Receipt:
    return Receipt(rank, "step-00000001-aaaaaaaa", shard(rank), **more)


@pytest.mark.parametrize(
    "value",
    [
        receipt(),
        receipt(3, shared={"loader": "a" * 32}, replicas={"0": "b" * 32}, secs={"write": 0.25}),
        Receipt(1, "step-00000001-aaaaaaaa", shard(1, files=3)),
        Receipt(1, "step-00000001-aaaaaaaa", shard(1, files=0)),
        Receipt(2, "step-00000001-aaaaaaaa", error="StorageFullError: no space “left”"),
    ],
    ids=lambda r: f"rank{r.rank}-{r.error or len(r.shard.files)}",
)
def test_a_receipt_survives_the_wire(value: Receipt) -> None:
    assert Receipt.from_bytes(value.to_bytes()) == value


@pytest.mark.parametrize("arguments", [{}, {"shard": shard(), "error": "both"}])
def test_either_a_shard_or_an_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rank 5: a receipt has either"):
        Receipt(5, "step-00000001-aaaaaaaa", **arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"shard": None},
        {"shard": {"files": []}},
        {"shard": {"files": [[1]], "index": ["i", 1, DIGEST]}},
        {"surprise": 1},
        {"attempt": ...},
    ],
    ids=repr,
)
def test_what_is_no_receipt_is_damage(change: dict[str, Any]) -> None:
    document = parse_canonical(receipt().to_bytes(), what="the test") | change
    raw = canonical_bytes({key: value for key, value in document.items() if value is not ...})
    with pytest.raises(DamagedError):
        Receipt.from_bytes(raw)


def test_noise_is_damage() -> None:
    with pytest.raises(DamagedError):
        Receipt.from_bytes(b"noise")


def test_failures_name_every_rank_with_its_cause() -> None:
    receipts = [receipt(0), Receipt(1, "a", error="no space"), receipt(2), Receipt(3, "a", error="I/O")]
    assert failures(receipts) == "rank 1: no space; rank 3: I/O"
    assert failures([receipt(0), receipt(1)]) == ""
