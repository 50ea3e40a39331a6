"""Tokenizers: GPT-2's byte-pair encoding, with the vocabulary in this folder, and plain bytes.

Neither uses the network. Special tokens in text are ordinary text: the only special token, end of text, is
added between documents when shards are written.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tiktoken

from data.errors import DataError, ShardError

TOKENIZERS = ("gpt2", "bytes")

GPT2_VOCAB_SIZE = 50257
GPT2_RANKS = Path(__file__).with_name("gpt2.tiktoken")
GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# tiktoken's own splitting pattern for GPT-2 (tiktoken_ext/openai_public.py, `r50k_pat_str`): equivalent to
# the original release's and faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

MAX_TEXT_CHARS = 1 << 19
"""Longest text that `encode` accepts. On about a million spaces in a row, tiktoken's regular expression
overflows its stack (a Rust panic); half a million characters are safe."""


class Tokenizer(Protocol):
    """The tokenizer interface that dataset preparation uses."""

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids, including end of text."""
        ...

    @property
    def eot_token(self) -> int:
        """The id that starts every document."""
        ...

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Token ids of `text`, at most `MAX_TEXT_CHARS` characters; special tokens in it are ordinary text.

        Lone surrogates, which UTF-8 cannot encode, become U+FFFD."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`; invalid UTF-8 becomes U+FFFD."""
        ...


class Gpt2Tokenizer:
    """GPT-2's byte-pair encoding: 50,256 ranks and `<|endoftext|>` = 50256.

    Raises ShardError if the vocabulary file is missing or damaged.
    """

    name = "gpt2"
    vocab_size = GPT2_VOCAB_SIZE
    eot_token = GPT2_VOCAB_SIZE - 1

    def __init__(self, ranks_file: Path = GPT2_RANKS) -> None:
        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=gpt2_ranks(ranks_file),
            special_tokens={"<|endoftext|>": self.eot_token},
            explicit_n_vocab=self.vocab_size,
        )

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        _check_length(text)
        return np.asarray(self._encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode([int(token) for token in tokens])


class ByteTokenizer:
    """One token per UTF-8 byte, and 256 for end of text; for tests and tiny models."""

    name = "bytes"
    vocab_size = 257
    eot_token = 256

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        _check_length(text)
        try:
            raw = text.encode()
        except UnicodeEncodeError:
            # Surrogate pairs become their character and lone ones U+FFFD, exactly as in tiktoken.
            raw = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(int(token) for token in tokens if token != self.eot_token).decode(errors="replace")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer called `name`. Raises DataError for an unknown name."""
    if name == Gpt2Tokenizer.name:
        return Gpt2Tokenizer()
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    raise DataError(f"unknown tokenizer {name!r}: choose one of {', '.join(TOKENIZERS)}")


def gpt2_ranks(path: Path = GPT2_RANKS) -> dict[bytes, int]:
    """The ranks of GPT-2's tokens, without end of text. ShardError if the file is missing or damaged."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ShardError(
            f"cannot read the GPT-2 vocabulary {path}: {error.strerror}; reinstall Holdfast"
        ) from error
    found = hashlib.sha256(raw).hexdigest()
    if found != GPT2_RANKS_SHA256:
        raise ShardError(
            f"the GPT-2 vocabulary {path} is damaged: sha256 {found}, expected {GPT2_RANKS_SHA256}; "
            "reinstall Holdfast"
        )
    pairs = (line.split() for line in raw.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _check_length(text: str) -> None:
    if len(text) > MAX_TEXT_CHARS:
        raise DataError(
            f"a text of {len(text):,} characters is too long to encode at once (limit {MAX_TEXT_CHARS:,}): "
            "cut it with data.documents.cut_text"
        )
