"""python -m data.prepare: tokenizes text into a dataset folder for data.loader.

Examples:

    python -m data.prepare                                      this Python's standard library
    python -m data.prepare --source 'books/*.txt' --out datasets/books
    python -m data.prepare --source s3://bucket/corpus.jsonl.gz --val_fraction 0.001

The exit status is 0, 2 for bad input (with one sentence on standard error) or 130 after Ctrl+C.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.dataset import DESCRIPTION, INCOMPLETE, Dataset, describe, open_dataset
from data.documents import Reading, read_pieces
from data.encode import BATCH_CHARS, encode_pieces
from data.errors import DataError, SourceError
from data.folder import staged_folder
from data.shards import MAX_SHARD_TOKENS
from data.sources import STDLIB, SourceFile, find_files, is_uri, redact
from data.splits import SplitWriter
from data.tokenizer import TOKENIZERS, load_tokenizer

# Spawned workers import this module, too, so imports that only the command line needs are local.

EXIT_BAD_INPUT = 2

Progress = Callable[[int, int], None]
"""Called with (stored bytes encoded so far, stored bytes in total or 0 if unknown)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The settings of a dataset: together with the text they determine every byte of the output."""

    tokenizer: str = "gpt2"
    val_fraction: float = 0.01
    shard_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise DataError(f"unknown tokenizer {self.tokenizer!r}: choose one of {', '.join(TOKENIZERS)}")
        if not 0 <= self.val_fraction < 1:
            raise DataError(
                f"--val_fraction is {self.val_fraction}, but must be at least 0 and below 1"
            )
        if not 0 < self.shard_tokens <= MAX_SHARD_TOKENS:
            raise DataError(f"--shard_tokens {self.shard_tokens} must be from 1 to {MAX_SHARD_TOKENS:,}")


def prepare(
    source: str,
    out: Path,
    recipe: Recipe,
    *,
    workers: int | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> tuple[Dataset, Reading]:
    """Tokenize `source` into the new folder `out`; the same text and recipe give the same bytes.

    `workers` processes encode (0: this process); the default depends on the usable cores and the amount of
    text. Raises SourceError, OutputError or another DataError, and then leaves `out` unchanged.
    """
    if workers is not None and workers < 0:
        raise DataError(f"--workers is {workers}, but must be 0 or more (0 encodes in this process)")
    tokenizer = load_tokenizer(recipe.tokenizer)
    files = find_files(source)
    total = sum(file.size for file in files)
    reading = Reading()
    with staged_folder(out, incomplete=INCOMPLETE, may_replace=is_prepared if force else None) as staging:
        writer = SplitWriter(staging, recipe.val_fraction, recipe.shard_tokens)
        count = _default_workers(files) if workers is None else workers
        try:
            with closing(encode_pieces(read_pieces(files, reading), reading, tokenizer, count)) as batches:
                for encoded, done in batches:
                    for piece in encoded:
                        writer.add(piece.tokens, piece.whole_document)
                    progress(done, total)
            if not reading.documents:
                raise SourceError(
                    f"no text in the source {redact(source)}: of {len(files)} files, {len(reading.binary)} "
                    "are binary and the others are empty"
                )
            splits = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        dataset = Dataset(staging, tokenizer.name, tokenizer.vocab_size, splits)
        _write_description(
            staging / DESCRIPTION, describe(dataset, source=redact(source), documents=reading.documents)
        )
    return open_dataset(out), reading


def is_prepared(folder: Path) -> bool:
    """Whether `folder` contains only a prepared dataset, so that it may be replaced."""
    names = {entry.name for entry in folder.iterdir()}
    return DESCRIPTION in names and all(
        name == DESCRIPTION or re.fullmatch(r"(train|val)_\d{6,}\.bin", name) for name in names
    )


def default_out(source: str, tokenizer: str) -> Path:
    """`datasets/<source>-<tokenizer>`, from the last part of the source path that has no wildcards."""
    path = redact(source).split("::")[0] if is_uri(source) else os.path.abspath(os.path.expanduser(source))
    plain = [part for part in path.split("/") if part and not any(c in part for c in "*?[")] or ["text"]
    stem = re.sub(r"(\.(txt|jsonl|ndjson|md|csv))?(\.gz)?$", "", plain[-1])
    return Path("datasets") / f"{re.sub(r'[^A-Za-z0-9._]+', '-', stem).strip('-.') or 'text'}-{tokenizer}"


def _default_workers(files: list[SourceFile]) -> int:
    """One per usable core and two batches of text; 0 if starting a worker would take longer than the work."""
    total = sum(file.size * (4 if file.name.endswith(".gz") else 1) for file in files)
    wanted = min(len(os.sched_getaffinity(0)), total // (2 * BATCH_CHARS))
    return wanted if wanted > 1 else 0


def _write_description(path: Path, raw: bytes) -> None:
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True, slots=True)
class Flags:
    """Tokenize text into a dataset that the trainer reads (--data FOLDER).

    The output depends only on the text and the flags, and appears complete or not at all.
    """

    source: str = STDLIB
    """'stdlib' (this Python's standard library), a file, a folder, a quoted glob, or an fsspec URI. Of .jsonl
    lines, the 'text' field is read; .gz is decompressed."""
    out: str | None = None
    """Folder to create. Default: datasets/<source>-<tokenizer>."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """gpt2: byte-pair encoding, 50,257 tokens. bytes: 257 tokens."""
    val_fraction: float = 0.01
    """Share of the tokens for validation: whole documents, spread over the source if it has many."""
    shard_tokens: int = 100_000_000
    """Most tokens in one shard file."""
    workers: int | None = None
    """Worker processes; 0 encodes in this process. Default: depends on the usable cores."""
    force: bool = False
    """Replace an existing prepared dataset at --out."""


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    from data.flags import parse_flags

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        flags = parse_flags(Flags(), arguments, prog="python -m data.prepare", error=DataError)
    except DataError as error:
        return _refuse(error)
    out = default_out(flags.source, flags.tokenizer) if flags.out is None else Path(flags.out)
    try:
        if flags.out == "":
            raise DataError("--out is empty: give a folder, or omit the flag")
        if flags.out and is_uri(flags.out):
            raise DataError(
                f"--out {redact(flags.out)} is a URI, but must be a local folder: datasets are memory-mapped"
            )
        dataset, reading = _prepare_with_bar(flags, out)
    except DataError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print(f"interrupted: {out} was not written", file=sys.stderr)
        return 128 + signal.SIGINT
    _report(dataset, reading)
    return 0


def _refuse(error: DataError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _prepare_with_bar(flags: Flags, out: Path) -> tuple[Dataset, Reading]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    # In a log file the bar would be one line at the end.
    hidden = not console.is_terminal
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(f"tokenizing {redact(flags.source)}", total=None)
        return prepare(
            flags.source,
            out,
            Recipe(flags.tokenizer, flags.val_fraction, flags.shard_tokens),
            workers=flags.workers,
            force=flags.force,
            progress=lambda done, total: bar.update(task, completed=done, total=total or None),
        )


def _report(dataset: Dataset, reading: Reading) -> None:
    if reading.binary:
        print(f"skipped {len(reading.binary)} binary files, for example {reading.binary[0]}", file=sys.stderr)
    if reading.undecoded:
        count, one = len(reading.undecoded), reading.undecoded[0]
        print(f"{count} files contain invalid UTF-8, which became U+FFFD; for example {one}", file=sys.stderr)
    counts = ", ".join(
        f"{dataset.tokens(split):,} {split} tokens in {len(shards)} shard{'s'[: len(shards) != 1]}"
        for split, shards in dataset.splits.items()
    )
    print(f"{dataset.directory}: {reading.documents:,} documents, {counts} ({dataset.tokenizer})")


if __name__ == "__main__":
    # Nothing may be left behind after `kill` or a job scheduler's stop either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
