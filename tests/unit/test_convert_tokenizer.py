"""Tokenizer files, rebuilt from ranks: byte for byte those that OpenAI published."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from data.tokenizer import ByteTokenizer, Gpt2Tokenizer
from engine.errors import StateError
from engine.gpt2.tokenizer_files import byte_alphabet, merges, tokenizer_name, write_tokenizer

# As tiktoken pins them (tiktoken_ext/openai_public.py, gpt2): encoder.json and vocab.bpe.
VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"

TEXTS = ("Hello world!", "  naïve  日本語 🎉 it's\n\n x=1", "\t\x00 end  ", "def f(x):\n    return x**2\n")


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    assert write_tokenizer(folder, 50257, 1024) == 50256
    return folder


def test_they_are_the_published_files(gpt2_files: Path) -> None:
    for name, wanted in (("vocab.json", VOCAB_SHA256), ("merges.txt", MERGES_SHA256)):
        assert hashlib.sha256((gpt2_files / name).read_bytes()).hexdigest() == wanted


def test_transformers_reads_them(gpt2_files: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(gpt2_files)
    ours = Gpt2Tokenizer()
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(ours.encode(text).tolist()) == text
    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.eot_token, 1024)


def test_bytes_are_a_gpt2_tokenizer_without_merges(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path, 257, 12) == 256
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted(vocabulary.values()) == list(range(257))
    assert (tmp_path / "merges.txt").read_text() == "#version: 0.2\n"
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ByteTokenizer().encode(text).tolist()


def test_an_unknown_vocabulary_gets_no_files(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path, 1000, 12) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("size", "name"),
    [(50257, "gpt2"), (50304, "gpt2"), (50256, None), (257, "bytes"), (256, None), (60000, None)],
)
def test_the_vocabulary_tells_the_tokenizer(size: int, name: str | None) -> None:
    assert tokenizer_name(size) == name


def test_every_byte_has_a_printable_letter_of_its_own() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet.values())) == len(alphabet) == 256
    assert all(letter.isprintable() and not letter.isspace() for letter in alphabet.values())


def test_merges_come_out_in_the_order_of_ranks() -> None:
    ranks = {b"a": 0, b"b": 1, b"c": 2, b"bc": 3, b"abc": 4}
    assert merges(ranks) == [(b"b", b"c"), (b"a", b"bc")]


def test_ranks_that_no_merging_gives_are_refused() -> None:
    with pytest.raises(StateError, match="rank 3"):
        merges({b"a": 0, b"b": 1, b"c": 2, b"abc": 3})
