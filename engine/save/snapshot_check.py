"""Checks that a snapshot is of one moment: the files contain what the live tensors contained in `save`.

For debugging: it reads the whole state in the training thread, and every file again after it is written. It
finds a step that ran before its copy, weights changed outside `optimizer.step()` without `guard()`, and
memory that changed on its way to the disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from engine.errors import TornSnapshotError
from engine.format.digest import BLOCK_BYTES, block_digests, combine
from engine.save.snapshot import Snapshot
from engine.save.staging_buffer import FileSlot
from engine.state.tensor_format import bytes_of
from engine.storage.base import Reader, Storage

READ_BYTES = 64 * BLOCK_BYTES
"""Bytes of a file read back at a time; whole blocks."""

_SHOWN = 5

Digests = Mapping[tuple[str, str], str]
"""Digest of each chunk, by file and name; a file has one chunk of each name."""


def live_digests(snapshot: Snapshot) -> Digests:
    """Digests of the live values of all parts that this rank writes.

    Call it before the copy starts: on a device the copy would end before the last tensor was digested, and
    the check could find nothing.
    """
    return {(file, placed.chunk.name): _digest(tensor) for file, placed, tensor in snapshot.sources()}


def check_written(storage: Storage, attempt: str, slots: Sequence[FileSlot], expected: Digests) -> None:
    """Read the files back and compare. Raises TornSnapshotError naming the tensors; StorageError."""
    torn = []
    for slot in slots:
        with storage.open_reader(f"{attempt}/{slot.layout.file}") as reader:
            for placed in slot.layout.chunks:
                found = _stored_digest(reader, placed.begin, placed.end)
                if found != expected[slot.layout.file, placed.chunk.name]:
                    torn.append(placed.chunk.name)
    if torn:
        more = f" and {len(torn) - _SHOWN} more" if len(torn) > _SHOWN else ""
        raise TornSnapshotError(
            f"the saved values of {', '.join(torn[:_SHOWN])}{more} differ from those in memory when "
            "save() was called: something changed them before they were copied. Change weights in the step() "
            "of an optimizer that is in the state, or under the Checkpointer's guard()"
        )


def _digest(tensor: torch.Tensor) -> str:
    if not tensor.numel():
        return combine(b"")
    plain = tensor.detach().resolve_conj().resolve_neg()
    flat = bytes_of(plain.cpu().contiguous())
    return combine(block_digests(memoryview(flat.numpy())))  # type: ignore[arg-type]


def _stored_digest(reader: Reader, begin: int, end: int) -> str:
    packed = []
    for at in range(begin, end, READ_BYTES):
        window = bytearray(min(READ_BYTES, end - at))
        reader.read_into(at, memoryview(window))
        packed.append(block_digests(window))
    return combine(b"".join(packed))
