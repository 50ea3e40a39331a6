"""What rank 0 tells the others of where the chunks lie, and which indexes are read at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from engine import Checkpointer
from engine.directory.listing import read_manifest
from engine.errors import DamagedError, NotFoundError
from engine.format.manifest import Manifest
from engine.restore import chunk_locations
from engine.restore.chunk_locations import (
    Indexes,
    LocalValues,
    describe_locations,
    locate_chunks,
    locations_of,
    parse_locations,
)
from engine.storage.local import LocalStorage
from tests.support.tiny_checkpoint import write_checkpoint


class Counting(LocalStorage):
    """Notes which files are read whole."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.read: list[str] = []

    def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
        self.read.append(path.rpartition("/")[2])
        return super().read_bytes(path, max_bytes=max_bytes)


@pytest.fixture
def three(tmp_path: Path) -> tuple[Counting, Manifest]:
    id = write_checkpoint(tmp_path, world_size=3, rows=40)
    manifest = read_manifest(LocalStorage(tmp_path), id)
    return Counting(tmp_path), manifest


def numbers(storage: Counting) -> list[int]:
    return sorted(int(name.removeprefix("shard-").removesuffix(".json")) for name in storage.read)


def test_each_index_is_read_once_and_only_when_it_is_needed(three: tuple[Counting, Manifest]) -> None:
    storage, manifest = three
    indexes = Indexes(storage, manifest, manifest.id)
    assert numbers(storage) == []
    assert [index.rank for index in indexes.fetch([2])] == [2]
    assert [index.rank for index in indexes.fetch([2, 0, 2])] == [2, 0, 2]
    assert numbers(storage) == [0, 2]
    assert [index.rank for index in indexes.every()] == [0, 1, 2]
    assert numbers(storage) == [0, 1, 2]


def test_values_of_a_rank_bring_its_index_alone(three: tuple[Counting, Manifest]) -> None:
    storage, manifest = three
    values: Sequence[object] = LocalValues(Indexes(storage, manifest, manifest.id), 3)
    assert len(values) == 3
    assert values[1] == {}
    assert numbers(storage) == [1]
    assert values[1:] == [{}, {}]
    assert list(values) == [{}, {}, {}]
    assert numbers(storage) == [0, 1, 2]
    with pytest.raises(IndexError):
        values[3]


def test_what_rank_0_tells_is_what_it_has_read(three: tuple[Counting, Manifest]) -> None:
    storage, manifest = three
    indexes = Indexes(storage, manifest, manifest.id).every()
    document = describe_locations(manifest, indexes)
    assert document is not None
    told = parse_locations(manifest, document)
    assert told == locations_of(indexes)
    for name, found in locate_chunks(manifest, indexes).items():
        assert [(place.file, place.placed) for place in told[name]] == [(s.file, p) for s, p in found]


def test_damage_is_found_before_anything_is_told(three: tuple[Counting, Manifest]) -> None:
    storage, manifest = three
    indexes = Indexes(storage, manifest, manifest.id).every()
    with pytest.raises(DamagedError, match="hole"):
        describe_locations(manifest, indexes[:2])


def test_a_missing_index_is_not_found(three: tuple[Counting, Manifest]) -> None:
    storage, manifest = three
    (Path(storage.root) / manifest.id / "shard-00001.json").unlink()
    with pytest.raises(NotFoundError):
        Indexes(storage, manifest, manifest.id).every()


def test_what_is_too_long_to_tell_every_rank_reads_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"values": {"n": 1}}
    with Checkpointer(tmp_path, state) as checkpointer:
        checkpointer.save(1).result(60)
        state["values"]["n"] = 2
        monkeypatch.setattr(chunk_locations, "MOST_BYTES", 0)
        assert checkpointer.restore("latest") is not None
    assert state["values"]["n"] == 1
