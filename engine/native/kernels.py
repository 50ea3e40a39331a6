"""The compiled loops: copies and reads past the caches that digest what they move, and digests alone.

Called through ctypes, so that building them takes a C compiler and not Python's headers as well.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import chain
from pathlib import Path

Buffer = bytes | bytearray | memoryview

Run = tuple[int, int, int]
"""(address to copy to, address to copy from, bytes)."""

Place = tuple[int, int]
"""(address, bytes) of memory to fill, which the caller keeps where it is. Address 0: filled nowhere."""

SOURCE_VERSION = 4
"""The version that `holdfast_version` in kernels.c returns."""

_DIGEST_BYTES = 8


def load(directory: Path) -> tuple[ctypes.CDLL | None, str]:
    """The fastest library in `directory` that this processor runs, or None and why there is none."""
    found, reason = _open(directory, "_kernels")
    if found is not None and found.holdfast_runs_avx2():
        wide, _ = _open(directory, "_kernels_avx2")
        return wide or found, ""
    return found, reason


def _open(directory: Path, name: str) -> tuple[ctypes.CDLL | None, str]:
    """One library, or None and the reason: it was not built, or was built from other source."""
    built = [path for suffix in EXTENSION_SUFFIXES if (path := directory / f"{name}{suffix}").exists()]
    if not built:
        return None, "they were not built: install Holdfast again where there is a C compiler"
    try:
        found = ctypes.CDLL(str(built[0]))
        version = found.holdfast_version()
    except (OSError, AttributeError) as error:
        return None, f"{built[0]} cannot be loaded ({error}): install Holdfast again"
    if version != SOURCE_VERSION:
        return None, f"{built[0]} was built from other source (version {version}): install Holdfast again"
    _declare(found)
    return found, ""


def _declare(found: ctypes.CDLL) -> None:
    pointer, size, number = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int
    found.holdfast_fill.argtypes = (
        *(pointer, size, size, size),
        *(pointer, ctypes.c_size_t, size, number, pointer),
    )
    found.holdfast_fill.restype = None
    found.holdfast_block_digests.argtypes = (pointer, ctypes.c_size_t, ctypes.c_size_t, pointer)
    found.holdfast_block_digests.restype = None
    found.holdfast_scatter.argtypes = (pointer, pointer, size, size, pointer)
    found.holdfast_scatter.restype = None
    found.holdfast_read_at_hand.argtypes = (number, size, pointer, size, size, pointer)
    found.holdfast_read_at_hand.restype = ctypes.c_int64


library, missing_because = load(Path(__file__).parent)
"""The library, or None; then why."""


def fill(
    address: int,
    file_bytes: int,
    begin: int,
    end: int,
    runs: Sequence[Run],
    block_bytes: int,
    threads: int,
    digests: bytearray,
) -> None:
    """Make bytes [begin, end) of a file in memory what the runs say; digest each block that is whole then.

    Only with `library`. What lies between the runs stays as it is. `begin` is a multiple of `block_bytes`,
    runs are in the order of their destinations, and `digests` has 8 bytes for each block of the file.
    The memory has to be there, and no destination may overlap anything else: nothing can check that.
    """
    assert library is not None
    assert begin % block_bytes == 0 <= begin <= end <= file_bytes
    assert len(digests) == -(-file_bytes // block_bytes) * _DIGEST_BYTES
    assert threads > 0
    if begin == end:
        return
    table = array("Q", chain.from_iterable(runs))
    where = ctypes.addressof(ctypes.c_char.from_buffer(digests))
    library.holdfast_fill(
        *(address, file_bytes, begin, end),
        *(table.buffer_info()[0], len(runs), block_bytes, threads, where),
    )


def block_digests(view: Buffer, block_bytes: int) -> bytes:
    """xxh3-64 of each block of a contiguous view, 8 big-endian bytes each, joined. Only with `library`."""
    assert library is not None
    assert block_bytes > 0
    if not len(view):
        return b""
    # ctypes gives no address of memory that must not be written. Programs that only list load no numpy.
    import numpy as np

    source = np.frombuffer(view, np.uint8)
    digests = ctypes.create_string_buffer(-(-source.size // block_bytes) * _DIGEST_BYTES)
    library.holdfast_block_digests(source.ctypes.data, source.size, block_bytes, digests)
    return digests.raw


def scatter(view: memoryview, places: Sequence[Place], block_bytes: int) -> bytes:
    """Copy a contiguous view into places, one after the other; returns its digests as `block_digests` does.

    Only with `library`. Together the places are as long as the view, and none overlaps it.
    """
    assert library is not None
    assert block_bytes > 0
    table, total_bytes = _table(places)
    assert total_bytes == len(view)
    digests = ctypes.create_string_buffer(-(-total_bytes // block_bytes) * _DIGEST_BYTES)
    if total_bytes:
        source, _ = place_of(view)
        library.holdfast_scatter(source, table.buffer_info()[0], total_bytes, block_bytes, digests)
    return digests.raw


def read_at_hand(fd: int, offset: int, places: Sequence[Place], block_bytes: int) -> tuple[int, bytes]:
    """Fill places, one after the other, from byte `offset` with what the page cache holds.

    Only with `library`. Returns the bytes filled, all or whole blocks, and their digests, as `block_digests`
    of the joined places gives them.
    Raises: OSError; EOPNOTSUPP where reads cannot be told not to wait, and for blocks above 256 KiB.
    """
    assert library is not None
    assert block_bytes > 0
    table, total_bytes = _table(places)
    digests = ctypes.create_string_buffer(-(-total_bytes // block_bytes) * _DIGEST_BYTES)
    count = library.holdfast_read_at_hand(
        fd, offset, table.buffer_info()[0], total_bytes, block_bytes, digests
    )
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return count, digests.raw[: -(-count // block_bytes) * _DIGEST_BYTES]


def place_of(view: memoryview) -> Place:
    """Where the bytes of a writable contiguous view are."""
    return (ctypes.addressof(ctypes.c_char.from_buffer(view)) if len(view) else 0), len(view)


def view_of(place: Place) -> memoryview:
    """The memory of a place that is not null."""
    address, size = place
    assert address
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")


def _table(places: Sequence[Place]) -> tuple[array[int], int]:
    """The places that are not empty, as the loops take them, and the sum of their bytes."""
    table: array[int] = array("Q")
    total_bytes = 0
    for place in places:
        if place[1]:
            table.extend(place)
            total_bytes += place[1]
    return table, total_bytes
