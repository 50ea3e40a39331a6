"""data.splits: whole documents for validation, evenly, or the end of a corpus of few long ones."""

from pathlib import Path

import numpy as np
import pytest

from data.shards import open_tokens
from data.splits import SplitWriter, belongs_to_val, tail_tokens


def write(folder: Path, lengths: list[int], fraction: float, *, whole: bool = True) -> dict[str, list[int]]:
    """Documents of these lengths, the tokens of document i all i; the tokens of each split."""
    writer = SplitWriter(folder, fraction, shard_tokens=50)
    for number, length in enumerate(lengths):
        writer.add(np.full(length, number, np.uint16), whole)
    splits = writer.finish()
    found = {
        split: [int(t) for shard in shards for t in open_tokens(shard)] for split, shards in splits.items()
    }
    assert len(found["train"]) + len(found["val"]) == sum(lengths)
    return found


def test_validation_takes_whole_documents_spread_evenly(tmp_path: Path) -> None:
    val = write(tmp_path, [10] * 200, 0.1)["val"]
    documents = sorted(set(val))
    assert len(val) == 200
    assert all(val.count(document) == 10 for document in documents)
    gaps = np.diff(documents)
    assert (gaps.min(), gaps.max()) == (10, 10)


def test_document_lengths_do_not_move_the_share(tmp_path: Path) -> None:
    lengths = [1 + (7919 * n) % 97 for n in range(400)]
    val = write(tmp_path, lengths, 0.05)["val"]
    assert len(val) == pytest.approx(0.05 * sum(lengths), abs=97)


def test_one_long_document_gives_its_end(tmp_path: Path) -> None:
    found = write(tmp_path, [1000], 0.1)
    assert (len(found["train"]), len(found["val"])) == (900, 100)


def test_parts_of_long_documents_are_never_picked_for_validation(tmp_path: Path) -> None:
    found = write(tmp_path, [10] * 100, 0.1, whole=False)
    assert found["val"] == sorted([90, 91, 92, 93, 94, 95, 96, 97, 98, 99] * 10)  # the end of the whole


def test_no_validation(tmp_path: Path) -> None:
    assert write(tmp_path, [10] * 20, 0.0)["val"] == []


def test_training_always_gets_something(tmp_path: Path) -> None:
    assert len(write(tmp_path, [10], 0.999)["train"]) == 1


@pytest.mark.parametrize(
    ("tokens", "train", "val", "expected"),
    [(10, 90, 0, True), (10, 40, 0, True), (10, 39, 0, False), (10, 0, 0, False), (10, 90, 10, False)],
)
def test_belongs_to_val_at_a_tenth(tokens: int, train: int, val: int, expected: bool) -> None:
    """Half of the document or more must be due: 0.1 x (40 + 10) = 5."""
    assert belongs_to_val(tokens, train, val, 0.1) is expected


@pytest.mark.parametrize(
    ("train", "val", "expected"), [(100, 0, 10), (95, 5, 0), (96, 4, 6), (100, 100, 0), (0, 0, 0), (1, 0, 0)]
)
def test_tail_tokens_at_a_tenth(train: int, val: int, expected: int) -> None:
    assert tail_tokens(train, val, 0.1) == expected
