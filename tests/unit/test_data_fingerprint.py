"""data.fingerprint: changes with what it covers, and with nothing else."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.dataset import DESCRIPTION, open_dataset
from data.fingerprint import EDGE_BYTES, fingerprint

MIB_TOKENS = EDGE_BYTES // 2
GOLDEN = "gpt2-8-80be6969e6cd6b0135dc2595de3c44a7"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One training shard of 3 MiB and a short validation shard."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (np.arange(3 * MIB_TOKENS) % 50_000).astype(np.uint16).tofile(folder / "a_train_1.bin")
    np.arange(9, dtype=np.uint16).tofile(folder / "a_val_0.bin")
    return folder


def of(folder: Path, seq_len: int = 8) -> str:
    return fingerprint(open_dataset(folder), seq_len)


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_readable_and_stable(folder: Path) -> None:
    assert of(folder) == GOLDEN
    assert of(folder) == of(folder)


def test_the_place_of_the_folder_does_not_matter(folder: Path) -> None:
    before = of(folder)
    assert of(folder.rename(folder.with_name("moved"))) == before


def test_the_middle_of_a_shard_is_not_read(folder: Path) -> None:
    before = of(folder)
    for offset in (EDGE_BYTES, 2 * EDGE_BYTES - 1):
        flip(folder / "a_train_1.bin", offset)
    assert of(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip(folder / "a_train_1.bin", 0),
        lambda folder: flip(folder / "a_train_1.bin", EDGE_BYTES - 1),
        lambda folder: flip(folder / "a_train_1.bin", 2 * EDGE_BYTES),
        lambda folder: flip(folder / "a_train_1.bin", 3 * EDGE_BYTES - 1),
        lambda folder: flip(folder / "a_val_0.bin", 4),
        lambda folder: (folder / "a_train_1.bin").rename(folder / "a_train_2.bin"),
        lambda folder: (folder / "a_val_0.bin").unlink(),
        lambda folder: np.arange(9, dtype=np.uint16).tofile(folder / "a_train_2.bin"),
        lambda folder: (folder / DESCRIPTION).write_text('{"version":1,"tokenizer":"x","vocab_size":50257}'),
        lambda folder: (folder / DESCRIPTION).write_text(
            '{"version":1,"tokenizer":"gpt2","vocab_size":50304}'
        ),
    ],
)
def test_everything_that_changes_batches_shows(folder: Path, change: Callable[[Path], object]) -> None:
    before = of(folder)
    change(folder)
    assert of(folder) != before


def test_the_token_count_shows_where_the_edges_are_alike(tmp_path: Path) -> None:
    np.zeros(3 * MIB_TOKENS, np.uint16).tofile(tmp_path / "train.bin")
    before = of(tmp_path)
    np.zeros(4 * MIB_TOKENS, np.uint16).tofile(tmp_path / "train.bin")
    assert of(tmp_path) != before


def test_the_sequence_length_shows(folder: Path) -> None:
    assert of(folder, 8).split("-")[2] != of(folder, 16).split("-")[2]
    assert of(folder, 16).startswith("gpt2-16-")


def test_two_shards_that_swap_names_show(folder: Path) -> None:
    np.arange(9, 18, dtype=np.uint16).tofile(folder / "a_val_1.bin")
    before = of(folder)
    (folder / "a_val_0.bin").rename(folder / "x")
    (folder / "a_val_1.bin").rename(folder / "a_val_0.bin")
    (folder / "x").rename(folder / "a_val_1.bin")
    assert of(folder) != before
