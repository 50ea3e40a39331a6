"""Whether the chunks of all ranks make up every tensor exactly: nothing missing, nothing twice. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from engine.directory.damage import Damage
from engine.format.index import ShardIndex
from engine.format.layout import Chunk
from engine.format.manifest import Manifest, TensorInfo
from engine.geometry import first_overlap, show

_Held = tuple[str, Chunk]
"""A chunk and the name of the file that holds it."""


def coverage_damage(manifest: Manifest, indexes: Iterable[ShardIndex]) -> list[Damage]:
    """Compare the chunks in all ranks' indexes with the manifest's tensors, one Damage per tensor at most."""
    by_name: dict[str, list[_Held]] = {}
    for index in indexes:
        for shard, placed in index.chunks:
            by_name.setdefault(placed.chunk.name, []).append((shard.file, placed.chunk))
    found = [_tensor_damage(name, info, by_name.pop(name, [])) for name, info in manifest.tensors.items()]
    for name, held in by_name.items():
        sentence = f"{held[0][0]} holds a tensor {name!r} that the manifest does not know"
        found.append(Damage(held[0][0], None, "no such tensor", name, sentence))
    return [damage for damage in found if damage is not None]


def _tensor_damage(name: str, info: TensorInfo, held: Sequence[_Held]) -> Damage | None:
    wanted = f"{info.dtype} {list(info.shape)}"
    for file, chunk in held:
        if (chunk.dtype, chunk.shape) != (info.dtype, info.shape):
            given = f"{chunk.dtype} {list(chunk.shape)}"
            sentence = f"{file} holds {name!r} as {given}: the manifest says {wanted}"
            return Damage(file, None, wanted, given, sentence)
    pair = first_overlap([chunk for _, chunk in held])
    if pair is not None:
        (file, chunk), (other_file, other) = held[pair[0]], held[pair[1]]
        box, other_box = show(chunk), show(other)
        sentence = f"{name!r} is stored twice in part: {box} in {file} overlaps {other_box} in {other_file}"
        return Damage(other_file, None, f"{name!r} once", f"{box} and {other_box}", sentence)
    elements, stored = math.prod(info.shape), sum(math.prod(chunk.sizes) for _, chunk in held)
    if elements != stored:
        file = next((file for file, chunk in held if math.prod(chunk.sizes)), "")
        sentence = f"{name!r} ({wanted}) has a hole: the shards hold {stored} of its {elements} elements"
        return Damage(file, None, f"{elements} elements", f"{stored} elements", sentence)
    return None
