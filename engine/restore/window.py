"""Load one window of a file: verify every block and put the bytes into their destinations.

A window in the page cache is read directly into the destinations, and only the rest of its blocks into the
thread's buffer, which saves a pass over memory. A window on the disk is read into the buffer, which is
page-aligned for direct reads, and copied out. Blocks are digested on the way: a damaged one fails the restore
before it reports success, but after its bytes were copied.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.errors import DamagedError
from engine.format.digest import block_digests, expected_digest
from engine.format.index import ShardFile
from engine.native import kernels
from engine.native.kernels import Place
from engine.restore.load_plan import Slice
from engine.restore.pieces import Piece, Window, direct_pieces
from engine.state.tensor_format import bytes_of
from engine.storage.base import Reader, Storage


@dataclass(frozen=True, slots=True)
class WindowLoader:
    """Loads windows; shared by the reader threads.

    addresses: the memory of each slice's destination; 0 if it cannot be filled as plain bytes.
    turns: bounds how many threads wait for the storage at a time.
    waited: set once a thread had to wait.
    """

    storage: Storage
    directory: str
    slices: Sequence[Slice]
    addresses: Sequence[int]
    files: Mapping[str, ShardFile]
    readers: Mapping[str, Reader]
    turns: threading.Semaphore
    waited: threading.Event

    def load(self, name: str, window: Window, buffer: torch.Tensor) -> None:
        """Read, verify and copy out. `buffer` has room for the window.

        Raises: DamagedError naming file, block, expected and found digest; StorageError.
        """
        raw = buffer[: window.end - window.begin]
        chosen = direct_pieces(window.pieces, lambda piece: self.addresses[piece.slice] != 0)
        with self.turns:
            cached = bool(chosen) and self._read_cached(name, window, chosen, raw)
            if not cached:
                self.waited.set()
                self.readers[name].read_into(window.begin, _bytes_of(raw))
        if not cached:
            chosen = self._copy_direct(name, window, chosen, raw)
        if len(chosen) == len(window.pieces):
            return
        placed = {id(piece) for piece in chosen}
        for piece in window.pieces:
            if id(piece) not in placed:
                self._copy_out(piece, window, raw)

    def _read_cached(self, name: str, window: Window, chosen: Sequence[Piece], raw: torch.Tensor) -> bool:
        """Whether the whole window was in the page cache: then `chosen` are filled and `raw` has the rest."""
        places = self._places(window, chosen, raw.data_ptr())
        block_bytes = self.files[name].block_bytes
        count, found = self.readers[name].read_cached(window.begin, places, block_bytes)
        if count != window.end - window.begin:
            return False
        self._verify(name, window, found)
        return True

    def _copy_direct(self, name: str, window: Window, chosen: list[Piece], raw: torch.Tensor) -> list[Piece]:
        """Verify what was read. Returns the pieces copied in the same pass: `chosen`, or none without C."""
        block_bytes = self.files[name].block_bytes
        if kernels.library is None or not chosen:
            self._verify(name, window, block_digests(_bytes_of(raw), block_bytes))
            return []
        places = self._places(window, chosen, None)
        self._verify(name, window, kernels.scatter(_bytes_of(raw), places, block_bytes))
        return chosen

    def _places(self, window: Window, chosen: Sequence[Piece], rest: int | None) -> list[Place]:
        """The destinations of `chosen` in file order, and between them those of the window's other bytes.

        rest: the address of memory for the whole window, for the other bytes; None: they are dropped.
        """
        places: list[Place] = []
        at = window.begin
        for piece in chosen:
            if at < piece.begin:
                places.append((0 if rest is None else rest + at - window.begin, piece.begin - at))
            # Computed, not taken from a view: a window may hold thousands of small tensors.
            places.append((self.addresses[piece.slice] + piece.to_row, piece.end - piece.begin))
            at = piece.end
        if at < window.end:
            places.append((0 if rest is None else rest + at - window.begin, window.end - at))
        return places

    def _verify(self, name: str, window: Window, found: bytes) -> None:
        """Compare the digests of the window's blocks with those that were written."""
        shard = self.files[name]
        first = window.begin // shard.block_bytes
        if found == shard.digests[first * 8 : first * 8 + len(found)]:
            return
        for block in range(first, first + len(found) // 8):
            at = (block - first) * 8
            want = expected_digest(shard.digests, block)
            if found[at : at + 8] != want:
                begin, end = block * shard.block_bytes, (block + 1) * shard.block_bytes
                raise DamagedError(
                    f"{self.storage.describe(f'{self.directory}/{shard.file}')}: block {block} (bytes "
                    f"{begin:,} to {min(shard.file_bytes, end):,}) "
                    f"has changed: its digest is {found[at : at + 8].hex()}, not {want.hex()}"
                )

    def _copy_out(self, piece: Piece, window: Window, raw: torch.Tensor) -> None:
        copy_out(piece, raw[piece.begin - window.begin : piece.end - window.begin], self.slices[piece.slice])


def address_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's bytes, as they are saved, in host memory; 0 if they are not there."""
    plain = tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())
    return tensor.data_ptr() if plain else 0


def copy_out(piece: Piece, raw: torch.Tensor, item: Slice) -> None:
    """Copy the part that the slice needs of a piece, whose bytes are `raw`, into its destination."""
    if piece.flat:
        _target(piece, item).copy_(raw)
        return
    rows = raw.view(item.to.dtype).view(piece.rows, *piece.row_sizes)
    for dim, (offset, length) in enumerate(zip(piece.row_offsets, piece.row_lengths, strict=True), start=1):
        rows = rows.narrow(dim, offset, length)
    to = item.to.view(1) if item.to.ndim == 0 else item.to[piece.to_index]
    to[piece.to_row : piece.to_row + piece.rows].copy_(rows)


def _target(piece: Piece, item: Slice) -> torch.Tensor:
    """The bytes of the destination that a flat piece fills."""
    return bytes_of(item.to)[piece.to_row : piece.to_row + piece.end - piece.begin]


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.numpy())  # type: ignore[arg-type]
