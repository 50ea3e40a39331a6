"""The layout of a rank's shard files: plain safetensors, without gaps, data on a 4 KiB boundary.

The header follows https://huggingface.co/docs/safetensors (8-byte little-endian length, JSON, data) and has
the sharding metadata of torch's HuggingFaceStorageReader, which derives each tensor's global shape
and chunks from "saved_offsets" (torch/distributed/checkpoint/hf_storage.py, read_metadata).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.errors import DamagedError, StateError
from engine.format.element_types import ITEMSIZES, header_sizes, itemsize, sizes_of_header
from engine.format.fields import Fields, are_extents
from engine.format.json import canonical_bytes, parse_bounded, unique_pairs
from engine.format.names import parse_shard_file, shard_file

ALIGN_BYTES = 4096
"""Boundary on which a shard's data begins: direct I/O and page-aligned readers need it."""

MAX_HEADER_BYTES = 100_000_000
"""Largest JSON part of a header that safetensors readers accept."""

MAX_DIMS = 64
"""The most dimensions of a torch tensor."""

MAX_NAME_CHARS = 4096

_METADATA_KEY = "__metadata__"
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Chunk:
    """One box of a global tensor: [offsets, offsets + sizes) in each dimension, half-open.

    `shape` is the global tensor's; `dtype` a safetensors name. A scalar has empty tuples.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        check_tensor(self.name, self.dtype, self.shape)
        if not len(self.shape) == len(self.offsets) == len(self.sizes):
            raise ValueError(
                f"chunk of {self.name!r}: {len(self.offsets)} offsets and {len(self.sizes)} sizes"
                f" for {len(self.shape)} dimensions"
            )
        for offset, size, extent in zip(self.offsets, self.sizes, self.shape, strict=True):
            whole = type(offset) is int and type(size) is int  # no calls: an index has hundreds of chunks
            if not (whole and 0 <= offset <= offset + size <= extent):
                raise ValueError(
                    f"chunk of {self.name!r}: offsets {self.offsets} and sizes {self.sizes}"
                    f" leave the shape {self.shape}"
                )

    @property
    def chunk_bytes(self) -> int:
        """Size of the chunk's data in bytes."""
        return math.prod(self.sizes) * ITEMSIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A chunk and its byte range [begin, end) in its file, counted from the file's first byte."""

    chunk: Chunk
    begin: int
    end: int

    def __post_init__(self) -> None:
        if self.begin < 0 or self.end - self.begin != self.chunk.chunk_bytes:
            raise ValueError(
                f"chunk of {self.chunk.name!r}: bytes [{self.begin}, {self.end}) for {self.chunk.chunk_bytes}"
                f" bytes of {self.chunk.dtype} {list(self.chunk.sizes)}"
            )


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """The plan of one shard file: its header, then its chunks by begin, without gaps, up to `file_bytes`."""

    file: str
    header: bytes
    chunks: tuple[PlacedChunk, ...]
    file_bytes: int

    def __post_init__(self) -> None:
        if parse_shard_file(self.file) is None:
            raise ValueError(f"{self.file!r} is not a shard file's name")
        if len(self.header) % ALIGN_BYTES:
            raise ValueError(f"a header of {len(self.header)} bytes is not a multiple of {ALIGN_BYTES}")
        check_tiling(self.file, self.chunks, self.file_bytes)
        if self.chunks[0].begin != len(self.header):
            raise ValueError(f"data begins at {self.chunks[0].begin}, the header ends at {len(self.header)}")


class HeaderEntry(NamedTuple):
    """A tensor in a safetensors header: byte range [begin, end) in the file, `sizes` as stored there."""

    dtype: str
    sizes: tuple[int, ...]
    begin: int
    end: int


def check_tensor(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """ValueError unless name, safetensors dtype and global shape are valid for a tensor."""
    if not name or len(name) > MAX_NAME_CHARS or name == _METADATA_KEY:
        raise ValueError(f"{name[:40]!r} cannot name a tensor")
    if dtype not in ITEMSIZES:
        raise ValueError(f"tensor {name!r}: unknown element type {str(dtype)[:40]!r}")
    if dtype == "F4" and not shape:
        raise ValueError(f"tensor {name!r}: a scalar of F4 has no shape in safetensors")
    if len(shape) > MAX_DIMS or not are_extents(shape):
        raise ValueError(f"tensor {name!r}: {str(shape)[:200]} is not a shape of up to {MAX_DIMS} dimensions")


def check_tiling(file: str, chunks: tuple[PlacedChunk, ...], file_bytes: int) -> None:
    """ValueError unless the chunks, in this order, cover [first begin, file_bytes), each name once."""
    if not chunks:
        raise ValueError(f"{file} has no chunk")
    position = chunks[0].begin
    if position <= _LENGTH_BYTES or position % ALIGN_BYTES:
        raise ValueError(f"{file}: data begins at byte {position}, which is not a multiple of {ALIGN_BYTES}")
    for placed in chunks:
        if placed.begin != position:
            kind = "a hole" if placed.begin > position else "an overlap"
            name = placed.chunk.name
            raise ValueError(f"{file}: {kind} between bytes {position} and {placed.begin}, at {name!r}")
        position = placed.end
    if position != file_bytes:
        raise ValueError(f"{file}: the chunks end at byte {position}, the file at {file_bytes}")
    if len({placed.chunk.name for placed in chunks}) != len(chunks):
        raise ValueError(f"{file} has two chunks of one name")


def plan_files(rank: int, chunks: Iterable[Chunk]) -> tuple[ShardLayout, ...]:
    """Lay out a rank's chunks as its shard files; the same chunks, in any order, give the same layout.

    Part k has the k-th chunk (by offsets) of every name with that many: a name is unique within one file, and
    stock DCP would read a chunk under another name as another tensor. No chunks, no files.
    """
    parts: list[list[Chunk]] = []
    repeats: dict[str, int] = {}
    for chunk in sorted(chunks, key=lambda chunk: (-itemsize(chunk.dtype), chunk.name, chunk.offsets)):
        part = repeats.get(chunk.name, 0)
        repeats[chunk.name] = part + 1
        if part == len(parts):
            parts.append([])
        parts[part].append(chunk)
    return tuple(_lay_out(shard_file(rank, part), ordered) for part, ordered in enumerate(parts))


def _lay_out(file: str, chunks: list[Chunk]) -> ShardLayout:
    """`chunks`: in file order. Element sizes descend, so that every chunk begins on a multiple of its own."""
    header = _header(chunks)
    position = len(header)
    placed = []
    for chunk in chunks:
        placed.append(PlacedChunk(chunk, position, position + chunk.chunk_bytes))
        position += chunk.chunk_bytes
    return ShardLayout(file, header, tuple(placed), position)


def _header(chunks: list[Chunk]) -> bytes:
    offsets = {chunk.name: {"saved_offsets": list(chunk.offsets)} for chunk in chunks}
    document: dict[str, Any] = {
        _METADATA_KEY: {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": canonical_bytes(offsets).decode("utf-8"),
        }
    }
    position = 0
    for chunk in chunks:
        end = position + chunk.chunk_bytes
        span = [position, end]
        shape = list(header_sizes(chunk.dtype, chunk.sizes))
        document[chunk.name] = {"dtype": chunk.dtype, "shape": shape, "data_offsets": span}
        position = end
    text = canonical_bytes(document)
    padded_bytes = -(-(_LENGTH_BYTES + len(text)) // ALIGN_BYTES) * ALIGN_BYTES - _LENGTH_BYTES
    if padded_bytes > MAX_HEADER_BYTES:
        raise StateError(
            f"{len(chunks)} tensors need a safetensors header of {padded_bytes} bytes, above the"
            f" {MAX_HEADER_BYTES} that readers accept: save fewer or larger tensors per rank"
        )
    return struct.pack("<Q", padded_bytes) + text.ljust(padded_bytes, b" ")


def header_bytes(first: bytes, file_bytes: int, *, what: str = "the shard") -> int:
    """Length of the whole header, including the 8 length bytes, from a file's first 8 bytes.

    DamagedError unless it fits into both the file and safetensors' limit: read no more before this check.
    """
    if len(first) < _LENGTH_BYTES or file_bytes < _LENGTH_BYTES:
        found_bytes = min(len(first), file_bytes)
        raise DamagedError(f"{what} has {found_bytes} bytes: too few for a safetensors header")
    length: int = struct.unpack("<Q", first[:_LENGTH_BYTES])[0]
    if length > MAX_HEADER_BYTES or _LENGTH_BYTES + length > file_bytes:
        raise DamagedError(f"{what} declares a header of {length} bytes in a file of {file_bytes}")
    return _LENGTH_BYTES + length


def parse_header(raw: bytes, file_bytes: int, *, what: str = "the shard") -> dict[str, HeaderEntry]:
    """Parse a shard's header, from its first bytes, into its tensors.

    `file_bytes` is the file's actual size. DamagedError unless dtypes, shapes and ranges agree and the ranges
    cover the file's data exactly. Nothing of a declared size is allocated.
    """
    data_begin = header_bytes(raw, file_bytes, what=what)
    if len(raw) < data_begin:
        raise DamagedError(f"{what} ends after {len(raw)} bytes of its header of {data_begin}")
    document = parse_bounded(
        raw[_LENGTH_BYTES:data_begin],
        what=f"the header of {what}",
        max_bytes=MAX_HEADER_BYTES,
        pairs_hook=unique_pairs,
    )
    if not isinstance(document, dict):
        raise DamagedError(f"the header of {what} is not a JSON object")
    document.pop(_METADATA_KEY, None)
    entries = {name: _entry(name, fields, data_begin, what) for name, fields in document.items()}
    position = data_begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise DamagedError(f"{what}: {name[:80]!r} begins at byte {entry.begin}, not at {position}")
        position = entry.end
    if position != file_bytes:
        raise DamagedError(f"{what}: its tensors end at byte {position}, the file at {file_bytes}")
    return entries


def _entry(name: str, value: object, data_begin: int, what: str) -> HeaderEntry:
    fields = Fields(value, f"the header of {what}, at {name[:80]!r},")
    dtype, sizes = fields.text("dtype"), fields.integers("shape", most_items=MAX_DIMS)
    span = fields.integers("data_offsets", most_items=2)
    fields.finish()
    sizes = sizes_of_header(dtype, sizes)
    if len(span) != 2 or span[1] - span[0] != math.prod(sizes) * itemsize(dtype):
        raise DamagedError(f"{what}: {name[:80]!r} is {dtype} {list(sizes)} in the byte range {list(span)}")
    return HeaderEntry(dtype, sizes, data_begin + span[0], data_begin + span[1])
