"""Digests: xxh3 per fixed block, so that a slice is verified without reading the whole file.

A file's digests are packed as 8 bytes per block, big-endian, in file order; the last block may be short. The
file's own digest is the xxh3-128 of the packed digests. They detect damage; they do not authenticate.

Measured over 1.49 GB on one core: 0.11 s at 64 KiB blocks. The compiled loop releases the GIL throughout; the
xxhash package holds it for each block of this size (about 5 us).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import xxhash

from engine.errors import DamagedError
from engine.native import kernels

BLOCK_BYTES = 65536
"""Block size of new files. Readers take the size from the index."""

DIGEST_BYTES = 8
"""Size of one packed block digest."""

MAX_BLOCK_BYTES = 1 << 30
"""Largest block size that a reader accepts: a whole block must fit in memory."""

Buffer = bytes | bytearray | memoryview


def block_count(file_bytes: int, block_bytes: int = BLOCK_BYTES) -> int:
    """Number of blocks in a file of that size; the last may be short."""
    return -(-file_bytes // block_bytes)


def block_digests(view: Buffer, block_bytes: int = BLOCK_BYTES) -> bytes:
    """Packed digests of every block of `view` (bytes-like, contiguous): 8 bytes per block.

    The results for windows of a file may be joined if each window begins at a multiple of `block_bytes`.
    """
    flat = memoryview(view).cast("B")
    if kernels.library is not None and len(flat) > block_bytes:
        return kernels.block_digests(flat, block_bytes)
    digest = xxhash.xxh3_64_digest
    return b"".join([digest(flat[begin : begin + block_bytes]) for begin in range(0, len(flat), block_bytes)])


class BlockDigests:
    """Digests a file's blocks from its bytes, given in order in pieces of any size."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self._block_bytes = block_bytes
        self._open_block, self._open_bytes = xxhash.xxh3_64(), 0

    def update(self, view: Buffer) -> bytes:
        """Add the file's next bytes; returns the digests of the blocks that they complete."""
        flat, block_bytes = memoryview(view).cast("B"), self._block_bytes
        digests, begin = b"", 0
        if self._open_bytes:
            begin = min(len(flat), block_bytes - self._open_bytes)
            self._open_block.update(flat[:begin])
            self._open_bytes += begin
            if self._open_bytes == block_bytes:
                digests = self.finish()
        whole = (len(flat) - begin) // block_bytes * block_bytes
        if whole:
            digests += block_digests(flat[begin : begin + whole], block_bytes)
        if begin + whole < len(flat):
            self._open_block.update(flat[begin + whole :])
            self._open_bytes += len(flat) - begin - whole
        return digests

    def finish(self) -> bytes:
        """The digest of the last, short block; empty if there is none."""
        if not self._open_bytes:
            return b""
        digest = self._open_block.digest()
        self._open_block, self._open_bytes = xxhash.xxh3_64(), 0
        return digest


def scattered_digests(views: Sequence[Buffer], block_bytes: int = BLOCK_BYTES) -> bytes:
    """`block_digests` of the views' concatenation, without joining them."""
    blocks = BlockDigests(block_bytes)
    return b"".join([*(blocks.update(view) for view in views), blocks.finish()])


def combine(packed: bytes) -> str:
    """The digest of a whole file from its packed block digests: 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(packed)


def bytes_digest(raw: Buffer) -> str:
    """The digest of a small document (manifest, index): 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(raw)


def pack(packed: bytes) -> str:
    """Packed digests as text for JSON."""
    return base64.b64encode(packed).decode("ascii")


def unpack(text: str, count: int) -> bytes:
    """Packed digests from text. DamagedError unless it encodes exactly `count` digests, canonically."""
    try:
        packed = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise DamagedError("the block digests are not base64 text") from None
    if len(packed) != count * DIGEST_BYTES or pack(packed) != text:
        raise DamagedError(f"the block digests do not encode {count} blocks")
    return packed


def expected_digest(packed: bytes, index: int) -> bytes:
    """The 8 bytes recorded for block `index`. IndexError outside the file."""
    begin = index * DIGEST_BYTES
    if not 0 <= begin < len(packed):
        raise IndexError(f"block {index} of a file of {len(packed) // DIGEST_BYTES} blocks")
    return packed[begin : begin + DIGEST_BYTES]


def first_bad_block(found: bytes, first_index: int, packed: bytes) -> int | None:
    """The first block that differs among those digested from `first_index` on, or None. Pure."""
    begin = first_index * DIGEST_BYTES
    expected = packed[begin : begin + len(found)]
    if found == expected:
        return None
    same = (
        found[at : at + DIGEST_BYTES] == expected[at : at + DIGEST_BYTES]
        for at in range(0, len(found), DIGEST_BYTES)
    )
    return first_index + list(same).index(False)
