"""Block digests: known values, every block checked by itself, every changed bit noticed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DamagedError
from engine.format import digest

DATA = bytes(range(256)) * 40  # 10,240 bytes


def test_known_values() -> None:
    """From xxHash's own test vectors: what is on disk must stay readable for ever."""
    assert digest.block_digests(b"a").hex() == "e6c632b61e964e1f"
    assert digest.bytes_digest(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest.combine(b"") == "99aa06d3014798d86001c324468d497f"
    assert digest.BLOCK_BYTES == 65536


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 10_240])
def test_one_digest_a_block(size: int) -> None:
    packed = digest.block_digests(DATA[:size], 4096)
    blocks = [DATA[:size][begin : begin + 4096] for begin in range(0, size, 4096)]
    assert packed == b"".join(digest.block_digests(block) for block in blocks)
    assert len(packed) == 8 * digest.block_count(size, 4096)


def test_windows_join() -> None:
    whole = digest.block_digests(DATA, 1024)
    assert digest.block_digests(DATA[:4096], 1024) + digest.block_digests(DATA[4096:], 1024) == whole


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, lambda data: memoryview(data).cast("I")])
def test_any_buffer(wrap: type) -> None:
    assert digest.block_digests(wrap(DATA), 4096) == digest.block_digests(DATA, 4096)


@given(st.integers(0, 8 * len(DATA) - 1))
def test_any_changed_bit_is_noticed_in_its_block(bit: int) -> None:
    packed = digest.block_digests(DATA, 4096)
    damaged = bytearray(DATA)
    damaged[bit // 8] ^= 1 << bit % 8
    bad = bit // 8 // 4096
    for index in range(3):
        block = memoryview(damaged)[index * 4096 : (index + 1) * 4096]
        same = digest.block_digests(block, 4096) == digest.expected_digest(packed, index)
        assert same is (index != bad)
    assert digest.first_bad_block(digest.block_digests(damaged, 4096), 0, packed) == bad
    assert digest.combine(digest.block_digests(damaged, 4096)) != digest.combine(packed)


def test_first_bad_block_in_the_middle_of_a_file() -> None:
    packed = digest.block_digests(DATA, 1024)
    part = bytearray(DATA[3072:8192])
    assert digest.first_bad_block(digest.block_digests(part, 1024), 3, packed) is None
    part[2048] ^= 1
    assert digest.first_bad_block(digest.block_digests(part, 1024), 3, packed) == 5


def test_more_blocks_than_were_recorded() -> None:
    packed = digest.block_digests(DATA[:4096], 1024)
    assert digest.first_bad_block(digest.block_digests(DATA, 1024), 0, packed) == 4


@pytest.mark.parametrize("index", [-1, 3])
def test_block_outside_the_file(index: int) -> None:
    with pytest.raises(IndexError, match="3 blocks"):
        digest.expected_digest(digest.block_digests(DATA, 4096), index)


@pytest.mark.parametrize("count", range(5))
def test_text_round_trip(count: int) -> None:
    packed = digest.block_digests(DATA[: count * 1024], 1024)
    assert digest.unpack(digest.pack(packed), count) == packed


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 1),
        ("A" * 12, 2),
        ("A" * 12, 0),
        ("A" * 11 + "=", 2),
        ("AAAAAAAAAA==", 1),
        ("AAAAAAAAAAB=", 1),  # bits that no digest uses
        ("AAAAAAAAAA\n=", 1),
        ("AAAAAAAA-_A=", 1),
        ("ÄAAAAAAAAAA=", 1),
        ("", 10**15),
    ],
)
def test_text_that_is_not_so_many_digests(text: str, count: int) -> None:
    with pytest.raises(DamagedError):
        digest.unpack(text, count)


@pytest.mark.parametrize(
    ("size", "block", "expected"), [(0, 10, 0), (1, 10, 1), (10, 10, 1), (11, 10, 2), (2**62, 65536, 2**46)]
)
def test_block_count(size: int, block: int, expected: int) -> None:
    assert digest.block_count(size, block) == expected


@given(st.lists(st.binary(max_size=50), max_size=8), st.sampled_from([1, 7, 16, 64]))
def test_scattered_bytes_have_the_digests_of_the_whole(parts: list[bytes], block_bytes: int) -> None:
    assert digest.scattered_digests(parts, block_bytes) == digest.block_digests(b"".join(parts), block_bytes)


@given(st.lists(st.integers(0, 9000), max_size=8), st.sampled_from([1, 1000, 4096, 70_000]))
def test_digests_of_pieces_are_those_of_the_whole(cuts: list[int], block_bytes: int) -> None:
    blocks, packed, begin = digest.BlockDigests(block_bytes), b"", 0
    for end in [*sorted(min(cut, len(DATA)) for cut in cuts), len(DATA)]:
        packed += blocks.update(DATA[begin:end])
        assert len(packed) == end // block_bytes * digest.DIGEST_BYTES, "a block is digested when it is whole"
        begin = end
    assert packed + blocks.finish() == digest.block_digests(DATA, block_bytes)
    assert blocks.finish() == b""
