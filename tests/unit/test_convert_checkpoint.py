"""A checkpoint opened for a long read: rows across shards, verified, and beyond the reach of retention."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.tensors import row_spans, whole
from engine.errors import DamagedError, NotFoundError
from engine.format.layout import Chunk
from engine.format.manifest import TensorInfo
from engine.storage.local import LocalStorage
from tests.support.storages import StoreLike
from tests.support.tiny_checkpoint import COLUMNS, write_checkpoint


@pytest.mark.parametrize(
    ("shape", "itemsize", "most", "spans"),
    [
        ((), 4, 100, [(0, 1)]),
        ((0, 3), 4, 100, [(0, 0)]),
        ((3, 0), 4, 100, [(0, 3)]),
        ((5,), 4, 8, [(0, 2), (2, 4), (4, 5)]),
        ((3, 10), 4, 80, [(0, 2), (2, 3)]),
        ((3, 10), 4, 1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_windows_cover_every_row_once(
    shape: tuple[int, ...], itemsize: int, most: int, spans: list[tuple[int, int]]
) -> None:
    assert row_spans(shape, itemsize, most) == spans


def put_together(directory: Path, name: str, rows: int) -> torch.Tensor:
    """The matrix of a tiny checkpoint, by the safetensors library and nothing of ours."""
    parts = []
    for file in sorted(directory.glob("shard-*.safetensors")):
        with safe_open(file, "pt") as opened:
            if name in opened.keys():  # noqa: SIM118 - no dict
                parts.append(opened.get_tensor(name))
    joined = torch.cat(parts)
    assert joined.shape[0] == rows
    return joined


@pytest.mark.parametrize("world_size", [1, 3])
def test_it_reads_whole_tensors_out_of_all_shards(
    tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.convert.tensors.WINDOW_BYTES", 7 * 4 * COLUMNS)
    name = write_checkpoint(tmp_path, world_size=world_size, rows=40)
    with CheckpointTensors(LocalStorage(tmp_path), name) as source:
        windows = list(source.windows("model.w"))
        assert [window.shape[0] for window in windows] == [7, 7, 7, 7, 7, 5]
        expected = put_together(tmp_path / name, "model.w", 40)
        assert torch.equal(torch.cat(windows).view(torch.uint8), expected.view(torch.uint8))
        assert whole(source, "model.b").shape == (8,)


def test_boxes_of_columns_are_put_in_their_place(tmp_path: Path) -> None:
    shape = (6, 8)
    boxes = [((0, 0), (6, 3)), ((0, 3), (2, 5)), ((2, 3), (4, 5))]
    chunks = [[Chunk("model.w", "F32", shape, offsets, sizes)] for offsets, sizes in boxes]
    chunks[0].append(Chunk("model.b", "F32", (8,), (0,), (8,)))
    tensors = {"model.w": TensorInfo("F32", shape), "model.b": TensorInfo("F32", (8,))}
    name = write_checkpoint(tmp_path, world_size=3, chunks=chunks, tensors=tensors)
    expected = torch.empty(shape)
    for rank, ((row, column), (rows, columns)) in enumerate(boxes):
        with safe_open(tmp_path / name / f"shard-{rank:05d}.safetensors", "pt") as opened:
            expected[row : row + rows, column : column + columns] = opened.get_tensor("model.w")
    with CheckpointTensors(LocalStorage(tmp_path), name) as source:
        found = whole(source, "model.w")
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_retention_cannot_pull_an_opened_checkpoint_away(tmp_path: Path) -> None:
    name = write_checkpoint(tmp_path, world_size=2)
    with CheckpointTensors(LocalStorage(tmp_path), name) as source:
        expected = put_together(tmp_path / name, "model.w", 40)
        shutil.rmtree(tmp_path / name)
        assert torch.equal(whole(source, "model.w").view(torch.uint8), expected.view(torch.uint8))


def test_on_a_store_a_removed_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    name = write_checkpoint(tmp_path, world_size=2)
    with CheckpointTensors(StoreLike(tmp_path), name) as source:
        shutil.rmtree(tmp_path / name)
        with pytest.raises(NotFoundError, match=r"deleted while it was read.*hold"):
            whole(source, "model.w")


def test_one_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist, or was deleted"):
        CheckpointTensors(LocalStorage(tmp_path), "step-00000010-00000001")


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    name = write_checkpoint(tmp_path)
    file = tmp_path / name / "shard-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with CheckpointTensors(LocalStorage(tmp_path), name) as source:
        whole(source, "model.b")  # it lies in the first block, the damage in the last one
        with pytest.raises(DamagedError, match="block"):
            whole(source, "model.w")


def test_it_closes_its_files(tmp_path: Path) -> None:
    name = write_checkpoint(tmp_path, world_size=3)
    before = len(os.listdir("/proc/self/fd"))
    source = CheckpointTensors(LocalStorage(tmp_path), name)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_failed_opening_closes_them_too(tmp_path: Path) -> None:
    name = write_checkpoint(tmp_path, world_size=3)
    (tmp_path / name / "shard-00002.safetensors").unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NotFoundError):
        CheckpointTensors(LocalStorage(tmp_path), name)
    assert len(os.listdir("/proc/self/fd")) == before
