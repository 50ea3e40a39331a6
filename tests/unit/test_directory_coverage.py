"""Chunks that make up the tensors, and chunks that do not: a table, and random cuts."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.directory.damage import coverage_damage
from engine.format.index import ShardIndex
from engine.format.layout import Chunk
from engine.format.manifest import Manifest, TensorInfo

Span = tuple[int, int]


def chunk(*spans: Span, shape: tuple[int, ...] = (8, 4), dtype: str = "F32", name: str = "w") -> Chunk:
    return Chunk(name, dtype, shape, tuple(a for a, _ in spans), tuple(b - a for a, b in spans))


def damage(*ranks: list[Chunk], tensors: dict[str, TensorInfo] | None = None) -> list[str]:
    """Sentences about one chunk list a rank; the rank's file is named after it."""
    indexes = [
        SimpleNamespace(
            chunks=tuple((SimpleNamespace(file=f"rank{rank}"), SimpleNamespace(chunk=c)) for c in chunks)
        )
        for rank, chunks in enumerate(ranks)
    ]
    manifest = SimpleNamespace(tensors=tensors or {"w": TensorInfo("F32", (8, 4))})
    found = coverage_damage(cast(Manifest, manifest), cast(list[ShardIndex], indexes))
    return [item.sentence for item in found]


@pytest.mark.parametrize(
    "ranks",
    [
        [[chunk((0, 8), (0, 4))]],
        [[chunk((0, 4), (0, 4))], [chunk((4, 8), (0, 4))]],
        [[chunk((0, 8), (0, 1))], [chunk((0, 8), (1, 4))]],
        [[chunk((0, 3), (0, 4)), chunk((5, 8), (0, 4))], [chunk((3, 5), (0, 4))]],
        [[chunk((0, 4), (0, 2)), chunk((4, 8), (0, 4))], [chunk((0, 4), (2, 4))]],
        [[chunk((0, 8), (0, 4))], [chunk((8, 8), (0, 4))]],
    ],
    ids=["whole", "rows", "columns", "interleaved", "mixed", "empty shard"],
)
def test_whole(ranks: list[list[Chunk]]) -> None:
    assert damage(*ranks) == []


@pytest.mark.parametrize(
    ("ranks", "sentence"),
    [
        ([[]], "'w' (F32 [8, 4]) has a hole: the shards have 0 of its 32 elements"),
        (
            [[chunk((0, 4), (0, 4))], [chunk((5, 8), (0, 4))]],
            "'w' (F32 [8, 4]) has a hole: the shards have 28 of its 32 elements",
        ),
        (
            [[chunk((0, 5), (0, 4))], [chunk((4, 8), (0, 4))]],
            "'w' is partly stored twice: [0:5, 0:4] in rank0 overlaps [4:8, 0:4] in rank1",
        ),
        (  # as many elements as there should be, but not the right ones
            [[chunk((0, 4), (0, 4))], [chunk((0, 4), (0, 4))]],
            "'w' is partly stored twice: [0:4, 0:4] in rank0 overlaps [0:4, 0:4] in rank1",
        ),
        (
            [[chunk((0, 8), (0, 4), dtype="BF16")]],
            "rank0 has 'w' as BF16 [8, 4]: the manifest says F32 [8, 4]",
        ),
        (
            [[chunk((0, 8), (0, 4), shape=(9, 4))]],
            "rank0 has 'w' as F32 [9, 4]: the manifest says F32 [8, 4]",
        ),
        (
            [[chunk((0, 8), (0, 4))], [chunk((0, 8), (0, 4), name="v")]],
            "rank1 has a tensor 'v' that the manifest does not list",
        ),
    ],
    ids=["nothing", "hole", "overlap", "duplicate", "dtype", "shape", "unknown"],
)
def test_damaged(ranks: list[list[Chunk]], sentence: str) -> None:
    assert damage(*ranks) == [sentence]


def test_scalars_and_empty_tensors() -> None:
    scalar = Chunk("s", "F32", (), (), ())
    empty = Chunk("e", "F32", (0, 4), (0, 0), (0, 4))
    tensors = {"s": TensorInfo("F32", ()), "e": TensorInfo("F32", (0, 4))}
    assert damage([scalar, empty], tensors=tensors) == []
    assert damage([scalar], tensors=tensors) == [], "an empty tensor needs no chunk"
    (sentence,) = damage([scalar], [scalar], tensors=tensors)
    assert "'s' is partly stored twice: [] in rank0 overlaps [] in rank1" in sentence


@st.composite
def cuts(draw: st.DrawFn) -> list[Chunk]:
    """A 3-dimensional tensor cut again and again along random dimensions."""
    shape = tuple(draw(st.integers(1, 6)) for _ in range(3))
    boxes: list[list[Span]] = [[(0, extent) for extent in shape]]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, 2))
        at = draw(st.integers(*box[dim]))
        for span in ((box[dim][0], at), (at, box[dim][1])):
            boxes.append([*box[:dim], span, *box[dim + 1 :]])
    return [chunk(*box, shape=shape) for box in boxes]


@given(cuts(), st.randoms(use_true_random=False))
def test_any_cut_is_whole_and_one_chunk_twice_or_missing_is_not(
    chunks: list[Chunk], rng: random.Random
) -> None:
    rng.shuffle(chunks)
    tensors = {"w": TensorInfo("F32", chunks[0].shape)}
    assert damage(chunks, tensors=tensors) == []
    full = [c for c in chunks if all(c.sizes)]
    chosen = rng.choice(full)
    assert len(damage(chunks, [chosen], tensors=tensors)) == 1
    assert len(damage([c for c in chunks if c is not chosen], tensors=tensors)) == 1
