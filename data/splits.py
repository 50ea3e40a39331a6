"""Divides a stream of encoded documents between the training and the validation split.

Validation gets whole documents, spread evenly over the corpus: a document goes there if the split lags by at
least half of its length. If that leaves validation with less than half of its share, because the corpus is a
few long documents (one book, say), it gets the corpus's last tokens instead. Both depend only on the
documents.
"""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.shards import Shard, ShardWriter, take_tail


class SplitWriter:
    """Writes `train_*.bin` and `val_*.bin` shards into `directory`."""

    def __init__(self, directory: Path, val_fraction: float, shard_tokens: int) -> None:
        self._directory = directory
        self._val_fraction = val_fraction
        self._shard_tokens = shard_tokens
        self._train = ShardWriter(directory, "train", shard_tokens)
        self._val = ShardWriter(directory, "val", shard_tokens)

    def add(self, tokens: npt.NDArray[np.uint16], whole_document: bool) -> None:
        """Append a document, or a part of one; parts always go to training."""
        to_val = whole_document and belongs_to_val(
            tokens.size, self._train.tokens, self._val.tokens, self._val_fraction
        )
        (self._val if to_val else self._train).append(tokens)

    def finish(self) -> dict[str, tuple[Shard, ...]]:
        """Close all shards and return them by split; a split without tokens has none."""
        self._train.close()
        train = self._train.shards
        wanted = tail_tokens(self._train.tokens, self._val.tokens, self._val_fraction)
        if wanted:
            train, tail = take_tail(train, wanted)
            self._val.append(tail)
        self._val.close()
        return {"train": tuple(train), "val": tuple(self._val.shards)}

    def abandon(self) -> None:
        """After an error: close the files and leave them unfinished."""
        self._train.abandon()
        self._val.abandon()


def belongs_to_val(tokens: int, train_tokens: int, val_tokens: int, val_fraction: float) -> bool:
    """Whether the next document, with `tokens` tokens, goes to validation, given the tokens in each split."""
    # Training gets the first document: a corpus of one document must not all go to validation.
    due = val_fraction * (train_tokens + val_tokens + tokens) - val_tokens
    return train_tokens > 0 and tokens <= 2 * due


def tail_tokens(train_tokens: int, val_tokens: int, val_fraction: float) -> int:
    """How many of the last training tokens validation gets at the end of the corpus."""
    share = ceil(val_fraction * (train_tokens + val_tokens))
    missing = share - val_tokens
    return min(missing, train_tokens - 1) if 2 * val_tokens < share else 0
