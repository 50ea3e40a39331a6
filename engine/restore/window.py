"""Load one window of a file: every block verified, every wanted byte where it belongs.

Two ways. What the page cache holds is read straight into the destinations, only the rest of the window's
blocks into the thread's buffer: one pass over memory less. What has to come from the disk is read into the
buffer, which lies on a page boundary, so that direct reads can fill it, and copied out. Blocks are digested
on their way: a bad one fails the restore before it reports success, but not before its bytes were copied.
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

    addresses: of each slice the destination's memory, 0 where it cannot be filled as plain bytes.
    turns: how many of them may be waiting for the storage at a time.
    waited: set once one had to.
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
        """Read, verify, and put in place. `buffer` has room for the window.

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
        """Whether the whole window was in the page cache: `chosen` are in place then, the rest in `raw`."""
        places = self._places(window, chosen, raw.data_ptr())
        block_bytes = self.files[name].block_bytes
        count, found = self.readers[name].read_at_hand(window.begin, places, block_bytes)
        if count != window.end - window.begin:
            return False
        self._verify(name, window, found)
        return True

    def _copy_direct(self, name: str, window: Window, chosen: list[Piece], raw: torch.Tensor) -> list[Piece]:
        """Verify what was read. Returns what was copied in the same pass: `chosen`, if the loops in C can."""
        block_bytes = self.files[name].block_bytes
        if kernels.library is None or not chosen:
            self._verify(name, window, block_digests(_bytes_of(raw), block_bytes))
            return []
        places = self._places(window, chosen, None)
        self._verify(name, window, kernels.scatter(_bytes_of(raw), places, block_bytes))
        return chosen

    def _places(self, window: Window, chosen: Sequence[Piece], rest: int | None) -> list[Place]:
        """The destinations of `chosen`, in file order, and between them places for the window's other bytes.

        rest: the address of memory for the whole window, where those belong; None: nowhere.
        """
        places: list[Place] = []
        at = window.begin
        for piece in chosen:
            if at < piece.begin:
                places.append((0 if rest is None else rest + at - window.begin, piece.begin - at))
            # Worked out, not asked of a view: a window may hold thousands of small tensors.
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
                    f"has changed: its digest is {found[at : at + 8].hex()}, {want.hex()} was written"
                )

    def _copy_out(self, piece: Piece, window: Window, raw: torch.Tensor) -> None:
        copy_out(piece, raw[piece.begin - window.begin : piece.end - window.begin], self.slices[piece.slice])


def address_of(tensor: torch.Tensor) -> int:
    """Where a tensor's bytes are in host memory, as they are saved; 0 where they are not."""
    plain = tensor.device.type == "cpu" and not (tensor.is_conj() or tensor.is_neg())
    return tensor.data_ptr() if plain else 0


def copy_out(piece: Piece, raw: torch.Tensor, item: Slice) -> None:
    """Copy the wanted part of a piece, whose bytes are `raw`, into its destination."""
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
