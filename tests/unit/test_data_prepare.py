"""data.prepare: the program, on small sources."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import data.encode
from data.dataset import open_dataset
from data.documents import Reading
from data.errors import DataError
from data.loader import TokenLoader
from data.prepare import Recipe, default_out, main, prepare
from data.shards import open_tokens
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"document {number}\n" * (number + 1))
    return folder


def tokens(folder: Path, split: str) -> list[int]:
    return [int(t) for shard in open_dataset(folder).splits[split] for t in open_tokens(shard)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_documents_are_encoded_in_order_each_after_an_end_of_text(tmp_path: Path, source: Path) -> None:
    dataset, reading = prepare(str(source), tmp_path / "out", Recipe(val_fraction=0))
    gpt2 = load_tokenizer("gpt2")
    expected = [gpt2.encode(path.read_text()).tolist() for path in sorted(source.iterdir())]
    assert tokens(tmp_path / "out", "train") == [t for document in expected for t in [50256, *document]]
    assert (dataset.tokenizer, dataset.vocab_size, dataset.tokens("val"), reading.documents) == (
        "gpt2",
        50257,
        0,
        40,
    )


def test_a_long_document_is_one_document(tmp_path: Path) -> None:
    text = "word " * 250_000  # more than two pieces
    (tmp_path / "long.txt").write_text(text)
    prepare(str(tmp_path / "long.txt"), tmp_path / "out", Recipe("bytes", val_fraction=0.25))
    assert tokens(tmp_path / "out", "train") + tokens(tmp_path / "out", "val") == [256, *text.encode()]
    assert open_dataset(tmp_path / "out").tokens("val") == (len(text) + 1 + 3) // 4


def test_the_loader_reads_it(tmp_path: Path, source: Path) -> None:
    prepare(str(source), tmp_path / "out", Recipe("bytes", val_fraction=0.1))
    loader = TokenLoader(tmp_path / "out", seq_len=16, global_batch=4)
    inputs, _ = loader.next_batch()
    assert (loader.vocab_size, inputs.shape) == (257, (4, 16))
    assert TokenLoader(tmp_path / "out", split="val", seq_len=16, global_batch=4).steps_per_epoch > 1


def test_the_output_does_not_depend_on_the_workers(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.encode, "BATCH_CHARS", 500)  # many batches, so that the order could go wrong
    for workers in (0, 2):
        prepare(
            str(source),
            tmp_path / f"out{workers}",
            Recipe(val_fraction=0.1, shard_tokens=900),
            workers=workers,
        )
    first = content(tmp_path / "out0")
    assert len(first) > 4
    assert content(tmp_path / "out2") == first


def test_progress_reaches_the_size_of_the_source(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.encode, "BATCH_CHARS", 500)
    calls: list[tuple[int, int]] = []
    (source / "z.txt.gz").write_bytes(gzip.compress(b"zipped " * 1000))
    prepare(str(source), tmp_path / "out", Recipe(), progress=lambda done, total: calls.append((done, total)))
    size = sum(path.stat().st_size for path in source.iterdir())
    assert len(calls) > 5
    assert calls == sorted(calls)
    assert calls[-1] == (size, size)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(data.encode, "BATCH_CHARS", 100)
    path = tmp_path / "source.jsonl"
    path.write_text('{"text": "fine, fine, fine"}\n' * 99 + "not JSON")
    with pytest.raises(DataError, match="line 100 of"):
        prepare(str(path), tmp_path / "out", Recipe("bytes"), workers=workers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.jsonl"]


class Bomb:
    """A piece of text that ends the process that receives it, as running out of memory would."""

    text = "x"

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


def test_a_dead_worker_is_an_error() -> None:
    pieces: Iterator[Any] = iter([Bomb()])
    with pytest.raises(DataError, match="a worker process died"):
        list(data.encode.encode_pieces(pieces, Reading(), load_tokenizer("bytes"), workers=1))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("flag", ["--sauce=x", "--val_fraction=much", "--tokenizer=words"])
def test_a_wrong_command_line_is_one_sentence(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, flag)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert flag.partition("=")[0] in err
    assert not set("╭╮╰╯─│") & set(err)


def test_the_program_reports_what_it_wrote(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "image").write_bytes(b"\0\1\2")
    (source / "zz-latin-1").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "--source", source, "--tokenizer", "bytes", "--val_fraction", "0.2")
    assert code == 0
    assert out.startswith("datasets/source-bytes: 41 documents, ")
    assert "skipped 1 binary files, for example image" in err
    assert "1 files contain invalid UTF-8, which became U+FFFD; for example zz-latin-1" in err
    description = json.loads((tmp_path / "datasets/source-bytes/dataset.json").read_text())
    counts = description["splits"]
    assert description["documents"] == 41
    assert counts["val"]["tokens"] == pytest.approx(
        0.2 * (counts["train"]["tokens"] + counts["val"]["tokens"]), rel=0.1
    )


def test_flags_take_dashes_too(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--val-fraction", "0", "--shard-tokens", "1000", "--tokenizer", "bytes"]
    assert run(capsys, "--source", source, "--out", tmp_path / "out", *flags)[0] == 0
    shards = open_dataset(tmp_path / "out").splits["train"]
    assert len(shards) > 2
    assert {shard.tokens for shard in shards[:-1]} == {1000}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "missing.txt"], "no files found at the source missing.txt"),
        (["--source", "s3x://bucket"], "cannot list the source s3x://bucket"),
        (["--val_fraction", "1"], "--val_fraction is 1.0, but must be"),
        (["--val_fraction", "-0.1"], "--val_fraction is -0.1, but must be"),
        (["--val_fraction", "nan"], "--val_fraction is nan, but must be"),
        (["--shard_tokens", "0"], "--shard_tokens 0 must be from 1 to"),
        (["--workers", "-1"], "--workers is -1, but must be"),
        (["--out", "s3://bucket/x"], "--out s3://bucket/x is a URI"),
        (["--out", ""], "--out is empty"),
        (["--out", "source"], "contains more than|already exists"),
        (["--out", "source", "--force"], "contains more than a prepared dataset"),
        (["--source", "source/../binary"], "the source file .*binary is not UTF-8 text"),
        (
            ["--source", "empties"],
            "no text in the source empties: of 2 files, 1 are binary and the others are empty",
        ),
        (["--out", "binary/x/y"], "cannot write the dataset .*: Not a directory"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(
    tmp_path: Path,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\0")
    (tmp_path / "empties").mkdir()
    (tmp_path / "empties" / "a").touch()
    (tmp_path / "empties" / "b").write_bytes(b"\0")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, "--source", source, "--out", "out", *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert_matches(message, err)
    assert sorted(tmp_path.rglob("*")) == before


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(DataError, match=pattern):
        raise DataError(text)


def test_an_existing_dataset_is_replaced_only_by_force(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--source", source, "--out", tmp_path / "out", "--tokenizer", "bytes"]
    assert run(capsys, *flags)[0] == 0
    before = content(tmp_path / "out")
    (source / "new.txt").write_text("more")
    code, _, err = run(capsys, *flags)
    assert code == 2
    assert "already exists: choose another --out, or replace it with --force" in err
    assert content(tmp_path / "out") == before
    assert run(capsys, *flags, "--force")[0] == 0
    assert content(tmp_path / "out") != before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = run(capsys, *flags, "--force")
    assert code == 2
    assert (tmp_path / "out" / "notes.txt").exists()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("stdlib", "stdlib"),
        ("books/", "books"),
        ("/data/my corpus.jsonl.gz", "my-corpus"),
        ("/data/books/*.txt", "books"),
        ("s3://key:secret@bucket/web/text.txt?sig=x", "text"),
        ("s3://bucket/**/*.txt", "bucket"),
        ("/data/v1.5", "v1.5"),
    ],
)
def test_default_out(source: str, expected: str) -> None:
    assert default_out(source, "gpt2") == Path(f"datasets/{expected}-gpt2")


# Runs the program, which comes to a stand in the middle of its source.
DRIVER = """
import runpy, sys
import data.documents, data.encode

def stuck(files, reading, read=data.documents.read_pieces):
    for _ in range(5):
        yield from read(files, reading)
    print("in the middle", flush=True)
    sys.stdin.read()

data.documents.read_pieces = stuck
data.encode.BATCH_CHARS = 500
runpy.run_module("data.prepare", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_the_middle_it_leaves_no_dataset_and_no_process(
    tmp_path: Path, source: Path, stop: signal.Signals
) -> None:
    out, staging = tmp_path / "out", tmp_path / ".out.preparing"
    flags = ["--source", str(source), "--out", str(out), "--workers", "1", "--tokenizer", "bytes"]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *flags],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    assert (staging / "incomplete").exists()
    process.send_signal(stop)
    # Standard input stays open until it is gone: its end would let the program go on.
    process.wait(timeout=60)
    # The worker has the pipes too: they end when the last process has.
    _, err = process.communicate(timeout=60)
    assert not out.exists()
    if stop == signal.SIGKILL:
        assert len(list(staging.iterdir())) > 1
        with pytest.raises(DataError, match="incomplete"):
            open_dataset(staging)
    else:
        assert not staging.exists()
        assert process.returncode == 128 + stop
        assert "Traceback" not in err
    prepare(str(source), out, Recipe("bytes"), workers=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
