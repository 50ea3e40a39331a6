"""Prove that a snapshot is of one moment: what was written is what the live tensors held in `save`.

For debugging: it reads every byte of the state in the training thread, and every file once more after it
was written. What it finds: a step that ran before its copy was made, weights changed outside of
`optimizer.step()` without `guard()`, memory that was changed on its way to the disk.
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
"""How much of a file is read back at a time; whole blocks."""

_SHOWN = 5

Digests = Mapping[tuple[str, str], str]
"""Digest of each chunk, by its file and its name, of which a file has one chunk."""


def live_digests(snapshot: Snapshot) -> Digests:
    """Digests of what the tensors hold now, of all parts that this rank writes.

    To be taken before the copy is started: on a device it would be over before the last tensor was digested,
    and nothing would be left to prove.
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
            f"what was written of {', '.join(torn[:_SHOWN])}{more} is not what it held when save() was "
            "called: something changed it before it was copied. Change weights in the step() of an optimizer "
            "that is in the state, or under the Checkpointer's guard()"
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
