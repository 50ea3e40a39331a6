"""Load one window of a file: every block verified, every wanted byte where it belongs.

Two ways. What the page cache holds is read straight into the destinations, only the rest of the window's
blocks into the thread's buffer, and is verified where it lies: one pass over memory less. What has to come
from the disk is read into the buffer, which lies on a page boundary, so that direct reads can fill it;
it is verified there and copied out. Either way a bad block fails the restore before it reports success.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.dcp.load import Slice
from engine.errors import DamagedError
from engine.format.digest import block_digests, expected_digest
from engine.format.index import ShardFile
from engine.restore.pieces import Piece, Window, straight
from engine.storage.base import Reader, Storage


@dataclass(frozen=True, slots=True)
class WindowLoader:
    """Loads windows; shared by the reader threads."""

    storage: Storage
    directory: str
    slices: Sequence[Slice]
    files: Mapping[str, ShardFile]
    readers: Mapping[str, Reader]

    def load(self, name: str, window: Window, buffer: torch.Tensor) -> None:
        """Read, verify, and put in place. `buffer` has room for the window.

        Raises: DamagedError naming file, block, expected and found digest; StorageError.
        """
        raw = buffer[: window.end - window.begin]
        if not self._load_straight(name, window, raw):
            view = _bytes_of(raw)
            self.readers[name].read_into(window.begin, view)
            self._verify(name, window, block_digests(view, self.files[name].block_bytes))
            for piece in window.pieces:
                self._copy_out(piece, window, raw)

    def _load_straight(self, name: str, window: Window, raw: torch.Tensor) -> bool:
        """Whether the whole window could be read from the page cache into its destinations."""
        chosen = straight(window.pieces, lambda piece: self.slices[piece.slice].to.device.type == "cpu")
        if not chosen:
            return False
        views, at, scratch = [], window.begin, _bytes_of(raw)
        for piece in chosen:
            if at < piece.begin:
                views.append(scratch[at - window.begin : piece.begin - window.begin])
            views.append(_bytes_of(_target(piece, self.slices[piece.slice])))
            at = piece.end
        if at < window.end:
            views.append(scratch[at - window.begin : window.end - window.begin])
        block_bytes = self.files[name].block_bytes
        count, found = self.readers[name].read_at_hand(window.begin, views, block_bytes)
        if count != window.end - window.begin:
            return False
        self._verify(name, window, found)
        placed = {id(piece) for piece in chosen}
        for piece in window.pieces:
            if id(piece) not in placed:
                self._copy_out(piece, window, raw)
        return True

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
    return item.to.view(-1).view(torch.uint8)[piece.to_row : piece.to_row + piece.end - piece.begin]


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return memoryview(flat.numpy())  # type: ignore[arg-type]
