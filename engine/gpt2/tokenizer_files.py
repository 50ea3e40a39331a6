"""Writes `vocab.json` and `merges.txt` for Hugging Face's GPT-2 tokenizer, from byte-pair ranks.

The byte alphabet and both formats follow OpenAI's gpt-2 `encoder.py`; the way to derive merges from ranks
follows tiktoken's `_educational.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from data.tokenizer import ByteTokenizer, Gpt2Tokenizer, gpt2_ranks
from engine.errors import StateError

_END_OF_TEXT = "<|endoftext|>"


def write_tokenizer(folder: Path, vocab_size: int, context: int) -> int | None:
    """Write the tokenizer of a model with this vocabulary size; returns the id of end of text.

    Writes nothing and returns None if none of our tokenizers has that size. DataError if our vocabulary file
    is damaged.
    """
    known = tokenizer_name(vocab_size)
    if known is None:
        return None
    ranks = gpt2_ranks() if known == Gpt2Tokenizer.name else {bytes([byte]): byte for byte in range(256)}
    alphabet = byte_alphabet()
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    vocabulary = {_spell(token, alphabet): rank for token, rank in ordered}
    end_of_text = len(vocabulary)
    vocabulary[_END_OF_TEXT] = end_of_text
    lines = [f"{_spell(one, alphabet)} {_spell(two, alphabet)}\n" for one, two in merges(ranks)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(lines), encoding="utf-8")
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": context,
        "bos_token": _END_OF_TEXT,
        "eos_token": _END_OF_TEXT,
        "unk_token": _END_OF_TEXT,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return end_of_text


def tokenizer_name(vocab_size: int) -> str | None:
    """The tokenizer of ours with this vocabulary size, which may be padded; None if there is none."""
    if Gpt2Tokenizer.vocab_size <= vocab_size < Gpt2Tokenizer.vocab_size + 1024:
        return Gpt2Tokenizer.name
    return ByteTokenizer.name if vocab_size == ByteTokenizer.vocab_size else None


def byte_alphabet() -> dict[int, str]:
    """A printable character for each byte: its own, or one from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in alphabet:
            alphabet[byte] = chr(256 + len(alphabet) - len(plain))
    return alphabet


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair from which each token of several bytes was merged, in the order of ranks. Pure.

    StateError for ranks that are not a byte-pair encoding.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _encode(token, ranks, below=rank)
        if len(parts) != 2:
            raise StateError(f"the token of rank {rank} is not a merge of two tokens of lower rank")
        pairs.append((parts[0], parts[1]))
    return pairs


def _encode(token: bytes, ranks: Mapping[bytes, int], below: int) -> list[bytes]:
    """Byte-pair encode `token` with the ranks below `below`."""
    parts = [bytes([byte]) for byte in token]
    while True:
        candidates = [
            (rank, place)
            for place in range(len(parts) - 1)
            if (rank := ranks.get(parts[place] + parts[place + 1], below)) < below
        ]
        if not candidates:
            return parts
        _, place = min(candidates)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _spell(token: bytes, alphabet: Mapping[int, str]) -> str:
    return "".join(alphabet[byte] for byte in token)
