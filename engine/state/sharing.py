"""Which boxes several ranks have, and whether they are compared or each rank's value is kept. Pure.

Parameters, optimizer state and values have one value under one name, so the copies of several ranks are
compared. A module's buffers (the running statistics of a batch norm) may rightly differ between ranks: the
checkpoint has the lowest rank's value, and every other rank's own value beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.format.layout import Chunk
from engine.state.modules import NOTES

SMALL_BUFFER_BYTES = 64 << 10
"""Each rank's own value of a buffer up to this size is always kept; of a larger one only after the planning
has found a difference, because an attention mask of megabytes is usually equal on all ranks."""

SMALL = ""
"""In place of the digest of a small buffer, which is not compared."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What one rank contributes to a plan.

    boxes: its local boxes, in its own order.
    buffers: the boxes that are whole buffers of modules, by position, with their digest or `SMALL`.
    aliases: other names of tensors (tied weights), alias -> name.
    on_device: whether some of the boxes are in device memory.
    stateless: for each parameter without optimizer state, the prefix that the names of its state would have.
    """

    boxes: Sequence[Chunk]
    buffers: Mapping[int, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    on_device: bool = False
    stateless: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class SharedBox:
    """A box that several ranks have.

    places: (rank, position in the rank's list), by rank. buffer: it is a module's buffer on each of them.
    kept: every rank's own value is kept, and nothing is compared.
    """

    chunk: Chunk
    places: tuple[tuple[int, int], ...]
    buffer: bool = False
    kept: bool = False

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that have it."""
        return tuple(rank for rank, _ in self.places)


@dataclass(frozen=True, slots=True)
class Group:
    """Boxes that the same ranks have and that must be equal on all of them, by name and offsets."""

    ranks: tuple[int, ...]
    boxes: tuple[SharedBox, ...]


def shared_boxes(offers: Sequence[Offer], differing: Collection[str] = ()) -> dict[Chunk, SharedBox]:
    """The boxes that more than one rank has.

    Args:
        differing: names of large buffers that were found to differ before.
    """
    places: dict[Chunk, list[tuple[int, int]]] = defaultdict(list)
    for rank, offer in enumerate(offers):
        for position, chunk in enumerate(offer.boxes):
            places[chunk].append((rank, position))
    found = {}
    for chunk, at in places.items():
        if len(at) < 2:
            continue
        digests = [offers[rank].buffers.get(position) for rank, position in at]
        buffer = None not in digests and chunk.sizes == chunk.shape
        kept = buffer and (SMALL in digests or len(set(digests)) > 1 or chunk.name in differing)
        found[chunk] = SharedBox(chunk, tuple(at), buffer, kept)
    return found


def groups_to_compare(shared: Mapping[Chunk, SharedBox]) -> list[Group]:
    """The boxes to compare, grouped by ranks; the order of the offers' boxes does not matter."""
    by_ranks: dict[tuple[int, ...], list[SharedBox]] = defaultdict(list)
    for box in shared.values():
        if not box.kept:
            by_ranks[box.ranks].append(box)
    return [
        Group(ranks, tuple(sorted(by_ranks[ranks], key=lambda box: (box.chunk.name, box.chunk.offsets))))
        for ranks in sorted(by_ranks)
    ]


def one_sided_state(offers: Sequence[Offer]) -> list[str]:
    """One sentence for each parameter that has optimizer state on one rank and none on another.

    A restore would give both ranks that state, although one has made no step with the parameter.
    """
    without = {name: rank for rank, offer in reversed([*enumerate(offers)]) for name in offer.stateless}
    found: dict[str, str] = {}
    for rank, offer in enumerate(offers if without else ()):
        for chunk in offer.boxes:
            begins = chunk.name
            while begins and begins not in without:
                begins = begins.rpartition(".")[0]
            if begins and begins not in found:
                found[begins] = f"{begins} exists on rank {rank} but not on rank {without[begins]}"
    return list(found.values())


def union_of_values(documents: Sequence[Any]) -> Any:
    """One document of a module's values on several ranks: submodule name -> value of the first rank with it.

    If one of the documents is not a dict of names, the first document is returned.
    """
    first = documents[0]
    if not all(isinstance(one, dict) and not any(key.startswith("$") for key in one) for one in documents):
        return first
    union: dict[str, Any] = {}
    for one in documents:
        for name, value in one.items():
            known = union.setdefault(name, value)
            if name in NOTES and isinstance(value, dict):
                union[name] = value | known
            elif name in NOTES:
                union[name] = [*known, *(more for more in value if more not in known)]
    return union


def all_aliases(offers: Sequence[Offer]) -> dict[str, str]:
    """The aliases of all ranks, the lowest rank's first, without names under which a rank has a tensor."""
    tensors = {chunk.name for offer in offers for chunk in offer.boxes}
    merged: dict[str, str] = {}
    for offer in offers:
        for alias, name in offer.aliases.items():
            if alias not in tensors:
                merged.setdefault(alias, name)
    return merged
