"""The dry run's arithmetic: which rank of a new mesh reads what."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.directory.listing import read_index, read_manifest
from engine.format.index import ShardIndex
from engine.format.layout import Chunk
from engine.geometry import Box, chunk_rows, intersect
from engine.resume.read_plan import needed_box, plan_reads
from engine.run.mesh import MeshShape
from engine.storage.local import LocalStorage
from tests.support.tiny_checkpoint import BIAS, COLUMNS, write_checkpoint

ROW_BYTES = COLUMNS * 4


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [
        (10, 3, [(0, 4), (4, 8), (8, 10)]),
        (6, 4, [(0, 2), (2, 4), (4, 6), (6, 6)]),
        (2, 4, [(0, 1), (1, 2), (2, 2), (2, 2)]),
        (8, 1, [(0, 8)]),
    ],
)
def test_rows_are_cut_as_torch_chunk_cuts_them(
    rows: int, parts: int, expected: list[tuple[int, int]]
) -> None:
    assert [chunk_rows(rows, parts, part) for part in range(parts)] == expected


def test_torch_agrees() -> None:
    torch = pytest.importorskip("torch")
    for rows in range(1, 30):
        for parts in range(1, 9):
            cut = [chunk.tolist() for chunk in torch.arange(rows).chunk(parts)]
            ours = [list(range(*chunk_rows(rows, parts, part))) for part in range(parts)]
            assert [rows_ for rows_ in ours if rows_] == cut


def chunk(name: str, shape: tuple[int, ...] = (10, 4)) -> Chunk:
    return Chunk(name, "F32", shape, (0,) * len(shape), shape)


@pytest.mark.parametrize(
    ("name", "shape", "mesh", "rank", "same_world", "expected"),
    [
        ("model.w", (10, 4), (1, 2), 1, True, ((5, 0), (5, 4))),
        ("optimizer.state.w.exp_avg", (10, 4), (1, 2), 0, False, ((0, 0), (5, 4))),
        ("model.w", (10, 4), (2, 2), 3, True, ((5, 0), (5, 4))),
        ("model.w", (10, 4), (2, 2), 2, True, ((0, 0), (5, 4))),
        ("model.w", (10, 4), (4, 1), 3, True, ((0, 0), (10, 4))),
        ("optimizer.state.w.step", (), (1, 2), 1, True, ((), ())),
        ("ema.w", (10, 4), (1, 2), 1, True, ((0, 0), (10, 4))),
        ("per_rank.00001.rng.torch", (10,), (1, 2), 1, True, ((0,), (10,))),
        ("per_rank.00001.rng.torch", (10,), (1, 2), 0, True, None),
        ("per_rank.00001.rng.torch", (10,), (1, 2), 1, False, None),
    ],
    ids=str,
)
def test_what_a_rank_wants_of_a_tensor(
    name: str,
    shape: tuple[int, ...],
    mesh: tuple[int, int],
    rank: int,
    same_world: bool,
    expected: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> None:
    assert needed_box(chunk(name, shape), MeshShape(*mesh), rank, same_world=same_world) == expected


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (((0, 0), (10, 4)), ((2, 0), (3, 4))),
        (((4, 1), (10, 2)), ((4, 1), (1, 2))),
        (((5, 0), (5, 4)), None),
        (((0, 0), (2, 4)), None),
        (((3, 0), (0, 4)), None),
    ],
)
def test_overlap_with_a_chunk_of_rows_two_to_five(
    box: tuple[tuple[int, ...], tuple[int, ...]], expected: tuple[tuple[int, ...], tuple[int, ...]] | None
) -> None:
    assert intersect(Chunk("model.w", "F32", (10, 4), (2, 0), (3, 4)), Box(*box)) == expected


def indexes_of(folder: Path, world_size: int) -> list[ShardIndex]:
    storage = LocalStorage(folder)
    manifest = read_manifest(storage, write_checkpoint(folder, world_size=world_size, rows=40))
    return [read_index(storage, manifest, rank) for rank in range(world_size)]


def test_the_same_world_reads_its_own_shards(tmp_path: Path) -> None:
    indexes = indexes_of(tmp_path, 2)
    mesh = MeshShape(1, 2)
    for rank in range(2):
        by_file = {read.file: read.needed_bytes for read in plan_reads(indexes, mesh, rank)}
        bias = BIAS // 2 * 4
        own = 20 * ROW_BYTES
        if rank == 0:
            assert by_file == {"shard-00000.safetensors": own, "shard-00001.safetensors": bias}
        else:
            assert by_file == {"shard-00001.safetensors": own + bias}


def test_more_ranks_share_out_every_byte_once(tmp_path: Path) -> None:
    indexes = indexes_of(tmp_path, 2)
    reads = [read for rank in range(3) for read in plan_reads(indexes, MeshShape(1, 3), rank)]
    assert sum(read.needed_bytes for read in reads) == 40 * ROW_BYTES + BIAS * 4
    middle = {read.file: read.needed_bytes for read in plan_reads(indexes, MeshShape(1, 3), 1)}
    assert middle["shard-00000.safetensors"] == 6 * ROW_BYTES, "rows 14 to 20 of rows 14 to 28"


def test_replicas_read_the_same(tmp_path: Path) -> None:
    indexes = indexes_of(tmp_path, 2)
    plans = [plan_reads(indexes, MeshShape(2, 2), rank) for rank in range(4)]
    assert plans[0] == plans[2]
    assert plans[1] == plans[3]
    assert plans[0] != plans[1]


def test_whole_blocks_are_read(tmp_path: Path) -> None:
    (index,) = indexes_of(tmp_path, 1)
    (first, *_), block = plan_reads([index], MeshShape(1, 3), 0), index.files[0].block_bytes
    assert first.read_bytes >= first.needed_bytes
    assert first.read_bytes % block in (0, index.files[0].file_bytes % block)
    (everything,) = plan_reads([index], MeshShape(1, 1), 0)
    assert everything.read_bytes == index.files[0].file_bytes
