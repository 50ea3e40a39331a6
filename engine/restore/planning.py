"""From tensors to fill to the slices of saved chunks that fill them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch

from engine.format.index import ShardFile
from engine.format.layout import PlacedChunk
from engine.format.manifest import Manifest
from engine.restore.load_plan import Slice, plan_slices
from engine.restore.places import Indexes, Place
from engine.restore.read import Located


def plan_reads(
    tensors: Mapping[str, torch.Tensor],
    sources: Mapping[str, str],
    manifest: Manifest,
    places: Mapping[str, list[Place]],
    indexes: Indexes,
) -> tuple[list[Slice], Located]:
    """What to read, and where it lies with the digests to check it by; reads the indexes that takes.

    Args:
        tensors: what to fill, by a name of the destination.
        sources: the saved name of each.
        places: where every saved chunk lies.
    """
    held = {name: places[saved] for name, saved in sources.items()}
    slices = plan_slices(
        tensors,
        {name: manifest.tensors[saved] for name, saved in sources.items()},
        {name: [place.placed.chunk for place in found] for name, found in held.items()},
    )
    used = {(item.name, item.chunk): held[item.name][item.chunk] for item in slices}
    read = indexes.fetch({place.rank for place in used.values()})
    shards = {shard.file: shard for index in read for shard in index.files}
    found: dict[str, dict[int, tuple[ShardFile, PlacedChunk]]] = defaultdict(dict)
    for (name, number), place in used.items():
        found[name][number] = (shards[place.file], place.placed)
    return slices, found
