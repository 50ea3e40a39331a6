"""A rank's index: the location of each chunk, the digest of every block, and rank-local values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from engine.errors import NewerFormatError
from engine.format import digest
from engine.format.fields import Fields, validated
from engine.format.forms import FORMAT_VERSION, version_needed
from engine.format.json import canonical_bytes, parse_canonical
from engine.format.layout import ALIGN_BYTES, MAX_DIMS, Chunk, PlacedChunk, check_tiling
from engine.format.names import parse_attempt_name, shard_file

MAX_WORLD_SIZE = 1_000_000

_CHUNK_FIELDS = ("name", "dtype", "shape", "offsets", "sizes", "begin", "end")
"""The keys of a chunk in JSON."""
_chunk_values = itemgetter(*_CHUNK_FIELDS)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard file: its size, its packed block digests (8 bytes a block) and its chunks by begin."""

    file: str
    file_bytes: int
    block_bytes: int
    digests: bytes
    digest: str
    chunks: tuple[PlacedChunk, ...]

    def __post_init__(self) -> None:
        check_tiling(self.file, self.chunks, self.file_bytes)
        if not 0 < self.block_bytes <= digest.MAX_BLOCK_BYTES or self.block_bytes % ALIGN_BYTES:
            raise ValueError(f"{self.file}: blocks of {self.block_bytes} bytes")
        blocks = digest.block_count(self.file_bytes, self.block_bytes)
        if len(self.digests) != blocks * digest.DIGEST_BYTES:
            raise ValueError(f"{self.file}: {len(self.digests)} bytes of digests for {blocks} blocks")
        if digest.combine(self.digests) != self.digest:
            raise ValueError(f"{self.file}: the block digests do not give the file's digest {self.digest}")


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """What rank `rank` of `world_size` stored in the attempt directory `attempt`.

    `files` are its parts 0, 1, ... (none if it wrote no tensors); `local` is a JSON object of rank-local
    values by state key.
    """

    attempt: str
    rank: int
    world_size: int
    files: tuple[ShardFile, ...]
    local: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if parse_attempt_name(self.attempt) is None:
            raise ValueError(f"{self.attempt[:80]!r} is not an attempt's name")
        if not 0 <= self.rank < self.world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"rank {self.rank} of {self.world_size}")
        for part, shard in enumerate(self.files):
            if shard.file != shard_file(self.rank, part):
                raise ValueError(f"{shard.file[:80]!r} is not part {part} of rank {self.rank}")

    @property
    def chunks(self) -> tuple[tuple[ShardFile, PlacedChunk], ...]:
        """Every chunk with its file, in file order."""
        return tuple((shard, placed) for shard in self.files for placed in shard.chunks)

    def to_bytes(self) -> bytes:
        """Canonical JSON. ValueError names a rank-local value that is not JSON."""
        return canonical_bytes(
            {
                "format_version": version_needed(
                    dict(self.local), dtypes={placed.chunk.dtype for _, placed in self.chunks}
                ),
                "attempt": self.attempt,
                "rank": self.rank,
                "world_size": self.world_size,
                "files": [_file_to_json(shard) for shard in self.files],
                "local": dict(self.local),
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes, *, what: str) -> ShardIndex:
        """Parse and validate. `what` names the document in errors.

        DamagedError unless sizes, ranges, shapes, dtypes and digest counts agree; NewerFormatError for a
        newer format. The caller compares the files' sizes.
        """
        fields = Fields(parse_canonical(raw, what=what), what)
        check_version(fields)
        parts = fields.array("files")
        values: dict[str, Any] = {
            "attempt": fields.text("attempt"),
            "rank": fields.integer("rank"),
            "world_size": fields.integer("world_size"),
            "local": fields.mapping("local"),
            "files": tuple(_file_from_json(Fields(part, f"{what}, in its files,")) for part in parts),
        }
        fields.finish()
        return validated(what, lambda: cls(**values))


def check_version(fields: Fields) -> None:
    """Read the field "format_version". NewerFormatError or DamagedError unless this Holdfast reads it."""
    version = fields.integer("format_version", least=1)
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{fields.what} has format version {version}, and this Holdfast reads up to {FORMAT_VERSION}:"
            " update Holdfast to read it"
        )


def _file_to_json(shard: ShardFile) -> dict[str, Any]:
    return {
        "file": shard.file,
        "bytes": shard.file_bytes,
        "block_bytes": shard.block_bytes,
        "digests": digest.pack(shard.digests),
        "digest": shard.digest,
        "chunks": [
            {
                "name": placed.chunk.name,
                "dtype": placed.chunk.dtype,
                "shape": list(placed.chunk.shape),
                "offsets": list(placed.chunk.offsets),
                "sizes": list(placed.chunk.sizes),
                "begin": placed.begin,
                "end": placed.end,
            }
            for placed in shard.chunks
        ],
    }


def _file_from_json(fields: Fields) -> ShardFile:
    file_bytes = fields.integer("bytes")
    block_bytes = fields.integer("block_bytes", least=ALIGN_BYTES, most=digest.MAX_BLOCK_BYTES)
    packed = fields.text("digests")
    values: dict[str, Any] = {
        "file": fields.text("file"),
        "file_bytes": file_bytes,
        "block_bytes": block_bytes,
        "digest": fields.digest("digest"),
        "chunks": tuple(_chunk_from_json(item, fields.what) for item in fields.array("chunks")),
    }
    fields.finish()
    blocks = digest.block_count(file_bytes, block_bytes)
    return validated(fields.what, lambda: ShardFile(digests=digest.unpack(packed, blocks), **values))


def _chunk_from_json(item: Any, what: str) -> PlacedChunk:
    # Hundreds in each index, and a restore waits for all of them: slow `Fields` only for one that is wrong.
    placed = _well_formed(item)
    if placed is not None:
        return placed
    fields = Fields(item, f"{what} a chunk")
    values: dict[str, Any] = {
        "name": fields.text("name"),
        "dtype": fields.text("dtype"),
        "shape": fields.integers("shape", most_items=MAX_DIMS),
        "offsets": fields.integers("offsets", most_items=MAX_DIMS),
        "sizes": fields.integers("sizes", most_items=MAX_DIMS),
    }
    begin, end = fields.integer("begin"), fields.integer("end")
    fields.finish()
    return validated(fields.what, lambda: PlacedChunk(Chunk(**values), begin, end))


def _well_formed(item: Any) -> PlacedChunk | None:
    """The chunk, or None if anything is wrong. `Chunk` itself checks shapes and extents."""
    try:
        name, dtype, shape, offsets, sizes, begin, end = _chunk_values(item)
        if len(item) != len(_CHUNK_FIELDS) or not type(name) is type(dtype) is str:
            return None
        if not type(shape) is type(offsets) is type(sizes) is list or not type(begin) is type(end) is int:
            return None
        return PlacedChunk(Chunk(name, dtype, tuple(shape), tuple(offsets), tuple(sizes)), begin, end)
    except (TypeError, KeyError, ValueError):
        return None
