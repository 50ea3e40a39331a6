"""Windows are loaded alike from the page cache and past it, and damage is found either way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engine.errors import DamagedError
from engine.format.digest import block_digests, combine, scattered_digests
from engine.format.index import ShardFile
from engine.format.layout import Chunk, PlacedChunk
from engine.native import kernels
from engine.native.kernels import Place
from engine.restore import read, window
from engine.restore.load_plan import Slice
from engine.restore.pieces import WINDOW_BYTES, Piece, direct_pieces
from engine.storage import aligned_memory
from engine.storage.base import Reader
from engine.storage.local import LocalStorage
from engine.storage.reading import LocalReader

BLOCK = 4096
BEGIN = 4096
ROWS = (40, 100, 3, 1, 60, 200)
"""Rows of 1 KiB of the tensors in the file: some are read straight, some share blocks, some are tiny."""


class Checkpoint:
    """One shard file of tensors of `ROWS`, and slices of all its rows."""

    def __init__(self, folder: Path) -> None:
        generator = torch.Generator().manual_seed(3)
        self.saved = [
            torch.randint(0, 99, (rows, 256), dtype=torch.int32, generator=generator) for rows in ROWS
        ]
        self.raw = bytearray(BEGIN) + b"".join(tensor.numpy().tobytes() for tensor in self.saved)
        self.path = folder / "step" / "shard-00000.safetensors"
        self.path.parent.mkdir()
        self.path.write_bytes(self.raw)
        placed, at = [], BEGIN
        for number, rows in enumerate(ROWS):
            chunk = Chunk(f"t{number}", "I32", (rows, 256), (0, 0), (rows, 256))
            placed.append(PlacedChunk(chunk, at, at + rows * 1024))
            at += rows * 1024
        digests = block_digests(bytes(self.raw), BLOCK)
        shard = ShardFile(
            "shard-00000.safetensors", len(self.raw), BLOCK, digests, combine(digests), tuple(placed)
        )
        self.places = {one.chunk.name: [(shard, one)] for one in placed}
        self.storage = LocalStorage(folder)

    def load(self, to: Sequence[torch.Tensor], names: Sequence[str] | None = None) -> read.ReadStats:
        names = names or [f"t{number}" for number in range(len(to))]
        slices = [
            Slice(name, 0, (0, 0), tuple(tensor.shape), tensor)
            for name, tensor in zip(names, to, strict=True)
        ]
        return read.read_slices(self.storage, "step", slices, self.places)

    def empty(self) -> list[torch.Tensor]:
        return [torch.full_like(tensor, -1) for tensor in self.saved]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path)


@pytest.fixture(params=["at hand", "elsewhere", "partly at hand"])
def at_hand(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the file's data are: `read_cached` gives all, nothing, or half of what it is asked for."""

    def elsewhere(
        reader: Reader, offset: int, places: Sequence[Place], block_bytes: int
    ) -> tuple[int, bytes]:
        if request.param == "partly at hand":
            address, size = places[0]
            half = kernels.view_of((address, size // 2))
            half[:] = bytes(len(half))
            return len(half), block_digests(half, block_bytes)
        return 0, b""

    def here(
        reader: LocalReader, offset: int, places: Sequence[Place], block_bytes: int
    ) -> tuple[int, bytes]:
        views = [kernels.view_of(place) for place in places]
        for view in views:
            reader.read_into(offset, view)
            offset += len(view)
        return sum(map(len, views)), scattered_digests(views, block_bytes)

    monkeypatch.setattr(LocalReader, "read_cached", here if request.param == "at hand" else elsewhere)
    return str(request.param)


def test_every_tensor_arrives(checkpoint: Checkpoint, at_hand: str) -> None:
    to = checkpoint.empty()
    stats = checkpoint.load(to)
    assert all(map(torch.equal, to, checkpoint.saved))
    assert stats.needed_bytes == sum(ROWS) * 1024
    assert stats.read_bytes <= stats.needed_bytes + 2 * BLOCK


def test_part_of_the_rows_and_what_is_not_contiguous(checkpoint: Checkpoint, at_hand: str) -> None:
    whole = torch.full((200, 512), -1, dtype=torch.int32)
    to = [torch.full((77, 256), -1, dtype=torch.int32), whole[:, ::2]]
    checkpoint.load(to, ["t1", "t5"])
    assert torch.equal(to[0], checkpoint.saved[1][:77])
    assert torch.equal(whole[:, ::2], checkpoint.saved[5])
    assert bool((whole[:, 1::2] == -1).all())


def test_one_saved_tensor_fills_two(checkpoint: Checkpoint, at_hand: str) -> None:
    to = [torch.full((200, 256), -1, dtype=torch.int32) for _ in range(2)]
    checkpoint.load(to, ["t5", "t5"])
    assert all(torch.equal(tensor, checkpoint.saved[5]) for tensor in to)


def test_windows_that_are_full(checkpoint: Checkpoint, at_hand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "WINDOW_BYTES", 12 * BLOCK)
    to = [*checkpoint.empty(), torch.full((200, 256), -1, dtype=torch.int32)]
    checkpoint.load(to, [*(f"t{number}" for number in range(len(ROWS))), "t5"])
    assert all(map(torch.equal, to, [*checkpoint.saved, checkpoint.saved[5]]))


@pytest.mark.parametrize("at", [BEGIN, BEGIN + 50 * 1024, BEGIN + 141 * 1024, -1])
def test_a_flipped_bit_anywhere_is_damage(checkpoint: Checkpoint, at_hand: str, at: int) -> None:
    at %= len(checkpoint.raw)
    checkpoint.raw[at] ^= 1
    checkpoint.path.write_bytes(checkpoint.raw)
    with pytest.raises(DamagedError, match=rf"block {at // BLOCK} \(bytes"):
        checkpoint.load(checkpoint.empty())


def piece(begin: int, end: int, *, flat: bool = True) -> Piece:
    return Piece(0, begin, end, flat=flat)


def test_what_is_read_straight() -> None:
    long, short, rows = piece(0, 40_000), piece(40_000, 40_004), piece(100_000, 200_000, flat=False)
    assert direct_pieces([long, short, rows], lambda _: True) == [long, short]
    assert direct_pieces([long, short, rows], lambda piece: piece is short) == [short]
    assert direct_pieces([long, piece(39_999, 99_999)], lambda _: True) == [], "they overlap"


@pytest.mark.parametrize("compiled", [True, False])
def test_what_comes_from_the_disk_is_digested_on_its_way_where_that_was_compiled(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    if compiled and kernels.library is None:
        pytest.skip("nothing is compiled")
    monkeypatch.setattr(LocalReader, "read_cached", lambda *_: (0, b""))
    if compiled:
        monkeypatch.setattr(window, "block_digests", lambda *_: pytest.fail("a pass of its own"))
    else:
        monkeypatch.setattr(kernels, "library", None)
    to = checkpoint.empty()
    checkpoint.load(to)
    assert all(map(torch.equal, to, checkpoint.saved))


def test_direct_reads_get_memory_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to the disk takes few pieces of memory: small pages make it small."""
    asked = []
    real = aligned_memory.map_pages
    monkeypatch.setattr(read, "map_pages", lambda size_bytes: asked.append(size_bytes) or real(size_bytes))
    buffer = read._page_aligned(WINDOW_BYTES, pinned=False)
    assert asked == [WINDOW_BYTES]
    assert buffer.data_ptr() % aligned_memory.HUGE_PAGE_BYTES == 0
    with open("/proc/self/smaps", encoding="ascii") as smaps:
        begins, flags = 0, ""
        for line in smaps:
            first = line.split()[0]
            if "-" in first and not first.endswith(":"):
                begin, end = (int(part, 16) for part in first.split("-"))
                begins = begin <= buffer.data_ptr() < end
            elif begins and first == "VmFlags:":
                flags = line
    assert " hg" in flags
    assert " wf" in flags, "wiped on fork"
