"""data.loader: every batch a function of (dataset, seed, epoch, k), at every world size."""

import json
import logging
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import BatchError, DataError, DatasetChangedError, DatasetNotFoundError, ShardError
from data.loader import TokenLoader
from data.sequences import SequenceReader

SEQ_LEN = 4
BATCH = 6
GOLDEN_FIRST = [16, 9, 32, 19, 20, 26]
GOLDEN_WRAPPED = [28, 12, 31, 25, 19, 27]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training shards with 20 and 13 sequences of 4 tokens; token i of the dataset is i."""
    write(tmp_path / "x_train_1.bin", 0, 20 * SEQ_LEN + 3)
    write(tmp_path / "x_train_2.bin", 1000, 13 * SEQ_LEN + 1)
    write(tmp_path / "x_val_0.bin", 2000, 15 * SEQ_LEN + 1)
    return tmp_path


def write(path: Path, first: int, tokens: int) -> None:
    np.arange(first, first + tokens, dtype=np.uint16).tofile(path)


def loader(folder: Path, **changes: Any) -> TokenLoader:
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "global_batch": BATCH, "seed": 1, **changes}
    return TokenLoader(folder, **arguments)


def starts(inputs: np.ndarray) -> list[int]:
    """The first token of each row, which says which sequence it is."""
    return [int(token) for token in inputs[:, 0]]


def flat(rows: Iterable[list[int]]) -> list[int]:
    return list(chain.from_iterable(rows))


def batches(loader: TokenLoader, count: int) -> list[list[int]]:
    return [starts(loader.next_batch()[0]) for _ in range(count)]


ALL_STARTS = [4 * n for n in range(20)] + [1000 + 4 * n for n in range(13)]


def test_a_batch_is_inputs_and_their_next_tokens(folder: Path) -> None:
    inputs, targets = loader(folder).next_batch()
    assert inputs.shape == targets.shape == (BATCH, SEQ_LEN)
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    assert np.array_equal(targets, inputs + 1)  # as token i is i, also over a row's end
    assert set(starts(inputs)) <= set(ALL_STARTS)


def test_the_sizes(folder: Path) -> None:
    train = loader(folder)
    assert (train.sequences, train.batches_per_pass, train.steps_per_epoch) == (33, 5, 5)
    assert (train.tokens, train.vocab_size, train.tokenizer, train.rows) == (83 + 53, 50257, "gpt2", 6)


def test_an_epoch_visits_each_sequence_at_most_once_and_drops_the_rest(folder: Path) -> None:
    train = loader(folder)
    seen = flat(batches(train, 5))
    assert len(set(seen)) == 30
    assert set(seen) <= set(ALL_STARTS)
    assert (train.epoch, train.position) == (1, 0)


def test_epochs_and_seeds_have_orders_of_their_own(folder: Path) -> None:
    train = loader(folder)
    orders = {tuple(flat(batches(train, 5))) for _ in range(4)}
    orders |= {tuple(flat(batches(loader(folder, seed=seed), 5))) for seed in (2, 3)}
    assert len(orders) == 6


def test_a_batch_depends_on_epoch_and_step_alone(folder: Path) -> None:
    """Not on what was read before, and not on how long epochs are."""
    straight = batches(loader(folder), 20)
    jumping = loader(folder, steps_per_epoch=3)
    for epoch, step in [(3, 4), (0, 0), (2, 1), (3, 4)]:
        assert starts(jumping.batch(epoch, step)[0]) == straight[5 * epoch + step]
    assert jumping.position == 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_take_their_rows_of_the_same_global_batch(folder: Path, world_size: int) -> None:
    whole = loader(folder)
    ranks = [loader(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(7):
        parts = [rank.next_batch() for rank in ranks]
        inputs, targets = whole.next_batch()
        assert np.array_equal(np.concatenate([part[0] for part in parts]), inputs)
        assert np.array_equal(np.concatenate([part[1] for part in parts]), targets)
    assert {json.dumps(rank.state_dict()) for rank in ranks} == {json.dumps(whole.state_dict())}


def test_batch_ids_are_those_of_the_global_batch(folder: Path) -> None:
    ids = loader(folder, rank=1, world_size=2).batch_ids(1, 2)
    assert [ALL_STARTS[i] for i in ids] == starts(loader(folder).batch(1, 2)[0])


def test_the_order_never_changes(folder: Path) -> None:
    """Golden: runs that resume with a newer Holdfast go on in this order."""
    assert loader(folder).batch_ids(0, 0).tolist() == GOLDEN_FIRST
    assert loader(folder).batch_ids(2, 7).tolist() == GOLDEN_WRAPPED


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("world_size", [1, 3])
def test_resuming_goes_on_exactly(folder: Path, steps: int, world_size: int) -> None:
    straight = loader(folder)
    batches(straight, steps)
    state = json.loads(json.dumps(straight.state_dict()))
    resumed = [loader(folder, rank=rank, world_size=world_size) for rank in range(world_size)]
    for rank in resumed:
        rank.load_state_dict(state)
        assert rank.state_dict() == state
    for _ in range(7):
        assert flat(starts(rank.next_batch()[0]) for rank in resumed) == starts(straight.next_batch()[0])


def test_the_state_is_one_position(folder: Path) -> None:
    train = loader(folder)
    batches(train, 7)
    state = train.state_dict()
    assert state == {"epoch": 1, "position": 12, "seed": 1, "fingerprint": train.fingerprint}


def test_a_shorter_epoch(folder: Path) -> None:
    train = loader(folder, steps_per_epoch=2)
    first, second = flat(batches(train, 2)), flat(batches(train, 2))
    assert (train.epoch, train.position, train.steps_per_epoch) == (2, 0, 2)
    assert len(set(first)) == len(set(second)) == 12
    assert first != second


def test_a_longer_epoch_goes_on_into_passes_of_their_own(folder: Path) -> None:
    train = loader(folder, steps_per_epoch=12)
    epoch = batches(train, 12)
    passes = [flat(epoch[:5]), flat(epoch[5:10]), flat(epoch[10:])]
    assert [len(set(one)) for one in passes] == [30, 30, 12]  # no sequence twice in a pass
    assert passes[0] != passes[1]
    assert (train.epoch, train.position) == (1, 0)
    assert batches(train, 5) != epoch[5:10]  # nor is the second pass the next epoch's first


def test_validation_is_read_in_order_whatever_the_seed(folder: Path) -> None:
    val = loader(folder, split="val", seed=99)
    expected = [[2000 + 4 * (BATCH * step + row) for row in range(BATCH)] for step in range(2)]
    assert batches(val, 2) == expected
    assert batches(val, 2) == expected  # the next epoch too


def test_first_batches_leave_the_position_alone(folder: Path) -> None:
    val = loader(folder, split="val", rank=1, world_size=2)
    val.next_batch()
    for _ in range(2):
        assert [starts(inputs) for inputs, _ in val.first_batches(1)] == [[2012, 2016, 2020]]
    assert len(list(val.first_batches(99))) == 2
    assert val.position == BATCH


@pytest.fixture
def changed(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A dataset of which a shard has since grown by a sequence, and the state from before."""
    before = loader(folder)
    batches(before, 8)
    state = before.state_dict()
    write(folder / "x_train_2.bin", 1000, 20 * SEQ_LEN + 1)
    return folder, state


def test_a_changed_dataset_is_refused_with_both_fingerprints(changed: tuple[Path, dict[str, Any]]) -> None:
    folder, state = changed
    train = loader(folder)
    with pytest.raises(DatasetChangedError, match="--allow_data_change") as caught:
        train.load_state_dict(state)
    assert state["fingerprint"] in str(caught.value)
    assert train.fingerprint in str(caught.value)
    assert (train.epoch, train.position) == (0, 0)


def test_a_changed_dataset_can_be_allowed(
    changed: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    folder, state = changed
    train = loader(folder, allow_data_change=True)
    with caplog.at_level(logging.WARNING, "data"):
        train.load_state_dict(state)
    assert (train.epoch, train.position) == (1, 18)
    assert "the dataset has changed, as allowed" in caplog.text
    assert train.state_dict()["fingerprint"] == train.fingerprint != state["fingerprint"]


def test_another_sequence_length_is_a_change_too(folder: Path) -> None:
    with pytest.raises(DatasetChangedError, match=r"gpt2-2-.*gpt2-4-"):
        loader(folder, seq_len=2).load_state_dict(loader(folder).state_dict())


def test_a_position_past_the_end_starts_the_next_epoch(folder: Path) -> None:
    before = loader(folder)
    batches(before, 4)
    shorter = loader(folder, steps_per_epoch=3)
    shorter.load_state_dict(before.state_dict())
    assert (shorter.epoch, shorter.position) == (1, 0)


def test_the_states_seed_goes_on(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = loader(folder, seed=2)
    other.load_state_dict(loader(folder, seed=1).state_dict())
    assert batches(other, 3) == batches(loader(folder, seed=1), 3)
    assert other.state_dict()["seed"] == 1
    assert "checkpoint's seed 1, not 2" in caplog.text


def test_another_global_batch_must_fit_the_position(folder: Path) -> None:
    before = loader(folder)
    batches(before, 3)
    with pytest.raises(BatchError, match=r"18 = 4 x 4 \+ 2; resume with the --global_batch"):
        loader(folder, global_batch=4).load_state_dict(before.state_dict())
    loader(folder, global_batch=9).load_state_dict(before.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": -1},
        {"position": -6},
        {"epoch": True},
        {"position": 6.0},
        {"seed": "1"},
        {"fingerprint": 5},
        {"x": 1},
    ],
)
def test_what_is_no_state_is_refused(folder: Path, change: dict[str, Any]) -> None:
    train = loader(folder)
    with pytest.raises(DataError, match="a loader's"):
        train.load_state_dict({**train.state_dict(), **change})
    with pytest.raises(DataError, match="has the keys"):
        train.load_state_dict({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch": 34},
            "136 tokens in 2 shard.* give 33 sequences of 4 \\+ 1 tokens, but a global batch needs 34",
        ),
        ({"seq_len": 100}, "give 0 sequences of 100"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"world_size": 4}, r"6 = 4 x 1 \+ 2"),
        ({"rank": 2, "world_size": 2}, "ranks count from 0 to 1"),
        ({"rank": -1}, "ranks count from 0 to 0"),
        ({"steps_per_epoch": 0}, "at least 1 step, not 0"),
    ],
)
def test_what_cannot_work_is_refused_at_once(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BatchError, match=message):
        loader(folder, **changes)


def test_the_smallest_dataset_is_one_batch(tmp_path: Path) -> None:
    write(tmp_path / "train.bin", 0, BATCH * SEQ_LEN + 1)
    train = loader(tmp_path)
    assert sorted(flat(batches(train, 1))) == [4 * n for n in range(BATCH)]
    assert train.epoch == 1


def test_a_sequence_needs_the_token_after_it(tmp_path: Path) -> None:
    write(tmp_path / "train.bin", 0, BATCH * SEQ_LEN)
    with pytest.raises(BatchError, match=r"24 tokens in 1 shard.* give 5 sequences"):
        loader(tmp_path)


def test_missing_data(tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="does not exist"):
        loader(tmp_path / "missing")
    write(tmp_path / "train.bin", 0, 99)
    with pytest.raises(DatasetNotFoundError, match="no 'val' split"):
        loader(tmp_path, split="val")


def test_a_token_outside_the_vocabulary_names_the_shard(folder: Path) -> None:
    (folder / "dataset.json").write_text('{"version": 1, "tokenizer": "small", "vocab_size": 1040}')
    train = loader(folder)
    assert train.vocab_size == 1040
    with pytest.raises(
        ShardError, match=r"x_train_2\.bin has token 10\d\d at position \d+, outside .* of 1,040"
    ):
        batches(train, 5)
    np.save(folder / "y.npy", np.array([1, -7, 3, 4, 5]))
    (folder / "y.npy").rename(folder / "negative_train.npy")
    for old in folder.glob("x_*"):
        old.unlink()
    with pytest.raises(ShardError, match="token -7 at position 1"):
        loader(folder, global_batch=1).next_batch()


def test_many_shards_do_not_use_up_file_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sequences._MAX_OPEN_SHARDS", 3)
    for number in range(9):
        write(tmp_path / f"train_{number}.bin", 100 * number, 2 * SEQ_LEN + 1)
    train = loader(tmp_path)
    assert set(flat(batches(train, 3))) == {100 * n + 4 * k for n in range(9) for k in range(2)}
    reader = train._reader
    assert isinstance(reader, SequenceReader)
    assert len(reader._open) == 3
