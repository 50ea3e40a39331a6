"""data.sources: what --source can name."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data.errors import SourceError
from data.sources import find_files, redact, source_error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["b.txt", "a.txt", "sub/c.txt", "sub/deep/d.jsonl", ".hidden", ".git/x", "__pycache__/y"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    for name in ["corpus/b.txt", "corpus/a.txt", "corpus/sub/c.txt", "corpus/.hidden/x"]:
        filesystem.pipe(f"/{name}", name.encode())
    yield "memory://corpus"
    filesystem.rm("/corpus", recursive=True)


def names(source: str) -> list[str]:
    return [file.name for file in find_files(source)]


def test_a_folder_is_every_file_that_is_not_hidden_by_name(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)  # a link between folders is not followed
    assert names(str(folder)) == ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.jsonl"]
    assert [file.size for file in find_files(str(folder))] == [5, 5, 9, 16]


def test_a_file_is_itself_and_said_to_be_named(folder: Path) -> None:
    (file,) = find_files(str(folder / "a.txt"))
    assert (file.name, file.named) == ("a.txt", True)
    assert not find_files(str(folder))[0].named


def test_globs(folder: Path) -> None:
    assert [os.path.basename(name) for name in names(f"{folder}/*.txt")] == ["a.txt", "b.txt"]
    assert [os.path.basename(name) for name in names(f"{folder}/**/*.txt")] == ["a.txt", "b.txt", "c.txt"]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert names("~/a.txt") == ["a.txt"]


def test_uris(memory: str, folder: Path) -> None:
    assert names(memory) == ["a.txt", "b.txt", "sub/c.txt"]
    assert [os.path.basename(name) for name in names(memory + "/*.txt")] == ["a.txt", "b.txt"]
    (file,) = find_files(memory + "/sub/c.txt")
    assert (file.name, file.size, file.named) == ("c.txt", 16, True)
    with file.open() as (plain, _):
        assert plain.read() == b"corpus/sub/c.txt"
    with find_files(memory)[2].open() as (plain, _):
        assert plain.read() == b"corpus/sub/c.txt"
    assert names(f"file://{folder}/sub") == ["c.txt", "deep/d.jsonl"]


def test_the_standard_library() -> None:
    files = find_files("stdlib")
    found = [file.name for file in files]
    assert "json/decoder.py" in found
    assert all(name.endswith(".py") for name in found)
    assert not any("-packages" in name for name in found)
    assert sum(file.size for file in files) > 10_000_000
    assert os.path.dirname(os.__file__) == files[found.index("os.py")].path.removesuffix("/os.py")


@pytest.mark.parametrize("source", ["missing.txt", "missing/*.txt", "memory://missing", "memory://missing/*"])
def test_nothing_found(source: str) -> None:
    with pytest.raises(SourceError, match=r"no files found at the source .*missing"):
        find_files(source)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no files found"):
        find_files(str(tmp_path))


def test_what_a_library_raises_becomes_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match=r"cannot list the source nope://x: Protocol not known"):
        find_files("nope://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    with pytest.raises(SourceError, match=r"cannot list the source s3://bucket/x: .*s3fs"):
        find_files("s3://key:secret@bucket/x")


def test_secrets_stay_out_of_messages() -> None:
    assert redact("s3://key:secret@bucket/a") == "s3://bucket/a"
    assert redact("https://host/a.gz?sig=secret&x=1") == "https://host/a.gz"
    assert redact("zip://a::https://u:secret@host/a?sig=secret") == "zip://a::https://host/a"
    assert redact("books/part?.txt") == "books/part?.txt"
    error = source_error("cannot read x", OSError("GET https://host/a?sig=secret\nfailed"))
    assert str(error) == "cannot read x: GET https://host/a failed"
