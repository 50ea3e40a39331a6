"""TokenLoader: global batches that do not depend on the rank, the world size or the history.

Batch k of an epoch is a function of (dataset fingerprint, seed, epoch, k) alone. Each (seed, epoch) has its
own permutation of the split's sequences; a batch is the next `global_batch` of them, and rank r of W takes
its rows [r * rows, (r + 1) * rows) with rows = global_batch / W. Nothing is buffered, so one position is the
whole state, and a run that resumes at another world size sees the same global batches.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.batch import split_batch
from data.dataset import open_dataset
from data.errors import BatchError, DataError, DatasetChangedError
from data.fingerprint import fingerprint
from data.permutation import Permutation
from data.sequences import SequenceReader

log = logging.getLogger(__name__)

Batch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""(inputs, targets): int64 [rows, seq_len] each; targets are the inputs' next tokens."""

_STATE_KEYS = ("epoch", "position", "seed", "fingerprint")


class TokenLoader:
    """This rank's batches of one split of the dataset in `data_dir`.

    An epoch is `steps_per_epoch` batches, by default one pass over the split without its last partial batch.
    A longer epoch continues with further passes, each with its own permutation; a shorter one sees a random
    part of the split, a different one each epoch. The validation split is read in its stored order, so that
    its first N batches are the same in every evaluation of every run.

    Raises DataError at construction if the dataset is missing or damaged, has less than one global batch, or
    `global_batch` does not divide over `world_size`.
    """

    def __init__(
        self,
        data_dir: str | Path,
        *,
        split: str = "train",
        seq_len: int,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        steps_per_epoch: int | None = None,
        allow_data_change: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise BatchError(f"rank {rank} of {world_size} ranks: ranks count from 0 to {world_size - 1}")
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise BatchError(f"an epoch needs at least 1 step, not {steps_per_epoch}")
        self._dataset = open_dataset(data_dir)
        self._shuffled = split == "train"
        self._allow_data_change = allow_data_change
        self.split = split
        self.seq_len = seq_len
        self.global_batch = global_batch
        self.rows = split_batch(global_batch, world_size).rows
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self.position = 0
        shards = self._dataset.shards(split)
        self._reader = SequenceReader(shards, seq_len, self._dataset.vocab_size)
        self.batches_per_pass = len(self._reader) // global_batch
        if not self.batches_per_pass:
            raise BatchError(
                f"the {split} split of {data_dir} is smaller than one batch: {self._dataset.tokens(split):,} "
                f"tokens in {len(shards)} shard(s) give {len(self._reader)} sequences of {seq_len} + 1 "
                f"tokens, but a global batch needs {global_batch}; use a smaller --global_batch or "
                "--seq_len, or prepare more data"
            )
        self.steps_per_epoch = steps_per_epoch or self.batches_per_pass
        if self._shuffled:
            # Now, not at the first save: reading two MiB of each shard would delay a training step.
            _ = self.fingerprint

    @property
    def tokenizer(self) -> str:
        return self._dataset.tokenizer

    @property
    def vocab_size(self) -> int:
        return self._dataset.vocab_size

    @property
    def tokens(self) -> int:
        """Tokens in the split."""
        return self._dataset.tokens(self.split)

    @property
    def sequences(self) -> int:
        """Sequences in the split, including those of the dropped last batch."""
        return len(self._reader)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the whole dataset, so the same for both splits; see data.fingerprint."""
        return fingerprint(self._dataset, self.seq_len)

    def batch_ids(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """Sequence numbers of the global batch `step` of `epoch`, both from 0: int64 [global_batch]."""
        return self._ids(epoch, step, 0, self.global_batch)

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's rows of batch `step` of `epoch`; does not move the position. Raises ShardError."""
        begin = self.rank * self.rows
        tokens = self._reader.read(self._ids(epoch, step, begin, begin + self.rows))
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    def next_batch(self) -> Batch:
        """This rank's rows of the next batch; advances the position. Raises ShardError."""
        batch = self.batch(self.epoch, self.position // self.global_batch)
        self._move_to(self.epoch, self.position + self.global_batch)
        return batch

    def first_batches(self, count: int) -> Iterator[Batch]:
        """This rank's rows of the first `count` batches of epoch 0, at most one pass.

        For validation: every call returns the same batches and does not move the position.
        """
        return (self.batch(0, step) for step in range(min(count, self.batches_per_pass)))

    def state_dict(self) -> dict[str, int | str]:
        """JSON, the same on every rank: epoch, position (sequences of the epoch that all ranks together have
        seen), seed and fingerprint. The end of an epoch is stored as the start of the next."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, at any world size. The state's seed replaces this loader's.

        A changed dataset raises DatasetChangedError unless `allow_data_change`. A position beyond the end of
        the epoch, after a change of the dataset or of `steps_per_epoch`, becomes the start of the next epoch.
        Raises DataError if `state` is not a loader's, BatchError if the position is inside a global batch.
        """
        epoch, position, seed, found = _checked_state(state)
        if found != self.fingerprint:
            self._accept_change(found)
        if position % self.global_batch:
            raise BatchError(
                f"the saved position, {position:,} sequences into epoch {epoch}, is not a multiple of the "
                f"global batch of {self.global_batch}: {position} = {self.global_batch} x "
                f"{position // self.global_batch} + {position % self.global_batch}; resume with the "
                "--global_batch that the run was started with"
            )
        if seed != self.seed:
            log.warning("the data order continues with the checkpoint's seed %d, not %d", seed, self.seed)
        self.seed = seed
        self._move_to(epoch, position)

    def _ids(self, epoch: int, step: int, begin: int, end: int) -> npt.NDArray[np.int64]:
        """Sequence numbers of the rows [begin, end) of a global batch."""
        assert epoch >= 0 <= step, (epoch, step)
        passes, step = divmod(step, self.batches_per_pass)
        places = np.arange(begin, end, dtype=np.int64) + step * self.global_batch
        return Permutation(len(self._reader), self.seed, epoch, passes)(places) if self._shuffled else places

    def _move_to(self, epoch: int, position: int) -> None:
        if position >= self.steps_per_epoch * self.global_batch:
            epoch, position = epoch + 1, 0
        self.epoch, self.position = epoch, position

    def _accept_change(self, found: str) -> None:
        if not self._allow_data_change:
            raise DatasetChangedError(
                f"the dataset {self._dataset.directory} is not the checkpoint's: its fingerprint is "
                f"{self.fingerprint}, the checkpoint has {found} (tokenizer, sequence length, digest of the "
                "shards); restore the data, or accept the change with --allow_data_change"
            )
        log.warning("the dataset has changed, as allowed: from %s to %s", found, self.fingerprint)


def _checked_state(state: Mapping[str, Any]) -> tuple[int, int, int, str]:
    if set(state) != set(_STATE_KEYS):
        raise DataError(
            f"a loader's state has the keys {sorted(_STATE_KEYS)}, not {sorted(map(str, state))}"
        )
    epoch, position, seed, found = (state[key] for key in _STATE_KEYS)
    if any(type(value) is not int for value in (epoch, position, seed)) or not isinstance(found, str):
        raise DataError(
            f"a loader's epoch, position and seed are ints, its fingerprint is text, not {dict(state)}"
        )
    if epoch < 0 or position < 0:
        raise DataError(f"a loader's position cannot be negative: epoch {epoch}, position {position}")
    return epoch, position, seed, found
