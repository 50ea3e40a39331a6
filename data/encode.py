"""Encodes a stream of pieces in parallel and in order, a few MB at a time.

The parent reads, workers encode, and the parent receives the results in the order of the pieces: the output
does not depend on the number of workers. Workers are spawned, not forked: the parent may have threads
(fsspec's, a progress bar's), and a fork would copy their locks, perhaps locked.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.documents import Piece, Reading
from data.errors import DataError
from data.tokenizer import Tokenizer, load_tokenizer

BATCH_CHARS = 1 << 21
_BATCHES_PER_WORKER = 2
_PR_SET_PDEATHSIG = 1

# A worker's tokenizer, set once by `_start_worker`: building one takes longer than most batches.
_worker_tokenizer: Tokenizer | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A piece's tokens, including the end-of-text token that starts a document."""

    tokens: npt.NDArray[np.uint16]
    whole_document: bool


@dataclass(frozen=True, slots=True)
class _Batch:
    pieces: tuple[Piece, ...]
    stored_bytes: int


def encode_pieces(
    pieces: Iterator[Piece], reading: Reading, tokenizer: Tokenizer, workers: int
) -> Generator[tuple[list[Encoded], int], None, None]:
    """Encode `pieces` in order; 0 workers means in this process.

    Yields the encoded pieces of a batch and the stored bytes read up to its end. Raises the errors of reading
    `pieces`, and DataError when a worker dies.
    """
    batches = _batches(pieces, reading)
    if not workers:
        yield from (
            (_unpack(batch, _encode(tokenizer, batch.pieces)), batch.stored_bytes) for batch in batches
        )
        return
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer.name, os.getpid()),
    )
    try:
        yield from _encode_in(pool, batches, workers)
    except BrokenProcessPool as error:
        raise DataError(
            f"a worker process died while encoding (out of memory?): rerun with fewer than {workers} "
            "--workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_in(
    pool: ProcessPoolExecutor, batches: Iterator[_Batch], workers: int
) -> Iterator[tuple[list[Encoded], int]]:
    """Encode with a bounded number of batches in flight: memory use does not grow with the source."""
    waiting: deque[tuple[_Batch, Future[tuple[npt.NDArray[np.uint16], list[int]]]]] = deque()
    for batch in batches:
        waiting.append((batch, pool.submit(_encode_in_worker, batch.pieces)))
        if len(waiting) > workers * _BATCHES_PER_WORKER:
            done, future = waiting.popleft()
            yield _unpack(done, future.result()), done.stored_bytes
    while waiting:
        done, future = waiting.popleft()
        yield _unpack(done, future.result()), done.stored_bytes


def _batches(pieces: Iterator[Piece], reading: Reading) -> Iterator[_Batch]:
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield _Batch(tuple(batch), reading.stored_bytes)
            batch, chars = [], 0
    if batch:
        yield _Batch(tuple(batch), reading.stored_bytes)


def _encode(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[npt.NDArray[np.uint16], list[int]]:
    """All tokens in one array, and the end of each piece in it."""
    start = np.array([tokenizer.eot_token], dtype=np.uint16)
    parts, ends, end = [], [], 0
    for piece in pieces:
        tokens = tokenizer.encode(piece.text)
        parts += [start, tokens] if piece.starts_document else [tokens]
        end += tokens.size + piece.starts_document
        ends.append(end)
    return np.concatenate(parts), ends


def _unpack(batch: _Batch, encoded: tuple[npt.NDArray[np.uint16], list[int]]) -> list[Encoded]:
    tokens, ends = encoded
    begins = [0, *ends[:-1]]
    return [
        Encoded(tokens[begin:end], whole_document=piece.starts_document and piece.ends_document)
        for piece, begin, end in zip(batch.pieces, begins, ends, strict=True)
    ]


def _start_worker(tokenizer: str, parent: int) -> None:
    """Load the tokenizer; leave Ctrl+C to the parent, and die with the parent even if it is killed."""
    global _worker_tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl
        os._exit(1)
    _worker_tokenizer = load_tokenizer(tokenizer)


def _encode_in_worker(pieces: Sequence[Piece]) -> tuple[npt.NDArray[np.uint16], list[int]]:
    assert _worker_tokenizer is not None
    return _encode(_worker_tokenizer, pieces)
