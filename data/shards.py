"""Token shards on disk: reads three common formats, and writes the first.

    llm.c, modded-nanogpt   .bin: 256 int32 (magic 20240520, version 1, token count, zeros), then uint16
    nanoGPT                 .bin: uint16 tokens, no header
    build-nanogpt           .npy: a one-dimensional array of integers

All are little-endian. A `.bin` whose first word is llm.c's magic has the header. Headerless GPT-2 tokens
cannot start with it by chance: the magic's low half is 55432, above the vocabulary.

Sources: llm.c dev/data/data_common.py `write_datafile`, nanoGPT data/*/prepare.py, build-nanogpt fineweb.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data.errors import ShardError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
TOKEN_BYTES = 2
MAX_SHARD_TOKENS = 2**31 - 1
"""The header stores the token count as an int32."""

# Other llm.c files that may be in the same folder but are not GPT-2 tokens.
_OTHER_MAGICS = {20240522: "an llm.c evaluation file", 20240801: "an llm.c file of Llama 3 tokens"}


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard whose size has been checked: `tokens` items of `dtype`, starting at `offset_bytes`."""

    path: Path
    tokens: int
    offset_bytes: int
    dtype: str

    def __post_init__(self) -> None:
        if self.tokens <= 0:
            raise ShardError(f"{self.path} holds no tokens: remove it or prepare the dataset again")

    @property
    def name(self) -> str:
        return self.path.name


def inspect_shard(path: Path) -> Shard:
    """Read a shard's header and check it against the file's size. Raises ShardError."""
    try:
        return _inspect_npy(path) if path.suffix == ".npy" else _inspect_bin(path)
    except OSError as error:
        raise ShardError(f"cannot read shard {path}: {error.strerror or error}") from error


def open_tokens(shard: Shard) -> npt.NDArray[np.integer[Any]]:
    """The shard's tokens, one-dimensional, read-only and memory-mapped. Raises ShardError.

    Checks the size again: reading a mapping beyond the end of a shrunken file would kill the process.
    """
    dtype = np.dtype(shard.dtype)
    needed = shard.offset_bytes + shard.tokens * dtype.itemsize
    try:
        with open(shard.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < needed:
                raise ShardError(
                    f"shard {shard.path} has shrunk to {size:,} bytes, but its {shard.tokens:,} tokens need "
                    f"{needed:,}: it was truncated while in use; restore it"
                )
            return np.memmap(file, dtype=dtype, mode="r", offset=shard.offset_bytes, shape=(shard.tokens,))
    except OSError as error:
        raise ShardError(f"cannot map shard {shard.path}: {error.strerror or error}") from error


def _inspect_bin(path: Path) -> Shard:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(HEADER_BYTES)
    magic = int.from_bytes(head[:4], "little")
    if magic == MAGIC:
        return _check_header(path, head, size)
    if magic in _OTHER_MAGICS:
        raise ShardError(
            f"{path} is {_OTHER_MAGICS[magic]}, not GPT-2 tokens: move it out of the dataset folder"
        )
    if size % TOKEN_BYTES:
        raise ShardError(
            f"shard {path} has an odd number of bytes ({size:,}), so it is neither uint16 tokens nor a shard "
            "with a header: it is truncated or in another format"
        )
    return Shard(path, tokens=size // TOKEN_BYTES, offset_bytes=0, dtype="<u2")


def _check_header(path: Path, head: bytes, size: int) -> Shard:
    if len(head) < HEADER_BYTES:
        raise ShardError(f"shard {path} is truncated: {size:,} bytes, its header alone has {HEADER_BYTES:,}")
    _, version, tokens = (int(word) for word in np.frombuffer(head, dtype="<i4", count=3))
    if version != VERSION:
        raise ShardError(
            f"shard {path} has format version {version}; version {VERSION} (uint16 tokens) is supported"
        )
    expected = HEADER_BYTES + tokens * TOKEN_BYTES
    if size != expected:
        raise ShardError(
            f"shard {path} is {'truncated' if size < expected else 'damaged'}: its header says {tokens:,} "
            f"tokens ({expected:,} bytes), but the file has {size:,} bytes; download or prepare it again"
        )
    return Shard(path, tokens=tokens, offset_bytes=HEADER_BYTES, dtype="<u2")


def _inspect_npy(path: Path) -> Shard:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, TypeError) as error:
        raise ShardError(
            f"shard {path} is not a readable .npy array: {error}; download or prepare it again"
        ) from error
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "ui":
        shape, kind = getattr(array, "shape", "?"), getattr(array, "dtype", "?")
        raise ShardError(
            f"shard {path} holds an array of shape {shape} and type {kind}, not a row of integer tokens"
        )
    return Shard(path, tokens=array.shape[0], offset_bytes=int(array.offset), dtype=array.dtype.str)


class ShardWriter:
    """Writes tokens as `<split>_000000.bin`, `<split>_000001.bin`, ... of at most `shard_tokens` each.

    A shard becomes valid when it is full or the writer closes: until then its header says 0 tokens, which
    readers refuse. Finished shards are durable (fsync).
    """

    def __init__(self, directory: Path, split: str, shard_tokens: int) -> None:
        if not 0 < shard_tokens <= MAX_SHARD_TOKENS:
            raise ShardError(f"a shard holds 1 to {MAX_SHARD_TOKENS:,} tokens, not {shard_tokens:,}")
        self.tokens = 0
        self.shards: list[Shard] = []
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._file_tokens = 0

    def append(self, tokens: npt.NDArray[np.uint16]) -> None:
        """Append one-dimensional `tokens`, starting new shards as they fill up."""
        while tokens.size:
            if self._file is None:
                self._open_next()
            assert self._file is not None
            part = tokens[: self._shard_tokens - self._file_tokens]
            self._file.write(part.astype("<u2", copy=False).tobytes())
            self._file_tokens += part.size
            self.tokens += part.size
            tokens = tokens[part.size :]
            if self._file_tokens == self._shard_tokens:
                self._finish()

    def close(self) -> None:
        """Finish the last shard."""
        if self._file is not None:
            self._finish()

    def abandon(self) -> None:
        """After an error: close the last shard and leave it unfinished."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_next(self) -> None:
        path = self._directory / f"{self._split}_{len(self.shards):06d}.bin"
        self._file = open(path, "xb", buffering=1 << 20)  # noqa: SIM115 - stays open between appends
        self._file.write(_header(0))
        self._file_tokens = 0

    def _finish(self) -> None:
        assert self._file is not None
        with self._file as file:
            file.seek(0)
            file.write(_header(self._file_tokens))
            file.flush()
            os.fsync(file.fileno())
            path = Path(file.name)
        self.shards.append(Shard(path, self._file_tokens, HEADER_BYTES, "<u2"))
        self._file = None


def take_tail(shards: Sequence[Shard], count: int) -> tuple[list[Shard], npt.NDArray[np.uint16]]:
    """Cut the last `count` tokens off the shards of a ShardWriter.

    Returns the shards that remain, shortened in place on disk, and the tokens cut off, in order.
    """
    remaining, taken = list(shards), []
    while count > 0 and remaining:
        shard = remaining.pop()
        part = min(count, shard.tokens)
        kept = shard.tokens - part
        taken.append(np.array(open_tokens(shard)[kept:], dtype=np.uint16))
        count -= part
        if not kept:
            shard.path.unlink()
            continue
        with open(shard.path, "r+b") as file:
            file.write(_header(kept))
            file.truncate(HEADER_BYTES + kept * TOKEN_BYTES)
            file.flush()
            os.fsync(file.fileno())
        remaining.append(Shard(shard.path, kept, HEADER_BYTES, "<u2"))
    return remaining, np.concatenate([*reversed(taken), np.empty(0, np.uint16)])


def _header(tokens: int) -> bytes:
    words = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    words[:3] = MAGIC, VERSION, tokens
    return words.tobytes()
