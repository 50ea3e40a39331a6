"""Shard files: laid out as safetensors readers and stock DCP expect, and read with nothing taken on trust."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DamagedError, StateError
from engine.format import layout
from engine.format.element_types import ITEMSIZES, itemsize
from engine.format.layout import (
    ALIGN_BYTES,
    Chunk,
    PlacedChunk,
    ShardLayout,
    header_bytes,
    parse_header,
    plan_files,
)


def chunk(
    name: str, dtype: str = "F32", shape: tuple[int, ...] = (4,), at: int = 0, rows: int | None = None
) -> Chunk:
    """Rows [at, at + rows) of a tensor, all of it by default."""
    if not shape:
        return Chunk(name, dtype, (), (), ())
    rows = shape[0] if rows is None else rows
    return Chunk(name, dtype, shape, (at, *[0] * (len(shape) - 1)), (rows, *shape[1:]))


MIXED = [
    chunk("norm", "BF16", (3,)),
    chunk("weight", "F32", (10, 3), at=2, rows=4),
    chunk("weight", "F32", (10, 3), at=8, rows=2),
    chunk("step", "I64", ()),
    chunk("mask", "BOOL", (5,)),
    chunk("empty", "F32", (0, 7)),
    chunk("bias", "F32", (3,)),
]


def file_of(planned: ShardLayout) -> bytes:
    """The file with the data of each chunk numbered by its byte position."""
    body = bytes(position % 251 for position in range(len(planned.header), planned.file_bytes))
    return planned.header + body


def test_order_and_places() -> None:
    first, second = plan_files(3, MIXED)
    assert first.file == "shard-00003.safetensors"
    assert second.file == "shard-00003-1.safetensors"
    assert [(p.chunk.name, p.chunk.offsets, p.begin, p.end) for p in first.chunks] == [
        ("step", (), 4096, 4104),
        ("bias", (0,), 4104, 4116),
        ("empty", (0, 0), 4116, 4116),
        ("weight", (2, 0), 4116, 4164),
        ("norm", (0,), 4164, 4170),
        ("mask", (0,), 4170, 4175),
    ]
    assert first.file_bytes == 4175
    assert [(p.chunk.name, p.chunk.offsets, p.begin, p.end) for p in second.chunks] == [
        ("weight", (8, 0), 4096, 4120)
    ]


def test_layout_does_not_depend_on_the_order_given() -> None:
    assert plan_files(0, reversed(MIXED)) == plan_files(0, MIXED)
    assert plan_files(0, []) == ()


CHUNKS = st.lists(
    st.tuples(
        st.sampled_from("abcdefgh"),
        st.sampled_from(sorted(ITEMSIZES)),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda item: item[0],
)


@given(CHUNKS, st.integers(1, 3))
def test_any_layout_is_aligned_and_complete(tensors: list[tuple[str, str, list[int]]], repeats: int) -> None:
    chunks = [
        Chunk(name, dtype, (repeats * 9, *shape), (at * 9, *[0] * len(shape)), (5, *shape))
        for name, dtype, shape in tensors
        for at in range(repeats)
    ]
    files = plan_files(0, chunks)
    placed_chunks = [placed.chunk for planned in files for placed in planned.chunks]
    assert sorted(map(repr, placed_chunks)) == sorted(map(repr, chunks))
    for planned in files:
        assert len(planned.header) % ALIGN_BYTES == 0
        entries = parse_header(planned.header, planned.file_bytes)
        for placed in planned.chunks:
            assert placed.begin % itemsize(placed.chunk.dtype) == 0
            assert entries[placed.chunk.name] == (
                placed.chunk.dtype,
                placed.chunk.sizes,
                placed.begin,
                placed.end,
            )


def test_safetensors_reads_it(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    from safetensors import safe_open

    for planned in plan_files(0, [item for item in MIXED if item.dtype != "BF16"]):
        raw = file_of(planned)
        (tmp_path / planned.file).write_bytes(raw)
        with safe_open(tmp_path / planned.file, "np") as file:
            assert file.metadata()["format"] == "pt"
            for placed in planned.chunks:
                found = file.get_tensor(placed.chunk.name)
                assert found.shape == placed.chunk.sizes
                assert numpy.ascontiguousarray(found).tobytes() == raw[placed.begin : placed.end]


@pytest.mark.parametrize("dtype", sorted(ITEMSIZES))
def test_safetensors_knows_every_dtype(tmp_path: Path, dtype: str) -> None:
    from safetensors import safe_open

    (planned,) = plan_files(0, [chunk("x", dtype, (3,))])
    (tmp_path / "x").write_bytes(file_of(planned))
    with safe_open(tmp_path / "x", "np") as file:
        assert file.get_slice("x").get_dtype() == dtype
        assert file.get_slice("x").get_shape() == [6 if dtype == "F4" else 3]


def test_stock_dcp_finds_global_shapes_and_chunks(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    whole = [chunk("weight", "F32", (10, 3), at=at, rows=2) for at in (0, 6)]
    rest = [chunk("weight", "F32", (10, 3), at=at, rows=2) for at in (2, 4, 8)]
    for rank, chunks in enumerate((whole, [*rest, chunk("step", "I64", ())])):
        for planned in plan_files(rank, chunks):
            (tmp_path / planned.file).write_bytes(file_of(planned))
    metadata = checkpoint.HuggingFaceStorageReader(str(tmp_path)).read_metadata()
    weight = metadata.state_dict_metadata["weight"]
    assert tuple(weight.size) == (10, 3)
    assert sorted(tuple(found.offsets) for found in weight.chunks) == [(at, 0) for at in (0, 2, 4, 6, 8)]
    assert {tuple(found.sizes) for found in weight.chunks} == {(2, 3)}
    assert tuple(metadata.state_dict_metadata["step"].size) == ()


@pytest.mark.parametrize(
    "bad",
    [
        {"name": ""},
        {"name": "__metadata__"},
        {"name": "x" * 5000},
        {"dtype": "F31"},
        {"shape": (4,)},
        {"shape": (4, -3)},
        {"shape": (4, 2**63)},
        {"offsets": (0,)},
        {"offsets": (-1, 0)},
        {"offsets": (3, 0)},
        {"sizes": (2, 4)},
        {"sizes": (2, -1)},
        {"sizes": (True, 1)},
    ],
)
def test_impossible_chunks(bad: dict[str, Any]) -> None:
    good = {"name": "w", "dtype": "F32", "shape": (4, 3), "offsets": (2, 0), "sizes": (2, 3)}
    assert Chunk(**good).chunk_bytes == 24  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tensor|chunk"):
        Chunk(**(good | bad))


def test_place_must_fit_the_chunk() -> None:
    PlacedChunk(chunk("w"), 4096, 4112)
    for begin, end in ((4096, 4111), (4096, 4113), (-16, 0), (4112, 4096)):
        with pytest.raises(ValueError, match="16 bytes of F32"):
            PlacedChunk(chunk("w"), begin, end)


def test_layout_must_be_whole() -> None:
    (planned,) = plan_files(0, [chunk("a"), chunk("b")])
    a, b = planned.chunks
    moved = PlacedChunk(b.chunk, b.begin + 16, b.end + 16)
    for changes, words in (
        ({"file": "other"}, "not a shard file"),
        ({"header": planned.header + b" "}, "4097 bytes"),
        ({"header": planned.header * 2}, "header ends at 8192"),
        ({"chunks": ()}, "no chunk"),
        ({"chunks": (a, moved)}, "hole"),
        ({"chunks": (a, a)}, "overlap"),
        ({"chunks": (b, a)}, "multiple of 4096"),
        ({"chunks": (a,)}, "the file at 4128"),
        ({"file_bytes": 4129}, "the file at 4129"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(planned, **changes)  # type: ignore[arg-type]


def test_header_too_large_for_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "MAX_HEADER_BYTES", 10_000)
    with pytest.raises(StateError, match="1000 tensors need a safetensors header of"):
        plan_files(0, [chunk(f"layer.{number}") for number in range(1000)])


def raw_file(
    document: object, data_bytes: int = 16, *, length: int | None = None, text: bytes | None = None
) -> bytes:
    text = json.dumps(document).encode() if text is None else text
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data_bytes)


GOOD = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def test_header_of_another_writer() -> None:
    """Not canonical, not padded, with and without metadata."""
    raw = raw_file({"b": {**GOOD, "data_offsets": [16, 32]}, "__metadata__": {"x": "y"}, "a": GOOD}, 32)
    entries = parse_header(raw, len(raw))
    begin = len(raw) - 32
    assert entries == {"a": ("F32", (4,), begin, begin + 16), "b": ("F32", (4,), begin + 16, begin + 32)}


HOSTILE = {
    "no bytes": b"",
    "half a length": b"\x01\x00\x00",
    "length only": struct.pack("<Q", 2),
    "huge length": raw_file({"a": GOOD}, length=2**64 - 1),
    "length above the limit": raw_file({"a": GOOD}, length=100_000_001),
    "length beyond the file": raw_file({"a": GOOD}, length=1000),
    "not JSON": raw_file(None, text=b"\x00" * 20),
    "not an object": raw_file([1]),
    "deep": raw_file(None, text=b'{"a":' * 1000 + b"1" + b"}" * 1000),
    "twice": raw_file(None, text=b'{"a":%s,"a":%s}' % ((json.dumps(GOOD).encode(),) * 2)),
    "no entries": raw_file({}),
    "entry is a list": raw_file({"a": [GOOD]}),
    "no dtype": raw_file({"a": {"shape": [4], "data_offsets": [0, 16]}}),
    "unknown dtype": raw_file({"a": {**GOOD, "dtype": "F6_E2M3"}}),
    "dtype is a list": raw_file({"a": {**GOOD, "dtype": ["F32"]}}),
    "unknown field": raw_file({"a": {**GOOD, "code": "x"}}),
    "shape too large": raw_file({"a": {**GOOD, "shape": [5]}}),
    "shape overflows": raw_file({"a": {**GOOD, "shape": [2**62, 2**62, 4]}}),
    "shape with zero and giants": raw_file({"a": {**GOOD, "shape": [0, 2**62]}}),
    "shape negative": raw_file({"a": {**GOOD, "shape": [-2, -2]}}),
    "shape of floats": raw_file({"a": {**GOOD, "shape": [4.0]}}),
    "shape of bools": raw_file({"a": {**GOOD, "shape": [True, 4]}}),
    "too many dimensions": raw_file({"a": {**GOOD, "shape": [1] * 64 + [4]}}),
    "range reversed": raw_file({"a": {**GOOD, "data_offsets": [16, 0]}}),
    "range of one": raw_file({"a": {**GOOD, "data_offsets": [16]}}),
    "range of three": raw_file({"a": {**GOOD, "data_offsets": [0, 16, 32]}}),
    "range beyond the file": raw_file({"a": {**GOOD, "data_offsets": [16, 32]}}),
    "hole": raw_file({"a": GOOD, "b": {**GOOD, "data_offsets": [17, 33]}}, 33),
    "overlap": raw_file({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}, 24),
    "same range": raw_file({"a": GOOD, "b": GOOD}, 32),
    "data left over": raw_file({"a": GOOD}, 17),
    "data missing": raw_file({"a": GOOD}, 15),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(raw: bytes) -> None:
    with pytest.raises(DamagedError):
        parse_header(raw, len(raw))


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_as_header(raw: bytes, file_bytes: int) -> None:
    for candidate in (raw, struct.pack("<Q", len(raw)) + raw):
        try:
            parse_header(candidate, file_bytes)
        except DamagedError:
            continue
        assert file_bytes > 8


def test_header_length_is_checked_before_more_is_read() -> None:
    raw = raw_file({"a": GOOD})
    assert header_bytes(raw[:8], len(raw)) == len(raw) - 16
    with pytest.raises(DamagedError, match="99999999999"):
        header_bytes(struct.pack("<Q", 99_999_999_999), 10**12)


def test_header_cut_short() -> None:
    raw = raw_file({"a": GOOD})
    with pytest.raises(DamagedError, match="ends after 20 bytes"):
        parse_header(raw[:20], len(raw))


def test_sizes_agree_with_the_table() -> None:
    for dtype in ITEMSIZES:
        item = chunk("x", dtype, (7, 3))
        assert item.chunk_bytes == math.prod((7, 3)) * itemsize(dtype)
    with pytest.raises(DamagedError, match="F6_E2M3"):
        itemsize("F6_E2M3")


def test_f4_is_counted_in_values_by_headers_alone() -> None:
    (planned,) = plan_files(0, [chunk("x", "F4", (2, 3))])
    entry = parse_header(file_of(planned), planned.file_bytes)["x"]
    assert (entry.sizes, entry.end - entry.begin) == ((2, 3), 6)
    text = planned.header[8:].decode().rstrip()
    assert json.loads(text)["x"]["shape"] == [2, 6]
    for bad in ([2, 5], []):
        broken = {"x": {"dtype": "F4", "shape": bad, "data_offsets": [0, 6]}}
        raw = json.dumps(broken).encode().ljust(64)
        with pytest.raises(DamagedError, match="whole bytes"):
            parse_header(struct.pack("<Q", 64) + raw + bytes(6), 78)
    with pytest.raises(ValueError, match="a scalar of F4"):
        chunk("x", "F4", ())
