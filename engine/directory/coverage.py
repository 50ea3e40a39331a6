"""Whether the chunks of all ranks make up every tensor exactly: nothing missing, nothing twice. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from engine.directory.damage import Damage
from engine.format.index import ShardIndex
from engine.format.layout import Chunk
from engine.format.manifest import Manifest, TensorInfo

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
    filled = [(file, chunk) for file, chunk in held if math.prod(chunk.sizes)]
    pair = overlapping(filled)
    if pair is not None:
        (file, chunk), (other_file, other) = pair
        box, other_box = _box(chunk), _box(other)
        sentence = f"{name!r} is stored twice in part: {box} in {file} overlaps {other_box} in {other_file}"
        return Damage(other_file, None, f"{name!r} once", f"{box} and {other_box}", sentence)
    elements, stored = math.prod(info.shape), sum(math.prod(chunk.sizes) for _, chunk in filled)
    if elements != stored:
        file = filled[0][0] if filled else ""
        sentence = f"{name!r} ({wanted}) has a hole: the shards hold {stored} of its {elements} elements"
        return Damage(file, None, f"{elements} elements", f"{stored} elements", sentence)
    return None


def overlapping(held: Sequence[_Held]) -> tuple[_Held, _Held] | None:
    """Two chunks of one tensor that share an element, or None.

    Sweeps along the dimension with the most different offsets and compares a chunk only with those that it
    meets there: for sharded tensors that is about one each, where all pairs would be ranks squared.
    """
    if len(held) < 2:
        return None
    dims = range(len(held[0][1].shape))
    sweep = max(dims, key=lambda dim: len({chunk.offsets[dim] for _, chunk in held}), default=None)
    if sweep is None:
        return held[0], held[1]  # two scalars
    active: list[_Held] = []
    for item in sorted(held, key=lambda item: item[1].offsets[sweep]):
        begin = item[1].offsets[sweep]
        active = [other for other in active if other[1].offsets[sweep] + other[1].sizes[sweep] > begin]
        for other in active:
            if _share(other[1], item[1]):
                return other, item
        active.append(item)
    return None


def _share(one: Chunk, two: Chunk) -> bool:
    return all(
        max(begin, other) < min(begin + size, other + other_size)
        for begin, size, other, other_size in zip(one.offsets, one.sizes, two.offsets, two.sizes, strict=True)
    )


def _box(chunk: Chunk) -> str:
    spans = [f"{begin}:{begin + size}" for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)]
    return f"[{', '.join(spans)}]"
