"""Damage of a checkpoint: files compared with the manifest, chunks with the tensors. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from engine.format.index import ShardIndex
from engine.format.layout import Chunk
from engine.format.manifest import FileReceipt, Manifest, TensorInfo
from engine.format.names import index_file, parse_shard_file
from engine.geometry import first_overlap, show


@dataclass(frozen=True, slots=True)
class Damage:
    """One difference from what was written. `block`: number of a digest block, from 0, or None."""

    file: str
    block: int | None
    expected: str
    found: str
    sentence: str


def receipts(manifest: Manifest) -> Iterator[FileReceipt]:
    """Every file that the manifest lists: each rank's shard files, then its index."""
    for shard in manifest.shards:
        yield from shard.files
        yield shard.index


def size_damage(manifest: Manifest, files: Mapping[str, int | None]) -> list[Damage]:
    """Compare a checkpoint directory's files (name -> bytes) with the manifest's receipts.

    A shard that no receipt names is damage, too: other safetensors readers would read it as part of the
    checkpoint.
    """
    found = []
    expected_names = set()
    for receipt in receipts(manifest):
        expected_names.add(receipt.file)
        size = files.get(receipt.file)
        if size is None:
            sentence = f"{receipt.file} is missing: the manifest names it with {receipt.bytes} bytes"
            found.append(Damage(receipt.file, None, f"{receipt.bytes} bytes", "no file", sentence))
        elif size != receipt.bytes:
            sentence = f"{receipt.file} has {size} bytes: {receipt.bytes} were written"
            found.append(Damage(receipt.file, None, f"{receipt.bytes} bytes", f"{size} bytes", sentence))
    for name in sorted(set(files) - expected_names):
        shard = parse_shard_file(name)
        if shard is not None or name == _index_of(name):
            sentence = f"{name} does not belong to this checkpoint: its manifest does not name it"
            found.append(Damage(name, None, "no file", f"{files[name]} bytes", sentence))
    return found


_StoredChunk = tuple[str, Chunk]
"""A chunk and the name of its file."""


def coverage_damage(manifest: Manifest, indexes: Iterable[ShardIndex]) -> list[Damage]:
    """Whether the chunks of all ranks cover every tensor exactly once. At most one Damage per tensor."""
    by_name: dict[str, list[_StoredChunk]] = {}
    for index in indexes:
        for shard, placed in index.chunks:
            by_name.setdefault(placed.chunk.name, []).append((shard.file, placed.chunk))
    found = [_tensor_damage(name, info, by_name.pop(name, [])) for name, info in manifest.tensors.items()]
    for name, chunks in by_name.items():
        file = chunks[0][0]
        sentence = f"{file} has a tensor {name!r} that the manifest does not list"
        found.append(Damage(file, None, "no such tensor", name, sentence))
    return [damage for damage in found if damage is not None]


def _index_of(name: str) -> str | None:
    digits = name.removeprefix("shard-").removesuffix(".json")
    return index_file(int(digits)) if digits.isascii() and digits.isdigit() else None


def _tensor_damage(name: str, info: TensorInfo, stored: Sequence[_StoredChunk]) -> Damage | None:
    expected = f"{info.dtype} {list(info.shape)}"
    for file, chunk in stored:
        if (chunk.dtype, chunk.shape) != (info.dtype, info.shape):
            given = f"{chunk.dtype} {list(chunk.shape)}"
            sentence = f"{file} has {name!r} as {given}: the manifest says {expected}"
            return Damage(file, None, expected, given, sentence)
    pair = first_overlap([chunk for _, chunk in stored])
    if pair is not None:
        (file, chunk), (other_file, other) = stored[pair[0]], stored[pair[1]]
        box, other_box = show(chunk), show(other)
        sentence = f"{name!r} is partly stored twice: {box} in {file} overlaps {other_box} in {other_file}"
        return Damage(other_file, None, f"{name!r} once", f"{box} and {other_box}", sentence)
    elements = math.prod(info.shape)
    stored_elements = sum(math.prod(chunk.sizes) for _, chunk in stored)
    if elements != stored_elements:
        file = next((file for file, chunk in stored if math.prod(chunk.sizes)), "")
        counts = f"{stored_elements} of its {elements} elements"
        sentence = f"{name!r} ({expected}) has a hole: the shards have {counts}"
        return Damage(file, None, f"{elements} elements", f"{stored_elements} elements", sentence)
    return None
