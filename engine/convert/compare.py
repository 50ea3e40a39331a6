"""`diff`: compares two checkpoints tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.tensors import Progress, ignore_progress, same_bytes
from engine.format.digest import DIGEST_BYTES
from engine.format.forms import without_order
from engine.format.index import ShardFile
from engine.format.layout import PlacedChunk
from engine.format.manifest import TensorInfo
from engine.storage.base import Storage

Compared = Literal["digests", "bytes"]


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that both checkpoints have.

    equal: bit for bit. largest: the largest absolute difference; None if shapes differ or it is not a number
    (only one of them has a NaN at some place). elements: how many differ.
    compared: by block digests alone, or by reading both.
    """

    name: str
    before: TensorInfo
    after: TensorInfo
    equal: bool
    largest: float | None = None
    elements: int = 0
    compared: Compared = "bytes"


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of `diff`: added and removed names, common tensors, and the shared values that differ."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    common: tuple[TensorDifference, ...]
    values: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[TensorDifference, ...]:
        """The common tensors that differ."""
        return tuple(item for item in self.common if not item.equal)

    @property
    def same(self) -> bool:
        """Whether all tensors are equal; values (a scheduler's step) do not count."""
        return not (self.added or self.removed or self.changed)


def diff_checkpoints(
    before: tuple[Storage, str],
    after: tuple[Storage, str],
    *,
    on_total: Callable[[int], None] = ignore_progress,
    progress: Progress = ignore_progress,
) -> Difference:
    """Compare two committed checkpoints, given as (storage, name).

    Tensors at the same position with equal digests are equal without being read. Everything read is verified.
    Raises: DamagedError; NotFoundError; StorageError.
    """
    with CheckpointTensors(*before) as one, CheckpointTensors(*after) as two:
        names = [name for name in one.infos if name in two.infos]
        unequal = [name for name in names if not equal_digests(one, two, name)]
        on_total(sum(one.infos[name].tensor_bytes for name in unequal if _alike(one, two, name)))
        common = []
        for name in names:
            if name in set(unequal):
                common.append(_compare(one, two, name, progress))
            else:
                info = one.infos[name]
                common.append(TensorDifference(name, info, info, equal=True, compared="digests"))
        return Difference(
            added=tuple(name for name in two.infos if name not in one.infos),
            removed=tuple(name for name in one.infos if name not in two.infos),
            common=tuple(common),
            values=_values(one.manifest.objects, two.manifest.objects),
        )


def equal_digests(one: CheckpointTensors, two: CheckpointTensors, name: str) -> bool:
    """Whether digests alone prove a tensor equal: the same boxes at the same offsets, in equal blocks.

    Neighbouring tensors share the blocks at a box's ends: if those differ, this is False, and bytes decide.
    """
    if not _alike(one, two, name):
        return False
    mine = sorted(one.places[name], key=_box)
    theirs = sorted(two.places[name], key=_box)
    return len(mine) == len(theirs) and all(map(_same_blocks, mine, theirs))


def _box(place: tuple[ShardFile, PlacedChunk]) -> Any:
    return place[1].chunk.offsets


def _same_blocks(one: tuple[ShardFile, PlacedChunk], two: tuple[ShardFile, PlacedChunk]) -> bool:
    (file, placed), (other_file, other) = one, two
    same_place = (placed.chunk, placed.begin, file.block_bytes) == (
        other.chunk,
        other.begin,
        other_file.block_bytes,
    )
    if not same_place:
        return False
    first = placed.begin // file.block_bytes * DIGEST_BYTES
    last = -(-placed.end // file.block_bytes) * DIGEST_BYTES
    return file.digests[first:last] == other_file.digests[first:last]


def _alike(one: CheckpointTensors, two: CheckpointTensors, name: str) -> bool:
    return one.infos[name] == two.infos[name]


def _compare(
    one: CheckpointTensors, two: CheckpointTensors, name: str, progress: Progress
) -> TensorDifference:
    before, after = one.infos[name], two.infos[name]
    if before.shape != after.shape:
        return TensorDifference(name, before, after, equal=False)
    if before.dtype != after.dtype:
        # The number of rows in a window depends on the dtype, so such a pair is not compared further.
        return TensorDifference(name, before, after, equal=False)
    equal, largest, elements = True, 0.0, 0
    for mine, theirs in zip(one.windows(name), two.windows(name), strict=True):
        if not same_bytes(mine, theirs):
            equal = False
            worst, count = _distance(mine, theirs)
            largest = worst if math.isnan(worst) or math.isnan(largest) else max(largest, worst)
            elements += count
        progress(mine.numel() * mine.element_size())
    known = None if math.isnan(largest) else largest
    return TensorDifference(name, before, after, equal, known, elements)


def _distance(mine: torch.Tensor, theirs: torch.Tensor) -> tuple[float, int]:
    """(largest absolute difference, how many elements differ). Equal infinities, or two NaNs, are equal."""
    wide = torch.float64 if mine.dtype.is_floating_point else torch.int64
    one, two = mine.to(wide), theirs.to(wide)
    delta = (one - two).abs().double()
    delta[(one == two) | (one.isnan() & two.isnan())] = 0.0
    return float(delta.max().item()), int(torch.count_nonzero(delta).item())


def _values(one: Mapping[str, Any], two: Mapping[str, Any]) -> tuple[str, ...]:
    """The state keys whose shared JSON differs."""
    mine, theirs = without_order(dict(one)), without_order(dict(two))
    return tuple(sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key)))
