"""The fingerprint of a dataset, which tells whether a resumed run still sees the same data.

It covers every shard's base name, token count and first and last MiB, the tokenizer, the vocabulary size and
the sequence length. Reading whole shards was rejected: hundreds of gigabytes at each start, on each rank.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import xxhash

from data.dataset import Dataset
from data.errors import ShardError
from data.shards import Shard

EDGE_BYTES = 1 << 20

# Threads hide a network file system's latency over hundreds of shards; the digest itself is far faster.
_THREADS = 8


def fingerprint(dataset: Dataset, seq_len: int) -> str:
    """`<tokenizer>-<seq_len>-<32 hex digits>`; the digest covers the rest, too. Raises ShardError."""
    shards = [(split, shard) for split, members in sorted(dataset.splits.items()) for shard in members]
    with ThreadPoolExecutor(_THREADS) as pool:
        edges = list(pool.map(_edge_digest, (shard for _, shard in shards)))
    value = {
        "tokenizer": dataset.tokenizer,
        "vocab_size": dataset.vocab_size,
        "seq_len": seq_len,
        "shards": [
            [split, shard.name, shard.tokens, edge]
            for (split, shard), edge in zip(shards, edges, strict=True)
        ],
    }
    raw = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    return f"{dataset.tokenizer}-{seq_len}-{xxhash.xxh3_128_hexdigest(raw)}"


def _edge_digest(shard: Shard) -> str:
    """Digest of the file's first and last MiB, which overlap in a short file."""
    try:
        with open(shard.path, "rb") as file:
            digest = xxhash.xxh3_128(file.read(EDGE_BYTES))
            file.seek(max(0, os.fstat(file.fileno()).st_size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    except OSError as error:
        raise ShardError(f"cannot read shard {shard.path}: {error.strerror}") from error
    return digest.hexdigest()
