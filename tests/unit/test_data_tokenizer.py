"""data.tokenizer: GPT-2's tokens offline, and bytes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError, ShardError
from data.tokenizer import GPT2_RANKS, MAX_TEXT_CHARS, Gpt2Tokenizer, Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello world", [31373, 995]),
        (
            "Hello, I'm a language model,",
            [15496, 11, 314, 1101, 257, 3303, 2746, 11],
        ),  # as transformers gives
        ("", []),
        (
            "<|endoftext|>",
            [27, 91, 437, 1659, 5239, 91, 29],
        ),  # ordinary text: no document ends inside another
    ],
)
def test_gpt2_gives_the_published_tokens(gpt2: Tokenizer, text: str, tokens: list[int]) -> None:
    encoded = gpt2.encode(text)
    assert encoded.tolist() == tokens
    assert encoded.dtype == np.uint16


def test_gpt2_sizes(gpt2: Tokenizer) -> None:
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot_token) == ("gpt2", 50257, 50256)
    assert gpt2.decode([31373, 995, 50256]) == "hello world<|endoftext|>"


def test_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eot_token) == ("bytes", 257, 256)
    assert tokenizer.encode("aé").tolist() == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169, 256]) == "aé"


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_lone_surrogates_do_not_stop_a_run(name: str) -> None:
    """JSON can spell characters that UTF-8 cannot hold."""
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("a\ud800b").tolist()) == "a\ufffdb"


@settings(max_examples=50)
@given(st.text())
def test_round_trip(text: str) -> None:
    for tokenizer in (GPT2, load_tokenizer("bytes")):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens.tolist()) == text
        assert not tokens.size or tokens.max() < tokenizer.eot_token


def test_the_longest_run_of_spaces_does_not_panic(gpt2: Tokenizer) -> None:
    """tiktoken panics on a run of a million spaces before a word."""
    assert gpt2.encode(" " * (MAX_TEXT_CHARS - 1) + "x").size > 0
    with pytest.raises(DataError, match="too long"):
        gpt2.encode(" " * (MAX_TEXT_CHARS + 1))


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="unknown tokenizer 'gpt5': choose one of gpt2, bytes"):
        load_tokenizer("gpt5")


def test_a_changed_vocabulary_is_noticed(tmp_path: Path) -> None:
    damaged = tmp_path / "gpt2.tiktoken"
    damaged.write_bytes(GPT2_RANKS.read_bytes()[:-3])
    with pytest.raises(ShardError, match="sha256"):
        Gpt2Tokenizer(damaged)
    with pytest.raises(ShardError, match="cannot read"):
        Gpt2Tokenizer(tmp_path / "missing")


def test_the_licence_lies_beside_the_vocabulary() -> None:
    from data.tokenizer import GPT2_RANKS_SHA256

    note = GPT2_RANKS.with_name("gpt2.tiktoken.md").read_text()
    assert "Copyright (c) 2022 OpenAI" in note
    assert GPT2_RANKS_SHA256 in note


GPT2 = load_tokenizer("gpt2")
