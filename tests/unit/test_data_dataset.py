"""data.dataset: which files of a folder are the dataset."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.dataset import DESCRIPTION, INCOMPLETE, describe, open_dataset
from data.errors import DatasetNotFoundError, ShardError


def put(folder: Path, *names: str) -> None:
    for name in names:
        (np.save if name.endswith(".npy") else lambda p, a: a.tofile(p))(
            folder / name, np.arange(9, dtype=np.uint16)
        )


@pytest.mark.parametrize(
    ("train", "val", "others"),
    [
        (["train.bin"], ["val.bin"], ["meta.pkl", "input.txt"]),  # nanoGPT
        (
            ["fineweb_train_000001.bin", "fineweb_train_000002.bin"],
            ["fineweb_val_000000.bin"],
            [],
        ),  # llm.c, modded
        (["edufineweb_train_000001.npy"], ["edufineweb_val_000000.npy"], []),  # build-nanogpt
        (["tiny_shakespeare_train.bin"], ["tiny_shakespeare_val.bin"], ["trainer.bin", "train.bin.tmp"]),
        (["train_000000.bin", "train_000001.bin"], [], ["notes.md", "retrain_1.bin", ".train.bin"]),
    ],
)
def test_peoples_own_shards_are_found_by_name(
    tmp_path: Path, train: list[str], val: list[str], others: list[str]
) -> None:
    put(tmp_path, *train, *val, *others)
    dataset = open_dataset(tmp_path)
    assert (dataset.tokenizer, dataset.vocab_size) == ("gpt2", 50257)
    assert [shard.name for shard in dataset.splits["train"]] == train
    assert [shard.name for shard in dataset.splits["val"]] == val
    assert dataset.tokens("train") == 9 * len(train)


@pytest.mark.parametrize("names", [["a_train.bin", "b_train.bin"], ["train.bin", "train.npy"]])
def test_two_datasets_in_a_folder_are_ambiguous(tmp_path: Path, names: list[str]) -> None:
    put(tmp_path, *names)
    with pytest.raises(ShardError, match=r"several datasets \("):
        open_dataset(tmp_path)


def test_no_dataset(tmp_path: Path) -> None:
    put(tmp_path, "other.bin")
    with pytest.raises(DatasetNotFoundError, match="no token shards in"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetNotFoundError, match=r"does not exist; `python -m data\.prepare --out"):
        open_dataset(tmp_path / "missing")
    with pytest.raises(DatasetNotFoundError, match="is not a folder"):
        open_dataset(tmp_path / "other.bin")
    with pytest.raises(FileNotFoundError):
        open_dataset(tmp_path)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    put(tmp_path, "train.bin")
    with pytest.raises(DatasetNotFoundError, match=r"no 'val' split \(splits: train\)"):
        open_dataset(tmp_path).shards("val")


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "train.bin")
    (tmp_path / INCOMPLETE).touch()
    with pytest.raises(ShardError, match="unfinished"):
        open_dataset(tmp_path)


def test_the_description_says_which_shards_and_which_vocabulary(tmp_path: Path) -> None:
    put(tmp_path, "train_000000.bin", "val_000000.bin")
    named = open_dataset(tmp_path)
    (tmp_path / DESCRIPTION).write_bytes(describe(named, source="x"))
    put(tmp_path, "train_000001.bin")  # not in the description: not in the dataset
    assert open_dataset(tmp_path) == named


def test_a_vocabulary_of_ones_own(tmp_path: Path) -> None:
    put(tmp_path, "train.bin")
    (tmp_path / DESCRIPTION).write_text('{"version": 1, "tokenizer": "characters", "vocab_size": 65}')
    dataset = open_dataset(tmp_path)
    assert (dataset.tokenizer, dataset.vocab_size, dataset.tokens("train")) == ("characters", 65, 9)


GOOD = {
    "version": 1,
    "tokenizer": "gpt2",
    "vocab_size": 50257,
    "splits": {"train": {"shards": [{"file": "train.bin", "tokens": 9}]}},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, but this Holdfast reads 1"),
        ({"version": None}, "has version None"),
        ({"tokenizer": 3}, "must name a tokenizer"),
        ({"vocab_size": True}, "must name a tokenizer"),
        ({"vocab_size": 0}, "must name a tokenizer"),
        ({"splits": []}, "cannot read the list of shards"),
        ({"splits": {"train": {"shards": [{"file": "train.bin"}]}}}, "cannot read the list of shards"),
        ({"splits": {"train": {"shards": [{"file": "gone.bin", "tokens": 9}]}}}, r"gone\.bin is missing"),
        (
            {"splits": {"train": {"shards": [{"file": "../train.bin", "tokens": 9}]}}},
            "not a plain file name",
        ),
        ({"splits": {"train": {"shards": [{"file": "train.bin", "tokens": 8}]}}}, "has 9 tokens, .* says 8"),
    ],
)
def test_a_wrong_description_says_how(tmp_path: Path, change: dict[str, object], message: str) -> None:
    put(tmp_path, "train.bin")
    (tmp_path / DESCRIPTION).write_text(json.dumps(GOOD))
    open_dataset(tmp_path)
    (tmp_path / DESCRIPTION).write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ShardError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_description_that_is_no_json_object(tmp_path: Path, raw: bytes) -> None:
    put(tmp_path, "train.bin")
    (tmp_path / DESCRIPTION).write_bytes(raw)
    with pytest.raises(ShardError, match=DESCRIPTION):
        open_dataset(tmp_path)
