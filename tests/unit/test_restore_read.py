"""Reading slices: exact, verified, in bounded memory, and nothing damaged is passed on as whole."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import DamagedError, NotFoundError, StorageUnavailableError
from engine.format.digest import BLOCK_BYTES, block_digests, combine
from engine.format.index import ShardFile
from engine.format.layout import Chunk, PlacedChunk, plan_files
from engine.format.manifest import TensorInfo
from engine.restore import read as read_module
from engine.restore.load_plan import Slice, plan_slices
from engine.restore.pieces import WINDOW_BYTES, Piece, Window
from engine.restore.read import Pace, ReadStats, read_slices
from engine.restore.window import WindowLoader
from engine.storage.base import Reader
from engine.storage.local import LocalStorage
from engine.storage.reading import LocalReader
from tests.support.boxes import box, shards, whole
from tests.support.damage import flip_byte

Places = Mapping[str, Sequence[tuple[ShardFile, PlacedChunk]]]


class Saved:
    """Chunks of global tensors, written as shard files the way a save lays them out."""

    def __init__(self, root: Path, tensors: dict[str, torch.Tensor], ranks: list[list[Chunk]]) -> None:
        self.root = root
        self.tensors = tensors
        self.storage = LocalStorage(root)
        self.places: dict[str, list[tuple[ShardFile, PlacedChunk]]] = {name: [] for name in tensors}
        (root / "step").mkdir()
        for rank, chunks in enumerate(ranks):
            for layout in plan_files(rank, chunks):
                raw = bytearray(layout.header + bytes(layout.file_bytes - len(layout.header)))
                for placed in layout.chunks:
                    c = placed.chunk
                    part = tensors[c.name][
                        tuple(slice(o, o + s) for o, s in zip(c.offsets, c.sizes, strict=True))
                    ]
                    raw[placed.begin : placed.end] = (
                        part.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                    )
                (root / "step" / layout.file).write_bytes(raw)
                digests = block_digests(raw)
                shard = ShardFile(
                    layout.file, len(raw), BLOCK_BYTES, digests, combine(digests), layout.chunks
                )
                for placed in layout.chunks:
                    self.places[placed.chunk.name].append((shard, placed))

    def slices(self, wanted: dict[str, torch.Tensor]) -> list[Slice]:
        infos = {
            name: TensorInfo(self.places[name][0][1].chunk.dtype, tuple(self.tensors[name].shape))
            for name in wanted
        }
        chunks = {name: [placed.chunk for _, placed in self.places[name]] for name in wanted}
        return plan_slices(wanted, infos, chunks)

    def read(self, wanted: dict[str, torch.Tensor], threads: int = 2) -> ReadStats:
        pace = Pace(threads, threads)
        return read_slices(self.storage, "step", self.slices(wanted), self.places, pace=pace)


def blank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Three ranks' shards: by rows, by columns, a scalar, small ones, one of several MiB."""
    torch.manual_seed(0)
    tensors = {
        "rows": torch.randn(100, 300),
        "columns": torch.randn(90, 400).to(torch.bfloat16),
        "large": torch.randn(1500, 1000),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "flags": torch.rand(77) > 0.5,
        "empty": torch.zeros(0, 4),
    }
    ranks: list[list[Chunk]] = [[], [], []]
    for name, dim, dtype in [
        ("rows", 0, "F32"),
        ("columns", 1, "BF16"),
        ("large", 0, "F32"),
        ("flags", 0, "BOOL"),
    ]:
        for rank, chunk in enumerate(shards(name, tensors[name].shape, 3, dim, dtype)):
            ranks[rank].append(chunk)
    ranks[1].append(whole("scalar", dtype="I64"))
    ranks[2].append(whole("empty", 0, 4))
    return Saved(tmp_path, tensors, ranks)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_everything_arrives(threads: int, saved: Saved) -> None:
    wanted = blank(saved.tensors)
    stats = saved.read(wanted, threads)
    assert equal(wanted, saved.tensors)
    assert stats.needed_bytes == sum(t.numel() * t.element_size() for t in saved.tensors.values())
    on_disk = sum(path.stat().st_size for path in (saved.root / "step").iterdir())
    assert stats.needed_bytes <= stats.read_bytes <= on_disk


def test_destinations_that_are_not_contiguous(saved: Saved) -> None:
    wanted = {
        "rows": torch.zeros(300, 100).t(),
        "columns": torch.zeros(90, 800, dtype=torch.bfloat16)[:, ::2],
        "large": torch.zeros(1500, 1001)[:, 1:],
    }
    saved.read(wanted)
    assert equal(wanted, {name: saved.tensors[name] for name in wanted})


def test_nothing_around_a_destination_is_touched(saved: Saved) -> None:
    around = torch.full((1502, 1002), -7.0)
    saved.read({"large": around[1:-1, 1:-1]})
    assert torch.equal(around[1:-1, 1:-1], saved.tensors["large"])
    around[1:-1, 1:-1] = -7
    assert bool((around == -7).all())


def test_only_files_that_are_needed_are_opened(saved: Saved) -> None:
    (saved.root / "step" / "shard-00000.safetensors").unlink()
    wanted = {"scalar": torch.tensor(0), "empty": torch.zeros(0, 4)}
    saved.read(wanted)
    assert wanted["scalar"].item() == 3


def test_nothing_to_read_reads_nothing(saved: Saved) -> None:
    assert saved.read({}) == ReadStats(0, 0)


@pytest.mark.parametrize("position", [0, 1, -1])
def test_damage_names_file_block_and_digests(position: int, saved: Saved) -> None:
    shard, placed = saved.places["large"][1]
    at = [placed.begin, placed.begin + 2 * BLOCK_BYTES, placed.end - 1][position]
    flip_byte(saved.root / "step" / shard.file, at)
    with pytest.raises(DamagedError) as caught:
        saved.read(blank(saved.tensors))
    message = str(caught.value)
    block = at // BLOCK_BYTES
    assert f"{shard.file}: block {block} (bytes {block * BLOCK_BYTES:,} to " in message
    assert shard.digests[8 * block : 8 * block + 8].hex() in message, "the expected digest"
    assert "has changed" in message


def test_damage_in_another_part_of_a_file_does_not_concern_a_slice(saved: Saved) -> None:
    shard, placed = saved.places["large"][0]
    flip_byte(saved.root / "step" / shard.file, placed.end - 1)
    wanted = torch.zeros(10, 1000)
    pieces = [Slice("large", 0, (0, 0), (10, 1000), wanted)]
    read_slices(saved.storage, "step", pieces, saved.places)
    assert torch.equal(wanted, saved.tensors["large"][:10])


@pytest.mark.parametrize("change", ["truncated", "extended"])
def test_a_file_of_another_size_is_damage_before_anything_is_read(change: str, saved: Saved) -> None:
    path = saved.root / "step" / saved.places["rows"][0][0].file
    raw = path.read_bytes()
    path.write_bytes(raw[:-1] if change == "truncated" else raw + b"x")
    wanted = blank(saved.tensors)
    with pytest.raises(DamagedError, match=r"bytes: [0-9]+ were written"):
        saved.read(wanted)
    assert equal(wanted, blank(saved.tensors))


def test_a_missing_file_is_not_found(saved: Saved) -> None:
    (saved.root / "step" / saved.places["rows"][0][0].file).unlink()
    with pytest.raises(NotFoundError):
        saved.read(blank(saved.tensors))


class Flaky(LocalStorage):
    """Fails at the n-th read of a reader, whatever way it is read."""

    def __init__(self, root: Path, fail_at: int) -> None:
        super().__init__(root)
        self.left = fail_at
        self.lock = threading.Lock()
        self.closed: list[str] = []
        self.opened: list[str] = []

    def open_reader(self, path: str) -> Reader:
        real, storage = super().open_reader(path), self
        self.opened.append(path)

        class Failing(Reader):
            @property
            def file_bytes(self) -> int:
                return real.file_bytes

            def read_into(self, offset: int, view: memoryview) -> None:
                with storage.lock:
                    storage.left -= 1
                    if storage.left < 0:
                        raise StorageUnavailableError("the store is down")
                real.read_into(offset, view)

            def close(self) -> None:
                storage.closed.append(path)
                real.close()

        return Failing()


@pytest.mark.parametrize("fail_at", [0, 1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_read_that_fails_stops_all_and_closes_everything(fail_at: int, threads: int, saved: Saved) -> None:
    storage = Flaky(saved.root, fail_at)
    before = threading.active_count()
    slices, pace = saved.slices(blank(saved.tensors)), Pace(threads, threads)
    with pytest.raises(StorageUnavailableError, match="down"):
        read_slices(storage, "step", slices, saved.places, pace=pace)
    assert sorted(storage.closed) == sorted(storage.opened)
    assert threading.active_count() == before


SMALL_WINDOWS = 256 << 10


def test_cached_files_take_no_more_threads_than_requests(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes cores and nothing else: more threads would be in each other's way."""
    at_work = set()

    def here(loader: WindowLoader, *args: Any) -> bool:
        at_work.add(threading.current_thread())
        return fill(loader, *args)

    monkeypatch.setattr(WindowLoader, "_read_cached", here)
    wanted = blank({"large": saved.tensors["large"]})
    read_slices(saved.storage, "step", saved.slices(wanted), saved.places, pace=Pace(20, 1, SMALL_WINDOWS))
    assert equal(wanted, {"large": saved.tensors["large"]})
    assert len(at_work) == 1


def fill(loader: WindowLoader, name: str, window: Window, chosen: Sequence[Piece], raw: torch.Tensor) -> bool:
    loader.readers[name].read_into(window.begin, memoryview(raw.numpy()))
    loader._copy_direct(name, window, chosen, raw)
    return True


def test_the_disk_is_read_while_others_digest_and_copy(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two windows are not copied before the next two are being read."""
    begun, copied = threading.Semaphore(0), iter([3, 1])
    into, copy = LocalReader.read_into, WindowLoader._copy_direct

    def read_into(reader: LocalReader, offset: int, view: memoryview) -> None:
        begun.release()
        into(reader, offset, view)

    def copy_straight(loader: WindowLoader, *args: Any) -> Sequence[Piece]:
        for _ in range(next(copied, 0)):
            assert begun.acquire(timeout=60), "nobody reads meanwhile"
        return copy(loader, *args)

    monkeypatch.setattr(LocalReader, "read_into", read_into)
    monkeypatch.setattr(WindowLoader, "_copy_direct", copy_straight)
    monkeypatch.setattr(WindowLoader, "_read_cached", lambda *_: False)
    wanted = blank({"large": saved.tensors["large"]})
    read_slices(saved.storage, "step", saved.slices(wanted), saved.places, pace=Pace(4, 2, SMALL_WINDOWS))
    assert equal(wanted, {"large": saved.tensors["large"]})


def test_only_so_many_wait_for_the_disk_at_a_time(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is read in its turn, and digested and copied out of it."""
    inside: set[threading.Thread] = set()
    counts: list[int] = []

    class Turns(threading.Semaphore):
        def __init__(self, count: int = 1) -> None:
            super().__init__(count)
            counts.append(count)

        def __enter__(self) -> bool:
            inside.add(threading.current_thread())
            return self.acquire()

        def __exit__(self, *_: object) -> None:
            inside.discard(threading.current_thread())
            self.release()

    reads, copies = [], []
    into, copy = LocalReader.read_into, WindowLoader._copy_direct

    def read_into(reader: LocalReader, offset: int, view: memoryview) -> None:
        reads.append(threading.current_thread() in inside)
        into(reader, offset, view)

    def copy_straight(loader: WindowLoader, *args: Any) -> Sequence[Piece]:
        copies.append(threading.current_thread() in inside)
        return copy(loader, *args)

    monkeypatch.setattr(read_module.threading, "Semaphore", Turns)
    monkeypatch.setattr(LocalReader, "read_into", read_into)
    monkeypatch.setattr(WindowLoader, "_copy_direct", copy_straight)
    monkeypatch.setattr(WindowLoader, "_read_cached", lambda *_: False)
    pace = Pace(4, 3, SMALL_WINDOWS)
    read_slices(saved.storage, "step", saved.slices(blank(saved.tensors)), saved.places, pace=pace)
    assert 3 in counts
    assert set(reads) == {True}
    assert set(copies) == {False}


def test_memory_above_the_destinations_stays_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by columns what was saved by rows: the touched rows pass through one buffer a thread."""
    source = torch.randn(9000, 1000)  # 36 MB
    saved = Saved(tmp_path, {"t": source}, [[whole("t", 9000, 1000)]])
    taken: list[int] = []
    real = read_module._page_aligned
    monkeypatch.setattr(
        read_module, "_page_aligned", lambda size, *more: taken.append(size) or real(size, *more)
    )
    wanted = torch.zeros(9000, 10)
    tracemalloc.start()
    stats = read_slices(
        saved.storage, "step", [Slice("t", 0, (0, 500), (9000, 10), wanted)], saved.places, pace=Pace(2, 2)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(wanted, source[:, 500:510])
    assert sum(taken) <= 2 * WINDOW_BYTES
    assert peak < WINDOW_BYTES
    assert stats.read_bytes <= 36_000_000 * 1.02, "a block where two windows meet"


def test_a_row_longer_than_a_window_is_read_all_the_same(tmp_path: Path) -> None:
    source = torch.randn(2, 3, WINDOW_BYTES // 4 + 10)
    saved = Saved(tmp_path, {"t": source}, [[whole("t", *source.shape)]])
    wanted = torch.zeros(2, 3, 5)
    read_slices(saved.storage, "step", [Slice("t", 0, (0, 0, 7), (2, 3, 5), wanted)], saved.places)
    assert torch.equal(wanted, source[:, :, 7:12])


def test_several_chunks_of_a_tensor_in_one_rank(tmp_path: Path) -> None:
    """Further chunks of a name lie in files of their own."""
    source = torch.randn(6, 4)
    chunks = [
        box("t", (6, 4), (0, 0), (2, 4)),
        box("t", (6, 4), (2, 0), (4, 2)),
        box("t", (6, 4), (2, 2), (4, 2)),
    ]
    saved = Saved(tmp_path, {"t": source}, [chunks])
    assert len(list((tmp_path / "step").iterdir())) == 3
    wanted = {"t": torch.zeros(6, 4)}
    saved.read(wanted)
    assert torch.equal(wanted["t"], source)
