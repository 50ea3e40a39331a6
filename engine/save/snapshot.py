"""One rank's snapshot: the parts of its state that it writes, and their copies in the staging buffer.

The plan of who writes what is made once per structure and shared by all ranks; a save with an unchanged
structure costs one identity check and one batched copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.format.digest import bytes_digest
from engine.format.json import canonical_bytes
from engine.format.layout import Chunk, PlacedChunk, ShardLayout, plan_files
from engine.save.digesting_copy import Pair, Span
from engine.save.division import Part
from engine.save.staging_buffer import FileSlot, StagingBuffer
from engine.save.staging_copy import Batch
from engine.state.captured import Captured
from engine.state.local_boxes import LocalBox, carries_boxes, local_boxes

Signature = tuple[tuple[str, torch.dtype, torch.Size], ...]


BATCH_BYTES = 64 << 20
"""Approximate size of a batch of copies: small against the whole, large against the cost of a call."""


@dataclass(slots=True)
class _Copy:
    """A copy made at every save: a local box, or some of its rows, into a view of the staging buffer.

    rows: (dim, start, length); None for the whole box.
    """

    to: torch.Tensor
    box: int
    rows: tuple[int, int, int] | None
    file: str
    placed: PlacedChunk


class Snapshot:
    """The staging buffer and the copies that fill it. For one thread; one snapshot at a time.

    Args:
        rank: this rank; it is part of its files' names.
        pin: whether to pin the staging buffer for CUDA.
        budget_bytes: the most host memory to allocate, or None.
    """

    def __init__(self, rank: int, *, pin: bool, budget_bytes: int | None) -> None:
        self._rank = rank
        self._pin = pin
        self._budget_bytes = budget_bytes
        self._local_boxes: list[LocalBox] = []
        self._generation = -1
        self._signature: Signature = ()
        self._local_digest = ""
        self._planned_digest = ""
        self._copies: list[_Copy] = []
        self.staging: StagingBuffer | None = None
        self.layouts: tuple[ShardLayout, ...] = ()

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The local boxes' chunks, as of the last `prepare`."""
        return [box.chunk for box in self._local_boxes]

    @property
    def local_boxes(self) -> Sequence[LocalBox]:
        """The local boxes with their memory, as of the last `prepare`."""
        return self._local_boxes

    def prepare(self, captured: Captured) -> bool:
        """Note where the state's memory is now. Returns whether a new plan is needed."""
        fresh = {name: tensor for name, tensor in captured.tensors.items() if name not in captured.fixed}
        signature = tuple((name, tensor.dtype, tensor.shape) for name, tensor in fresh.items())
        plain = all(type(tensor) is torch.Tensor and not carries_boxes(tensor) for tensor in fresh.values())
        if captured.generation == self._generation and signature == self._signature and plain:
            self._local_boxes = [
                LocalBox(box.chunk, fresh[box.chunk.name].detach()) if box.chunk.name in fresh else box
                for box in self._local_boxes
            ]
        else:
            self._local_boxes = local_boxes(captured.tensors)
            self._local_digest = plan_digest(self.chunks, captured.buffers, captured.aliases)
            self._generation, self._signature = captured.generation, signature
        # Not simply "changed since the last call": the plan for this structure may have failed.
        return self._local_digest != self._planned_digest

    def adopt(self, parts: Sequence[Part]) -> None:
        """Adopt a new plan: lay out the files and the staging buffer for the parts that this rank writes.

        Raises: MemoryBudgetError when the staging buffer would exceed its budget; no plan is left then.
        """
        layouts = plan_files(self._rank, [part.chunk for part in parts])
        if self.staging is None or layouts != self.layouts:
            self.forget_plan()
            self.layouts = layouts
            self.staging = StagingBuffer(layouts, pin=self._pin, budget_bytes=self._budget_bytes)
        self._copies = []
        by_box = {(part.chunk.name, part.chunk.offsets): part for part in parts}
        for slot in self.staging.slots:
            for placed in slot.layout.chunks:
                part = by_box[placed.chunk.name, placed.chunk.offsets]
                sizes = self._local_boxes[part.box].chunk.sizes
                whole = not sizes or sizes[part.dim] == part.length
                self._copies.append(
                    _Copy(
                        to=self.staging.view(slot, placed),
                        box=part.box,
                        rows=None if whole else (part.dim, part.start, part.length),
                        file=slot.layout.file,
                        placed=placed,
                    )
                )
        self._planned_digest = self._local_digest

    def forget_plan(self) -> None:
        """Free the staging buffer; the next save needs a new plan."""
        self._copies = []
        self.layouts = ()
        self._planned_digest = ""
        if self.staging is not None:
            self.staging.release()
            self.staging = None

    def copies(self, overlaps: Callable[[str, torch.Tensor], bool] | None) -> tuple[list[Batch], list[Pair]]:
        """The copies of this snapshot: (made before `save` returns, may overlap with training).

        `overlaps` decides by name and source which may overlap; None: none may.

        The first are in buffer order, in batches, so that writing can start before the last. With 10,000
        small tensors every call per tensor matters, so tensors are narrowed and `overlaps` called only if
        needed.
        """
        batches: list[Batch] = []
        overlapped: list[Pair] = []
        copies = iter(self._copies)
        for slot in self.staging.slots if self.staging else ():
            pairs: list[Pair] = []
            begin = 0
            for copy in itertools.islice(copies, len(slot.layout.chunks)):
                source = self._source(copy)
                if overlaps is not None and overlaps(copy.placed.chunk.name, source):
                    overlapped.append((copy.to, source))
                    continue
                pairs.append((copy.to, source))
                end = copy.placed.end
                if end - begin >= BATCH_BYTES:
                    batches.append(self._batch(slot, pairs, begin, end))
                    pairs, begin = [], end
            batches.append(self._batch(slot, pairs, begin, slot.layout.file_bytes))
        return batches, overlapped

    def _batch(self, slot: FileSlot, pairs: Sequence[Pair], begin: int, end: int) -> Batch:
        """The copies that fill bytes [begin, end) of a file."""
        assert self.staging is not None
        address = self.staging.buffer.data_ptr() + slot.begin
        span = Span(slot.layout.file, address, slot.layout.file_bytes, begin, end)
        return Batch(tuple(pairs), slot.begin + end, span)

    def sources(self) -> Iterator[tuple[str, PlacedChunk, torch.Tensor]]:
        """(file, chunk in it, live memory) of everything that this rank writes."""
        return ((copy.file, copy.placed, self._source(copy)) for copy in self._copies)

    def _source(self, copy: _Copy) -> torch.Tensor:
        source = self._local_boxes[copy.box].tensor
        return source if copy.rows is None else source.narrow(*copy.rows)


def plan_digest(
    chunks: Sequence[Chunk], buffers: Iterable[str] = (), aliases: Mapping[str, str] | None = None
) -> str:
    """Digest of a rank's structure: a plan stays valid while it is the same."""
    boxes = [chunk_to_json(chunk) for chunk in chunks]
    return bytes_digest(canonical_bytes([boxes, sorted(buffers), dict(aliases or {})]))


def chunk_to_json(chunk: Chunk) -> list[object]:
    """A chunk as ranks send it to each other while planning."""
    return [chunk.name, chunk.dtype, list(chunk.shape), list(chunk.offsets), list(chunk.sizes)]
