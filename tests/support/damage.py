"""Change what is on disk, the way a bad disk or a careless hand would."""

from __future__ import annotations

from pathlib import Path


def flip_byte(path: Path, at: int = -1) -> None:
    """Flip one bit of one byte; negative positions count from the end."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def flip_first(path: Path, wanted: bytes) -> None:
    """Flip the byte after the first occurrence of `wanted`."""
    flip_byte(path, path.read_bytes().index(wanted) + len(wanted))
