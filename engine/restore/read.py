"""Read slices of a checkpoint into tensors: exact ranges, in parallel, every block verified.

Each thread has one buffer of a few MiB and reads windows of a file, so that the memory beyond the
destinations is bounded for a state of any size.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from engine.errors import DamagedError
from engine.format.element_types import itemsize
from engine.format.index import ShardFile
from engine.restore.load_plan import Located, Slice
from engine.restore.pieces import WINDOW_BYTES, Piece, Window, cut_slice, group
from engine.restore.window import WindowLoader, address_of
from engine.storage.aligned_memory import map_pages
from engine.storage.base import Reader, Storage


@dataclass(frozen=True, slots=True)
class Pace:
    """How many windows are in memory at a time (`threads`), and how many of them are being read (`requests`).

    Threads beyond the requests start when one of them had to wait: cached files need no more threads.
    """

    threads: int
    requests: int
    window_bytes: int = WINDOW_BYTES


LOCAL_PACE = Pace(threads=4, requests=2)
"""Two requests keep a disk busy while other threads digest and copy out earlier windows: see DECISIONS 34.
Larger windows drop out of the processor's caches before they are copied out (16 MiB: cold restores took 15 %
longer, warm ones 13 %)."""

STORE_PACE = Pace(threads=8, requests=8)
"""A store answers each read after a round trip, and one connection gets only a part of the bandwidth."""


@dataclass(frozen=True, slots=True)
class ReadStats:
    """Bytes of shard files that were read, and bytes of tensors that were filled."""

    read_bytes: int
    needed_bytes: int


def read_slices(
    storage: Storage,
    directory: str,
    slices: Sequence[Slice],
    places: Located,
    *,
    pace: Pace = LOCAL_PACE,
) -> ReadStats:
    """Fill every slice's destination.

    Args:
        directory: the checkpoint's directory in `storage`.
        places: for each tensor name its chunks, by their number when the slices were planned.
    Raises: DamagedError naming file, block, expected and found digest; StorageError. Destinations are
        then partly filled.
    """
    files, pieces = _by_file(slices, places, pace.window_bytes)
    plan = [
        (name, window)
        for name, shard in files.items()
        for window in group(pieces[name], shard.block_bytes, shard.file_bytes, pace.window_bytes)
    ]
    with ExitStack() as stack:
        readers = {name: stack.enter_context(storage.open_reader(f"{directory}/{name}")) for name in files}
        for name, shard in files.items():
            _check_size(storage, directory, readers[name], shard)
        loader = WindowLoader(
            *(storage, directory, slices, [address_of(item.to) for item in slices], files, readers),
            turns=threading.Semaphore(pace.requests),
            waited=threading.Event(),
        )
        _run(loader, plan, pace)
    return ReadStats(
        sum(window.end - window.begin for _, window in plan),
        sum(item.to.numel() * item.to.element_size() for item in slices),
    )


def _by_file(
    slices: Sequence[Slice], places: Located, window_bytes: int
) -> tuple[dict[str, ShardFile], dict[str, list[Piece]]]:
    files: dict[str, ShardFile] = {}
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for number, item in enumerate(slices):
        shard, placed = places[item.name][item.chunk]
        files[shard.file] = shard
        pieces[shard.file].extend(
            cut_slice(
                number,
                placed.begin,
                placed.chunk.sizes,
                item.offsets,
                item.lengths,
                itemsize(placed.chunk.dtype),
                contiguous=item.to.is_contiguous(),
                most_bytes=window_bytes - 2 * shard.block_bytes,
            )
        )
    return files, pieces


def _check_size(storage: Storage, directory: str, reader: Reader, shard: ShardFile) -> None:
    if reader.file_bytes != shard.file_bytes:
        raise DamagedError(
            f"{storage.describe(f'{directory}/{shard.file}')} has {reader.file_bytes} bytes: "
            f"{shard.file_bytes} were written"
        )


def _run(loader: WindowLoader, plan: Sequence[tuple[str, Window]], pace: Pace) -> None:
    """Load the windows in file order; the first failure stops the rest."""
    turn = iter(plan)
    lock = threading.Lock()
    stop = threading.Event()

    def next_window() -> Iterator[tuple[str, Window]]:
        while not stop.is_set():
            with lock:
                entry = next(turn, None)
            if entry is None:
                return
            yield entry

    # A copy from pinned memory to a CUDA device needs no other buffer.
    pinned = any(item.to.device.type == "cuda" for item in loader.slices)

    def work(at_once: bool) -> None:
        if not at_once:
            loader.waited.wait()
        buffer = torch.empty(0, dtype=torch.uint8)
        try:
            for name, window in next_window():
                if buffer.numel() < window.end - window.begin:
                    buffer = _page_aligned(max(pace.window_bytes, window.end - window.begin), pinned)
                loader.load(name, window, buffer)
        except BaseException:
            stop.set()
            raise
        finally:
            loader.waited.set()

    count = min(pace.threads, len(plan))
    if count <= 1:
        work(True)
        return
    with ThreadPoolExecutor(count, thread_name_prefix="holdfast-read") as pool:
        futures = [pool.submit(work, number < pace.requests) for number in range(count)]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.result()


def _page_aligned(size_bytes: int, pinned: bool) -> torch.Tensor:
    """A buffer of bytes for direct reads."""
    if pinned:
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    pages, skip = map_pages(size_bytes)
    return torch.frombuffer(pages, dtype=torch.uint8, count=size_bytes, offset=skip)
