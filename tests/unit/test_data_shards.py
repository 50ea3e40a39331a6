"""data.shards: three formats read, one written, and every way a shard can be wrong noticed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import ShardError
from data.shards import HEADER_BYTES, MAGIC, ShardWriter, inspect_shard, open_tokens, take_tail

TOKENS = np.array([50256, 0, 1, 65535, 7], dtype=np.uint16)


def header(magic: int = MAGIC, version: int = 1, tokens: int = TOKENS.size) -> bytes:
    """llm.c's header, spelled out here so that a mistake in the module does not repeat itself."""
    return b"".join(n.to_bytes(4, "little", signed=True) for n in (magic, version, tokens)) + bytes(253 * 4)


def write_llmc(path: Path) -> None:
    path.write_bytes(header() + TOKENS.astype("<u2").tobytes())


def write_nanogpt(path: Path) -> None:
    TOKENS.tofile(path)


def write_npy(path: Path) -> None:
    np.save(path, TOKENS)


@pytest.mark.parametrize(
    ("name", "write"), [("a.bin", write_llmc), ("a.bin", write_nanogpt), ("a.npy", write_npy)]
)
def test_every_format_reads_the_same_tokens(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    shard = inspect_shard(tmp_path / name)
    tokens = open_tokens(shard)
    assert (shard.tokens, shard.name) == (5, name)
    assert tokens.tolist() == TOKENS.tolist()
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable


@pytest.mark.parametrize("dtype", ["<i4", "<u4", "<i8", ">u2"])
def test_npy_of_other_integers(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "a.npy", TOKENS.astype(dtype))
    assert open_tokens(inspect_shard(tmp_path / "a.npy")).tolist() == TOKENS.tolist()


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.bin", header() + TOKENS.tobytes()[:-1], r"truncated: its header says 5 tokens \(1,034 bytes\)"),
        ("a.bin", header() + TOKENS.tobytes()[:-2], "truncated"),
        ("a.bin", header() + TOKENS.tobytes() + b"\0\0", "damaged: its header says 5 tokens"),
        ("a.bin", header(tokens=-5) + TOKENS.tobytes(), "damaged: its header says -5 tokens"),
        ("a.bin", header(tokens=0), "holds no tokens"),
        ("a.bin", header()[:100], "truncated: 100 bytes, its header alone has 1,024"),
        ("a.bin", header(version=7) + TOKENS.tobytes(), "format version 7"),
        ("a.bin", header(magic=20240522), "an llm.c evaluation file"),
        ("a.bin", header(magic=20240801), "Llama 3"),
        ("a.bin", b"abc", r"odd number of bytes \(3\)"),
        ("a.bin", b"", "holds no tokens"),
        ("a.npy", b"", "not a readable .npy"),
        ("a.npy", b"\x93NUMPY\x01\x00", "not a readable .npy"),
        ("a.npy", b"no array at all", "not a readable .npy"),
    ],
)
def test_a_wrong_shard_says_how(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ShardError, match=message) as caught:
        inspect_shard(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 3), np.uint16),
        np.zeros(3, np.float32),
        np.array(5, np.uint16),
        np.array([{}], dtype=object),
    ],
)
def test_npy_arrays_that_are_no_tokens(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ShardError, match=r"a\.npy"):
        inspect_shard(tmp_path / "a.npy")


def test_npy_cut_short_or_empty(tmp_path: Path) -> None:
    write_npy(tmp_path / "a.npy")
    raw = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(raw[:-2])
    np.save(tmp_path / "b.npy", TOKENS[:0])
    for name in ("a.npy", "b.npy"):
        with pytest.raises(ShardError, match=name):
            inspect_shard(tmp_path / name)


def test_missing_and_unreadable(tmp_path: Path) -> None:
    (tmp_path / "folder.bin").mkdir()
    for name in ("missing.bin", "missing.npy", "folder.bin"):
        with pytest.raises(ShardError, match=f"cannot read shard .*{name}"):
            inspect_shard(tmp_path / name)


def test_a_shard_that_shrinks_is_not_mapped(tmp_path: Path) -> None:
    """Reading a mapping past the end of its file would kill the process with SIGBUS."""
    path = tmp_path / "a.bin"
    write_llmc(path)
    shard = inspect_shard(path)
    with open(path, "r+b") as file:
        file.truncate(HEADER_BYTES + 4)
    with pytest.raises(ShardError, match=r"has shrunk to 1,028 bytes, but its 5 tokens need 1,034"):
        open_tokens(shard)
    path.unlink()
    with pytest.raises(ShardError, match="cannot map"):
        open_tokens(shard)


def test_written_as_llmc_reads_it(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 100)
    writer.append(TOKENS)
    writer.close()
    assert (tmp_path / "train_000000.bin").read_bytes() == header() + TOKENS.tobytes()


@settings(max_examples=40, deadline=None)  # it waits for fsync
@given(st.lists(st.integers(0, 30), max_size=6), st.integers(1, 20), st.integers(0, 100))
def test_written_tokens_come_back_in_full_shards_and_tails_come_off(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, tail: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    writer = ShardWriter(folder, "val", shard_tokens)
    for end, length in zip(np.cumsum(lengths), lengths, strict=True):
        writer.append(tokens[end - length : end])
    writer.close()
    assert writer.tokens == tokens.size
    assert writer.shards == [inspect_shard(path) for path in sorted(folder.iterdir())]
    assert all(shard.tokens == shard_tokens for shard in writer.shards[:-1])

    kept, taken = take_tail(writer.shards, tail)
    assert kept == [inspect_shard(path) for path in sorted(folder.iterdir())]
    parts = [open_tokens(shard) for shard in kept] + [taken]
    assert np.concatenate(parts).tolist() == tokens.tolist()
    assert taken.size == min(tail, tokens.size)


def test_an_unfinished_shard_is_not_accepted(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 100)
    writer.append(TOKENS)
    writer.abandon()
    with pytest.raises(ShardError, match="damaged: its header says 0 tokens"):
        inspect_shard(tmp_path / "train_000000.bin")


@pytest.mark.parametrize("shard_tokens", [0, 2**31])
def test_impossible_shard_sizes(tmp_path: Path, shard_tokens: int) -> None:
    with pytest.raises(ShardError, match="a shard holds 1 to 2,147,483,647 tokens"):
        ShardWriter(tmp_path, "train", shard_tokens)
