"""A shard file that is assembled from its tensors while it is written.

It needs neither memory nor disk space of the file's size: the header is known before the data, tensors are
read in windows, and the digests go into the index, which is written afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import torch

from engine.convert.tensors import Progress, raw_bytes
from engine.errors import DamagedError
from engine.format.digest import BlockDigests
from engine.format.layout import PlacedChunk, ShardLayout
from engine.state.tensor_format import to_torch
from engine.storage.reader_source import Buffers
from engine.storage.source import Window, spans


class ShardStream:
    """One shard file. See `ShardSource`.

    Args:
        tensor_windows: the rows of a tensor, in order, in any dtype that converts to its stored one.
        progress: called with the bytes taken from the tensors; may raise to abort.
    """

    digest_secs = 0.0

    def __init__(
        self,
        layout: ShardLayout,
        tensor_windows: Callable[[str], Iterator[torch.Tensor]],
        progress: Progress,
    ) -> None:
        self.layout = layout
        self.file_bytes = layout.file_bytes
        self._tensor_windows = tensor_windows
        self._progress = progress
        self._digests = b""

    def windows(self, window_bytes: int) -> Generator[Window]:
        buffers, blocks, digests = Buffers(min(window_bytes, self.file_bytes)), BlockDigests(), []
        pieces, piece = self._pieces(), memoryview(b"")
        for begin, end in spans(self.file_bytes, window_bytes):
            memory, release = buffers.take()
            position, count = 0, end - begin
            while position < count:
                while not piece:
                    piece = next(pieces)
                part = piece[: count - position]
                memory[position : position + len(part)] = part
                piece = piece[len(part) :]
                position += len(part)
            digests.append(blocks.update(memory[:count]))
            yield Window(begin, end, memory, release)
        for _ in pieces:  # the last tensor may be too long
            pass
        self._digests = b"".join([*digests, blocks.finish()])

    def digests(self) -> bytes:
        return self._digests

    def _pieces(self) -> Iterator[memoryview]:
        """The bytes of the file, in order."""
        yield memoryview(self.layout.header)
        for placed in self.layout.chunks:
            yield from self._tensor(placed)

    def _tensor(self, placed: PlacedChunk) -> Iterator[memoryview]:
        dtype, left = to_torch(placed.chunk.dtype), placed.chunk.chunk_bytes
        for window in self._tensor_windows(placed.chunk.name):
            data = raw_bytes(window.to(dtype).resolve_conj().resolve_neg())
            left -= len(data)
            if left < 0:
                break
            self._progress(len(data))
            yield data
        if left:
            raise DamagedError(
                f"{placed.chunk.name} has {placed.chunk.chunk_bytes - left} bytes or more, but "
                f"{placed.chunk.dtype} {list(placed.chunk.sizes)} needs {placed.chunk.chunk_bytes}"
            )
