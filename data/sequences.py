"""A split's shards as numbered training sequences.

Sequence i of a shard covers its tokens [i * seq_len, i * seq_len + seq_len + 1): seq_len inputs, and the same
shifted by one as targets. Sequences never cross the end of a shard, so that reading one needs only one shard;
tokens after the last whole sequence are unused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import BatchError, ShardError
from data.shards import Shard, open_tokens

# Each mapping holds a file descriptor, and the limit may be as low as 1024.
_MAX_OPEN_SHARDS = 128


class SequenceReader:
    """Reads sequences by number from memory-mapped shards."""

    def __init__(self, shards: Sequence[Shard], seq_len: int, vocab_size: int) -> None:
        if seq_len < 1:
            raise BatchError(f"seq_len is {seq_len}, but must be at least 1")
        self.seq_len = seq_len
        self._vocab_size = vocab_size
        self._shards = tuple(shards)
        counts = [(shard.tokens - 1) // seq_len for shard in self._shards]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._open: OrderedDict[int, npt.NDArray[np.integer[Any]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The tokens of sequences `ids`: int64 [len(ids), seq_len + 1]. ShardError for invalid tokens."""
        out = np.empty((len(ids), self.seq_len + 1), dtype=np.int64)
        for row, sequence in enumerate(ids):
            shard, begin = self._locate(int(sequence))
            out[row] = self._tokens(shard)[begin : begin + self.seq_len + 1]
        if out.size and (out.max() >= self._vocab_size or out.min() < 0):
            self._raise_bad_token(ids, out)
        return out

    def _locate(self, sequence: int) -> tuple[int, int]:
        """(shard number, position of the first token) of a sequence."""
        assert 0 <= sequence < len(self), (sequence, len(self))
        shard = int(np.searchsorted(self._first, sequence, side="right")) - 1
        return shard, (sequence - int(self._first[shard])) * self.seq_len

    def _tokens(self, shard: int) -> npt.NDArray[np.integer[Any]]:
        tokens = self._open.pop(shard, None)
        if tokens is None:
            tokens = open_tokens(self._shards[shard])
        self._open[shard] = tokens
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return tokens

    def _raise_bad_token(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.int64]) -> None:
        row, column = np.argwhere((out >= self._vocab_size) | (out < 0))[0]
        shard, begin = self._locate(int(ids[row]))
        raise ShardError(
            f"shard {self._shards[shard].path} has token {out[row, column]} at position {begin + column:,}, "
            f"outside the vocabulary of {self._vocab_size:,}: it is damaged, or another tokenizer wrote it "
            "(then name that one in a dataset.json beside it)"
        )
