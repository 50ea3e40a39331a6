"""Buffers as the staging buffer hands them over, with contents that show where every byte came from."""

from __future__ import annotations

import functools
import mmap

from engine.storage.source import BufferSource, Source
from tests.support.sources import Hook, Hooked

PAGE = 4096


@functools.lru_cache(maxsize=4)
def pattern(size: int) -> bytes:
    """`size` bytes in which no two 4 KiB blocks are alike."""
    blocks = (number.to_bytes(8, "little") * (PAGE // 8) for number in range(-(-size // PAGE)))
    return b"".join(blocks)[:size]


def padded(data: bytes) -> memoryview:
    """`data` at a page boundary, followed by 0xEE up to the next one: padding must not reach a file."""
    rounded = max(-(-len(data) // PAGE), 1) * PAGE
    staging = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    staging[:] = data + b"\xee" * (rounded - len(data))
    return memoryview(staging)[: -(-len(data) // PAGE) * PAGE]


def source(data: bytes, before: Hook | None = None) -> Source:
    """A file with this content; `before(begin, end)` is called before each window."""
    whole = BufferSource(padded(data), len(data))
    return whole if before is None else Hooked(whole, before)
