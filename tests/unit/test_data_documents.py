"""data.documents: files to pieces, cut where no token changes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.documents import Piece, Reading, cut_text, read_pieces
from data.errors import SourceError
from data.sources import find_files
from data.tokenizer import load_tokenizer

GPT2 = load_tokenizer("gpt2")

# Text in which cuts fall at every kind of place: runs of spaces, words, digits, Unicode spaces, separators.
alphabet = st.sampled_from(" \n\t\r\x1c\x85\u00a0\u2003\u3000ab'stll12,.中é") | st.characters(codec="utf-8")
prose = st.text(alphabet, max_size=300)


def texts_of(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


@settings(max_examples=300)
@given(prose, st.integers(20, 60))
def test_cutting_changes_no_token(text: str, piece_chars: int) -> None:
    pieces = list(cut_text([text], piece_chars))
    assert "".join(texts_of(pieces)) == text
    assert all(0 < len(piece.text) <= piece_chars for piece in pieces)
    if any(len(piece.text) == piece_chars for piece in pieces):
        return  # possibly cut anywhere, for want of a place
    tokens = [GPT2.encode(piece.text) for piece in pieces]
    assert np.array_equal(np.concatenate([*tokens, np.empty(0, np.uint16)]), GPT2.encode(text))


@settings(max_examples=100)
@given(prose, st.integers(1, 30), st.integers(1, 50))
def test_pieces_do_not_depend_on_how_the_text_arrives(text: str, piece_chars: int, chunk: int) -> None:
    chunks = [text[at : at + chunk] for at in range(0, len(text), chunk)]
    assert list(cut_text(chunks, piece_chars)) == list(cut_text([text], piece_chars))


def test_the_last_place_to_cut_is_taken() -> None:
    assert texts_of(list(cut_text(["one two three"], 8))) == ["one two", " three"]
    assert texts_of(list(cut_text(["one  \n two"], 8))) == ["one  \n", " two"]
    assert texts_of(list(cut_text(["a" * 9 + " b"], 4))) == ["aaaa", "aaaa", "a b"]
    assert texts_of(list(cut_text(["one two three"], 7))) == ["one two", " three"]
    # Python counts \x1c as white space, GPT-2's pattern does not: it stays with the space before it.
    assert texts_of(list(cut_text(["aaaa \x1cbbbb"], 8))) == ["aaaa", " \x1cbbbb"]
    assert texts_of(list(cut_text(["a cd ", "e"], 4))) == ["a cd", " e"]  # decided by what comes later
    far = "x " + "y" * 20_000  # further back than one search window
    assert texts_of(list(cut_text([far], 10_000)))[0] == "x"


def test_only_the_first_piece_starts_and_only_the_last_ends() -> None:
    pieces = list(cut_text(["one two three"], 8))
    assert [(p.starts_document, p.ends_document) for p in pieces] == [(True, False), (False, True)]
    assert list(cut_text(["all"], 8)) == [Piece("all", True, True)]
    assert list(cut_text([""], 8)) == []


def read(source: Path) -> tuple[list[str], Reading]:
    reading = Reading()
    return texts_of(list(read_pieces(find_files(str(source)), reading))), reading


def test_text_files_are_a_document_each(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\r\nb\n")  # a byte order mark is no text, line ends are
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")  # Latin-1
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0\0")
    texts, reading = read(tmp_path)
    assert texts == ["a = 1\n", "b\r\nb\n", "zipped", "caf\ufffd"]
    assert (reading.documents, reading.empty, reading.binary) == (4, 1, ["image.png"])
    assert reading.undecoded == ["d.txt"]
    assert reading.stored_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.ndjson"])
def test_jsonl_lines_are_a_document_each(tmp_path: Path, name: str) -> None:
    lines = [{"text": "one\u2028\x85"}, {"text": "", "id": 3}, {"id": 4, "text": "two"}]
    raw = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    texts, reading = read(path)
    assert texts == ["one\u2028\x85", "two"]
    assert (reading.documents, reading.empty) == (2, 1)


def test_a_long_jsonl_document_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "word " * 300_000}) + "\n")
    reading = Reading()
    pieces = list(read_pieces(find_files(str(path)), reading))
    assert "".join(texts_of(pieces)) == "word " * 300_000
    assert [p.starts_document for p in pieces] == [True, False, False]
    assert reading.documents == 1


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"', r"line 2 of .*x\.jsonl is not valid JSON"),
        ("x.jsonl", b'{"text": "a"}\n\n{"body": "b"}', r"line 3 of .*x\.jsonl has no 'text' string"),
        ("x.jsonl", b'{"text": 5}', "line 1 of .* has no 'text' string"),
        ("x.jsonl", b'["text"]', "line 1 of .* has no 'text' string"),
        ("x.jsonl", b'{"text": "\xff"}', "line 1 of .* is not valid JSON"),
        ("x.jsonl", b"[" * 100_000, "line 1 of .* is not valid JSON"),
        ("x.txt", "text".encode("utf-16"), "not UTF-8 text"),
        ("x.txt.gz", b"no gzip at all", r"cannot read the source file .*x\.txt\.gz: Not a gzipped file"),
        (
            "x.txt.gz",
            gzip.compress(b"whole text" * 99, mtime=0)[:-9],
            "cannot read the source file .*ended before",
        ),
        (
            "x.txt.gz",
            gzip.compress(bytes(range(256)) * 99, mtime=0)[:20] + b"x" * 99,
            "cannot read the source file",
        ),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
