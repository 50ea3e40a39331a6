"""Reads documents from files, in pieces short enough to encode one at a time.

A text file is one document; in a `.jsonl` file, the `text` field of each line is one. Long documents are cut
where GPT-2's splitting pattern cuts, too: before a white-space character followed by a non-space. The tokens
of the pieces are therefore the tokens of the whole.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO

from data.errors import SourceError
from data.sources import SourceFile, source_error
from data.tokenizer import MAX_TEXT_CHARS

PIECE_CHARS = MAX_TEXT_CHARS
_SNIFF_CHARS = 8192

# Unicode's White_Space, which Rust's `\s` matches. Python's `\s` also matches \x1c to \x1f.
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_CUT = re.compile(f"[{_SPACE}](?=[^{_SPACE}])")
_CUT_SEARCH_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one."""

    text: str
    starts_document: bool
    ends_document: bool


@dataclass(slots=True)
class Reading:
    """What `read_pieces` has read so far."""

    stored_bytes: int = 0
    documents: int = 0
    empty: int = 0
    binary: list[str] = field(default_factory=list)
    undecoded: list[str] = field(default_factory=list)
    """Files with invalid UTF-8, which became U+FFFD, or with that character itself."""


def read_pieces(files: Iterable[SourceFile], reading: Reading) -> Iterator[Piece]:
    """The pieces of every document of every file, in order; updates `reading`.

    Skips empty documents, and binary files found in a folder. Raises SourceError, with the file and for
    `.jsonl` the line, for unreadable input and for a binary file that the user named.
    """
    for file in files:
        before = reading.stored_bytes
        try:
            with file.open() as (plain, stored):
                for document in _documents(file, plain, reading):
                    reading.stored_bytes = before + stored.tell()
                    yield from document
        except Exception as error:
            # As in find_files: stores and decompressors raise exceptions of their own.
            raise source_error(f"cannot read the source file {file.path}", error) from error
        reading.stored_bytes = before + file.size


def cut_text(chunks: Iterable[str], piece_chars: int = PIECE_CHARS) -> Iterator[Piece]:
    """Cut one document, given in chunks of any length, into pieces of at most `piece_chars` characters.

    Where `piece_chars` characters have no good place to cut, the cut is arbitrary. An empty document has no
    pieces.
    """
    text, started = "", False
    for chunk in chunks:
        text += chunk
        # At least two more: a cut at `piece_chars` looks at the next character, and the pieces must not
        # depend on the chunks.
        while len(text) > piece_chars + 1:
            cut = _last_cut(text, piece_chars)
            yield Piece(text[:cut], starts_document=not started, ends_document=False)
            text, started = text[cut:], True
    if len(text) > piece_chars:
        cut = _last_cut(text, piece_chars)
        yield Piece(text[:cut], starts_document=not started, ends_document=False)
        text, started = text[cut:], True
    if text:
        yield Piece(text, starts_document=not started, ends_document=True)


def _last_cut(text: str, end: int) -> int:
    """The last position in (0, end] where a cut changes no token, else `end`. `text` is longer than `end`."""
    high = end + 1
    while high > 1:
        low = max(1, high - _CUT_SEARCH_CHARS)
        cuts = [match.start() for match in _CUT.finditer(text, low, high + 1)]  # in [low, high)
        if cuts:
            return cuts[-1]
        high = low
    return end


def _documents(file: SourceFile, plain: IO[bytes], reading: Reading) -> Iterator[Iterator[Piece]]:
    """The pieces of each document of a file. Invalid UTF-8 becomes U+FFFD."""
    if file.is_jsonl:
        for text in _jsonl_texts(file, plain):
            if text:
                reading.documents += 1
                yield cut_text(text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS))
            else:
                reading.empty += 1
        return
    stream = io.TextIOWrapper(plain, encoding="utf-8", errors="replace", newline="")
    start = stream.read(PIECE_CHARS)
    if "\0" in start[:_SNIFF_CHARS]:
        if file.named:
            raise SourceError(
                f"the source file {file.where} is not UTF-8 text (it has NUL characters): convert it first"
            )
        reading.binary.append(file.name)
    elif start:
        reading.documents += 1
        yield cut_text(_noting(_chunks(start.removeprefix("\ufeff"), stream), file.name, reading))
    else:
        reading.empty += 1
    stream.detach()


def _chunks(start: str, stream: io.TextIOWrapper) -> Iterator[str]:
    yield start
    while chunk := stream.read(PIECE_CHARS):
        yield chunk


def _noting(chunks: Iterator[str], name: str, reading: Reading) -> Iterator[str]:
    for chunk in chunks:
        if "\ufffd" in chunk and reading.undecoded[-1:] != [name]:
            reading.undecoded.append(name)
        yield chunk


def _jsonl_texts(file: SourceFile, plain: IO[bytes]) -> Iterator[str]:
    """The `text` of each line; skips blank lines. Raises SourceError with the line number."""
    for number, line in enumerate(plain, start=1):
        if line.isspace():
            continue
        where = f"line {number:,} of {file.where}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SourceError(
                f"{where} is not valid JSON ({error}): a .jsonl file has one JSON object per line"
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get("text"), str):
            raise SourceError(
                f'{where} has no \'text\' string: each line must be {{"text": "..."}}'
            )
        yield value["text"]
