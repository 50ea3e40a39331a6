"""Where the saved chunks are, and the saved ranks' indexes, of which a rank reads only those that it needs.

An index holds its rank's chunks, block digests and own values. A rank that fills its tensors needs the chunks
of all saved ranks, but the digests of few files and usually only its own values. So rank 0 reads every index
and tells the others where the chunks are; they read only the indexes of the files that they read from.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, overload

from engine.directory.damage import coverage_damage
from engine.directory.listing import read_index
from engine.errors import DamagedError
from engine.format.index import ShardFile, ShardIndex
from engine.format.layout import Chunk, PlacedChunk
from engine.format.manifest import Manifest
from engine.storage.base import Storage

LocatedChunks = Mapping[str, list[tuple[ShardFile, PlacedChunk]]]

MOST_BYTES = 4 << 20
"""Longer lists of chunks are not sent to one rank after another: all ranks read the indexes in parallel."""

_THREADS = 8


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """A saved chunk, and the rank and shard file that hold it."""

    rank: int
    file: str
    placed: PlacedChunk


class Indexes:
    """The indexes of one checkpoint, checked against its manifest; each is read once, when it is needed.

    Raises: DamagedError, NotFoundError, StorageError from any method.
    """

    def __init__(self, storage: Storage, manifest: Manifest, name: str) -> None:
        self._storage = storage
        self._manifest = manifest
        self._name = name
        self._read: dict[int, ShardIndex] = {}

    def fetch(self, ranks: Iterable[int]) -> list[ShardIndex]:
        """The indexes of these ranks; missing ones are read in parallel."""
        wanted = list(ranks)
        lacking = [rank for rank in dict.fromkeys(wanted) if rank not in self._read]
        if len(lacking) == 1:
            # Another thread would compete with this one for the interpreter lock.
            self._read[lacking[0]] = self._read_one(lacking[0])
        elif lacking:
            with ThreadPoolExecutor(min(_THREADS, len(lacking))) as pool:
                self._read.update(zip(lacking, pool.map(self._read_one, lacking), strict=True))
        return [self._read[rank] for rank in wanted]

    def _read_one(self, rank: int) -> ShardIndex:
        return read_index(self._storage, self._manifest, rank, name=self._name)

    def every(self) -> list[ShardIndex]:
        """The indexes of all ranks."""
        return self.fetch(range(self._manifest.world_size))


class LocalValues(Sequence[Mapping[str, Any]]):
    """Each saved rank's own values; access reads that rank's index."""

    def __init__(self, indexes: Indexes, world_size: int) -> None:
        self._indexes = indexes
        self._world_size = world_size

    def __len__(self) -> int:
        return self._world_size

    @overload
    def __getitem__(self, rank: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, rank: slice) -> list[Mapping[str, Any]]: ...
    def __getitem__(self, rank: int | slice) -> Mapping[str, Any] | list[Mapping[str, Any]]:
        if isinstance(rank, slice):
            return [index.local for index in self._indexes.fetch(range(self._world_size)[rank])]
        (index,) = self._indexes.fetch([range(self._world_size)[rank]])
        return index.local


def locate_chunks(manifest: Manifest, indexes: Sequence[ShardIndex]) -> LocatedChunks:
    """Every saved chunk by tensor name, with the file that holds it. Pure.

    Raises: DamagedError unless the indexes cover each of the manifest's tensors exactly once.
    """
    places: dict[str, list[tuple[ShardFile, PlacedChunk]]] = defaultdict(list)
    for index in indexes:
        for shard, placed in index.chunks:
            places[placed.chunk.name].append((shard, placed))
    damage = coverage_damage(manifest, indexes)
    if damage:
        raise DamagedError(damage[0].sentence)
    return places


def locations_of(indexes: Sequence[ShardIndex]) -> dict[str, list[ChunkLocation]]:
    """Every chunk by tensor name, in the same order on every rank. Pure."""
    places: dict[str, list[ChunkLocation]] = defaultdict(list)
    for index in indexes:
        for shard, placed in index.chunks:
            places[placed.chunk.name].append(ChunkLocation(index.rank, shard.file, placed))
    return places


def describe_locations(manifest: Manifest, indexes: Sequence[ShardIndex]) -> str | None:
    """All chunks as JSON, for ranks that have not read these indexes; None when it would be too long.

    Raises: DamagedError as `chunk_places`.
    """
    locate_chunks(manifest, indexes)
    numbers = {name: number for number, name in enumerate(sorted(manifest.tensors))}
    files = [
        {
            "rank": index.rank,
            "file": shard.file,
            "chunks": [
                [numbers[c.name], placed.begin, c.offsets, c.sizes]
                for placed in shard.chunks
                for c in (placed.chunk,)
            ],
        }
        for index in indexes
        for shard in index.files
    ]
    # Without the checks for users' values: these are only names of files and numbers.
    text = json.dumps(files, separators=(",", ":"))
    return text if len(text) <= MOST_BYTES else None


def parse_locations(manifest: Manifest, text: str) -> dict[str, list[ChunkLocation]]:
    """The inverse of `describe_chunks`: every chunk by tensor name, in the same order on every rank."""
    names = sorted(manifest.tensors)
    places: dict[str, list[ChunkLocation]] = defaultdict(list)
    for file in json.loads(text):
        for number, begin, offsets, sizes in file["chunks"]:
            name = names[number]
            info = manifest.tensors[name]
            chunk = Chunk(name, info.dtype, info.shape, tuple(offsets), tuple(sizes))
            placed = PlacedChunk(chunk, begin, begin + chunk.chunk_bytes)
            places[name].append(ChunkLocation(file["rank"], file["file"], placed))
    return places
