"""TokenLoader: global batches whose content depends on no rank, no world size and no history.

Batch k of an epoch is a function of (dataset fingerprint, seed, epoch, k) alone. The sequences of the split
are visited in a permutation of their own for each (seed, epoch); the batch takes the next `global_batch` of
them, and rank r of W the rows [r * rows, (r + 1) * rows) of that, rows = global_batch / W. Nothing is
buffered, so the whole state is one position, and a run that resumes at another world size sees the same
global batches.
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
    """Batches of one split of the dataset in `data_dir`, from this rank's point of view.

    An epoch is `steps_per_epoch` batches, or one pass over the split with its last partial batch dropped. A
    longer epoch goes on into further passes, each with a permutation of its own; a shorter one sees a random
    part of the split, another one each epoch. The validation split is read in its stored order, so that its
    first N batches are the same in every evaluation of every run.

    Raises DataError at construction when the dataset is missing or damaged, when it has less than one global
    batch, or when `global_batch` does not divide over `world_size`.
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
            raise BatchError(f"rank {rank} of {world_size} ranks: ranks go from 0 to {world_size - 1}")
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
                f"tokens, a global batch takes {global_batch}; use a smaller --global_batch or --seq_len, or "
                "prepare more data"
            )
        self.steps_per_epoch = steps_per_epoch or self.batches_per_pass
        if self._shuffled:
            # Now, not at the first save: reading two MiB of each shard would stop a training step.
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
        """Sequences in the split, those of the dropped last batch included."""
        return len(self._reader)

    @cached_property
    def fingerprint(self) -> str:
        """See data.fingerprint: the whole dataset's, the same for both splits."""
        return fingerprint(self._dataset, self.seq_len)

    def batch_ids(self, epoch: int, step: int) -> npt.NDArray[np.int64]:
        """Sequence numbers of the global batch `step` of `epoch`, both from 0: int64 [global_batch]."""
        return self._ids(epoch, step, 0, self.global_batch)

    def batch(self, epoch: int, step: int) -> Batch:
        """This rank's rows of batch `step` of `epoch`; the position stays. Raises ShardError."""
        begin = self.rank * self.rows
        tokens = self._reader.read(self._ids(epoch, step, begin, begin + self.rows))
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    def next_batch(self) -> Batch:
        """This rank's rows of the next batch; the position moves on. Raises ShardError."""
        batch = self.batch(self.epoch, self.position // self.global_batch)
        self._move_to(self.epoch, self.position + self.global_batch)
        return batch

    def first_batches(self, count: int) -> Iterator[Batch]:
        """This rank's rows of the first `count` batches of epoch 0, or of one pass where that is shorter.

        For validation: every call gives the same batches, and the loader's position stays.
        """
        return (self.batch(0, step) for step in range(min(count, self.batches_per_pass)))

    def state_dict(self) -> dict[str, int | str]:
        """JSON, the same on every rank: epoch, position (sequences of the epoch already seen by all ranks
        together), seed and fingerprint. The end of an epoch is written as the start of the next."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, at any world size. The state's seed replaces this loader's.

        A changed dataset raises DatasetChangedError unless `allow_data_change`. A position beyond the end of
        the epoch, which a changed dataset or `steps_per_epoch` can leave, becomes the start of the next
        epoch. Raises DataError when `state` is not a loader's, BatchError when the position lies inside a
        global batch.
        """
        epoch, position, seed, found = _checked_state(state)
        if found != self.fingerprint:
            self._accept_change(found)
        if position % self.global_batch:
            raise BatchError(
                f"the saved position, {position:,} sequences into epoch {epoch}, is no multiple of the "
                f"global batch of {self.global_batch}: {position} = {self.global_batch} x "
                f"{position // self.global_batch} + {position % self.global_batch}; resume with the "
                "--global_batch that the run was started with"
            )
        if seed != self.seed:
            log.warning("the data order goes on with the checkpoint's seed %d, not with %d", seed, self.seed)
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
                f"the dataset {self._dataset.directory} is not the one of the checkpoint: fingerprint now "
                f"{self.fingerprint}, in the checkpoint {found} (tokenizer, sequence length, digest over the "
                "shards); restore the data, or accept the change with --allow_data_change"
            )
        log.warning("the dataset has changed, as allowed: %s, in the checkpoint %s", self.fingerprint, found)


def _checked_state(state: Mapping[str, Any]) -> tuple[int, int, int, str]:
    if set(state) != set(_STATE_KEYS):
        raise DataError(
            f"a loader's state has the keys {sorted(_STATE_KEYS)}, this one {sorted(map(str, state))}"
        )
    epoch, position, seed, found = (state[key] for key in _STATE_KEYS)
    if any(type(value) is not int for value in (epoch, position, seed)) or not isinstance(found, str):
        raise DataError(
            f"a loader's epoch, position and seed are ints and its fingerprint a string, not {dict(state)}"
        )
    if epoch < 0 or position < 0:
        raise DataError(f"a loader's epoch and position are not negative: epoch {epoch}, position {position}")
    return epoch, position, seed, found
