"""Shard indexes: round trip, and every contradiction in one is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DamagedError, HoldfastError, NewerFormatError
from engine.format import digest
from engine.format.index import ShardFile, ShardIndex
from engine.format.json import canonical_bytes
from engine.format.layout import Chunk, plan_files

ATTEMPT = "step-00000250-1f0c9a3e"
BLOCK = 4096


def an_index(rank: int = 1) -> ShardIndex:
    """Two files: the second holds a further chunk of a name."""
    chunks = [
        Chunk("weight", "F32", (10, 300), (0, 0), (4, 300)),
        Chunk("weight", "F32", (10, 300), (8, 0), (2, 300)),
        Chunk("step", "I64", (), (), ()),
        Chunk("empty", "F32", (0,), (0,), (0,)),
    ]
    files = []
    for planned in plan_files(rank, chunks):
        packed = digest.block_digests(planned.header + bytes(planned.file_bytes - len(planned.header)), BLOCK)
        files.append(
            ShardFile(planned.file, planned.file_bytes, BLOCK, packed, digest.combine(packed), planned.chunks)
        )
    return ShardIndex(ATTEMPT, rank, 4, tuple(files), {"loader": {"position": 7}})


INDEX = an_index()
RAW = INDEX.to_bytes()


def test_round_trip() -> None:
    again = ShardIndex.from_bytes(RAW, what="x")
    assert again == INDEX
    assert again.to_bytes() == RAW
    assert [(file.file, placed.chunk.name) for file, placed in again.chunks] == [
        ("shard-00001.safetensors", "step"),
        ("shard-00001.safetensors", "empty"),
        ("shard-00001.safetensors", "weight"),
        ("shard-00001-1.safetensors", "weight"),
    ]


def test_rank_with_nothing_to_write() -> None:
    index = ShardIndex(ATTEMPT, 0, 1, (), {})
    assert ShardIndex.from_bytes(index.to_bytes(), what="x") == index


def test_local_value_that_is_not_json() -> None:
    index = ShardIndex(ATTEMPT, 0, 1, (), {"loader": {"rng": object()}})
    with pytest.raises(ValueError, match=r"local\.loader\.rng is a object"):
        index.to_bytes()


def packed(blocks: int) -> str:
    return digest.pack(bytes(8 * blocks))


def first_file(document: dict[str, Any]) -> dict[str, Any]:
    return document["files"][0]  # type: ignore[no-any-return]


def first_chunk(document: dict[str, Any]) -> dict[str, Any]:
    return document["files"][0]["chunks"][2]  # type: ignore[no-any-return]


def swap_chunks(document: dict[str, Any]) -> None:
    document["files"][0]["chunks"].reverse()


Change = Callable[[dict[str, Any]], object]


def put(where: Callable[[dict[str, Any]], dict[str, Any]], **values: object) -> Change:
    return lambda document: where(document).update(values)


def root(document: dict[str, Any]) -> dict[str, Any]:
    return document


CONTRADICTIONS: dict[str, Change] = {
    "no rank": lambda document: document.pop("rank"),
    "unknown field": put(root, code="x"),
    "attempt elsewhere": put(root, attempt="../../etc"),
    "attempt is a number": put(root, attempt=1),
    "rank beyond the world": put(root, rank=4),
    "rank negative": put(root, rank=-1),
    "rank is true": put(root, rank=True),
    "rank is a float": put(root, rank=1.0),
    "rank of other files": put(root, rank=2),
    "world of millions": put(root, world_size=2**62),
    "files is an object": put(root, files={}),
    "file is a number": put(root, files=[1]),
    "files of one part only": lambda document: document["files"].pop(0),
    "file twice": lambda document: document["files"].append(document["files"][1]),
    "local is a list": put(root, local=[]),
    "version zero": put(root, format_version=0),
    "version is text": put(root, format_version="1"),
    "file elsewhere": put(first_file, file="../shard-00001.safetensors"),
    "file absolute": put(first_file, file="/etc/passwd"),
    "file of another rank": put(first_file, file="shard-00000.safetensors"),
    "file larger": put(first_file, bytes=2**62),
    "file smaller": put(first_file, bytes=8000),
    "file of no bytes": put(first_file, bytes=0),
    "blocks of nothing": put(first_file, block_bytes=0),
    "blocks odd": put(first_file, block_bytes=4097),
    "blocks larger": put(first_file, block_bytes=8192),
    "blocks huge": put(first_file, block_bytes=2**40),
    "a digest less": put(first_file, digests=packed(2)),
    "a digest more": put(first_file, digests=packed(4)),
    "other digests": put(first_file, digests=packed(3)),
    "digests are not text": put(first_file, digests=[1]),
    "digest of another file": put(first_file, digest="0" * 32),
    "digest too short": put(first_file, digest="0"),
    "no chunks": put(first_file, chunks=[]),
    "chunk twice": lambda document: first_file(document)["chunks"].append(first_chunk(document)),
    "chunks in another order": swap_chunks,
    "chunk left out": lambda document: first_file(document)["chunks"].pop(),
    "chunk without a name": put(first_chunk, name=""),
    "chunk of another name": put(first_chunk, name="step"),
    "chunk with metadata's name": put(first_chunk, name="__metadata__"),
    "chunk unknown field": put(first_chunk, pickle="x"),
    "dtype unknown": put(first_chunk, dtype="F31"),
    "dtype of another size": put(first_chunk, dtype="F64"),
    "shape smaller than the chunk": put(first_chunk, shape=[3, 300]),
    "shape with a dimension more": put(first_chunk, shape=[10, 300, 1]),
    "shape is text": put(first_chunk, shape="10"),
    "shape of 65 dimensions": put(first_chunk, shape=[1] * 65, offsets=[0] * 65, sizes=[1] * 65),
    "shape beyond 64 bits": put(first_chunk, shape=[2**63 - 1, 300], offsets=[2**63 - 1, 0]),
    "offsets beyond the shape": put(first_chunk, offsets=[7, 0]),
    "offsets negative": put(first_chunk, offsets=[-1, 0]),
    "offsets of floats": put(first_chunk, offsets=[0.5, 0]),
    "sizes other than the range": put(first_chunk, sizes=[3, 300]),
    "sizes that multiply beyond 64 bits": put(first_chunk, shape=[2**62, 2**62], sizes=[2**62, 2**62]),
    "range moved": put(first_chunk, begin=4105, end=8905),
    "range reversed": put(first_chunk, begin=8904, end=4104),
    "range beyond the file": put(first_chunk, begin=2**60, end=2**60 + 4800),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(change: Change) -> None:
    document = copy.deepcopy(json.loads(RAW))
    change(document)
    raw = canonical_bytes(document)
    assert raw != RAW
    with pytest.raises(DamagedError, match="the index of rank 1"):
        ShardIndex.from_bytes(raw, what="the index of rank 1")


def test_newer_format() -> None:
    document = {**json.loads(RAW), "format_version": 3, "something": "new"}
    with pytest.raises(NewerFormatError, match=r"format version 3.*update Holdfast"):
        ShardIndex.from_bytes(canonical_bytes(document), what="x")


@pytest.mark.parametrize("document", [[], 1, "x", None, {}])
def test_not_an_index(document: object) -> None:
    with pytest.raises(DamagedError):
        ShardIndex.from_bytes(canonical_bytes(document), what="x")


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.lists(st.integers(-2, 2**40), max_size=3)
    | st.just({})
)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for path in [path] if path] + [p for key, item in items for p in leaves(item, (*path, key))]


PATHS = leaves(json.loads(RAW))


@given(st.sampled_from(PATHS), VALUES)
def test_any_value_anywhere_is_refused_or_loads(path: tuple[Any, ...], value: object) -> None:
    document = json.loads(RAW)
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    try:
        index = ShardIndex.from_bytes(canonical_bytes(document), what="x")
    except HoldfastError as error:
        said = str(error)
    else:
        said = ""
        assert index.to_bytes() == canonical_bytes(document)
    assert "\n" not in said
    assert len(said) < 1000
