"""Who writes what: every element exactly once, and replicas share the work evenly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import StateError
from engine.format.layout import Chunk
from engine.save.division import Part, divide
from tests.support.boxes import box, covered, shards, whole

BLOCK_SIZES = [(768,)] * 7 + [(2304, 768), (2304,), (768, 768), (3072, 768), (3072,), (768, 3072)]
GPT2_SIZES = [(50257, 768), (1024, 768), *BLOCK_SIZES * 12]


def gpt2_with_adamw() -> list[Chunk]:
    """124M parameters, two moments and a step count for each: what DDP holds on every rank."""
    chunks = []
    for number, shape in enumerate(GPT2_SIZES):
        for prefix in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
            chunks.append(whole(f"{prefix}.{number}", *shape))
        chunks.append(whole(f"optimizer.step.{number}"))
    return chunks


def bytes_of(parts: Sequence[Part]) -> int:
    return sum(part.chunk.chunk_bytes for part in parts)


def check_exact(held: Sequence[Sequence[Chunk]], divided: Sequence[Sequence[Part]]) -> None:
    """Each part is what its `held` says, and every element of every tensor is written once."""
    names = {chunk.name: chunk.shape for chunks in held for chunk in chunks}
    written: dict[str, list[Chunk]] = {name: [] for name in names}
    for rank, parts in enumerate(divided):
        for part in parts:
            source = held[rank][part.box]
            offsets, sizes = list(source.offsets), list(source.sizes)
            if sizes:
                offsets[part.dim] += part.start
                sizes[part.dim] = part.length
            else:
                assert (part.dim, part.start, part.length) == (0, 0, 1)
            expected = Chunk(source.name, source.dtype, source.shape, tuple(offsets), tuple(sizes))
            assert part.chunk == expected
            written[source.name].append(part.chunk)
    for name, shape in names.items():
        assert bool((covered(shape, written[name]) == 1).all()), name
        if not math.prod(shape):
            assert written[name], f"{name} is empty and must still be there"


def test_what_one_rank_holds_alone_it_writes_whole() -> None:
    held = [[whole("a", 4, 2), whole("s"), whole("empty", 0, 3)]]
    parts = divide(held)
    check_exact(held, parts)
    assert [part.chunk for part in parts[0]] == held[0]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_replicated_state_is_balanced(ranks: int) -> None:
    held = [gpt2_with_adamw() for _ in range(ranks)]
    divided = divide(held)
    loads = [bytes_of(parts) for parts in divided]
    assert sum(loads) == bytes_of([Part(0, 0, 0, 0, chunk) for chunk in held[0]])
    assert max(loads) / (sum(loads) / ranks) <= 1.05
    for name in ("model.0", "optimizer.step.3", "model.5"):
        boxes = [part.chunk for parts in divided for part in parts if part.chunk.name == name]
        assert sum(math.prod(chunk.sizes) for chunk in boxes) == math.prod(boxes[0].shape)


@pytest.mark.parametrize(("replicas", "shards_each"), [(2, 2), (2, 3), (4, 2)])
def test_hsdp_state_is_balanced(replicas: int, shards_each: int) -> None:
    held: list[list[Chunk]] = [[] for _ in range(replicas * shards_each)]
    for number, shape in enumerate(GPT2_SIZES):
        for prefix in ("model", "exp_avg", "exp_avg_sq"):
            for rank, chunk in enumerate(shards(f"{prefix}.{number}", shape, shards_each) * replicas):
                held[rank].append(chunk)
        for chunks in held:
            chunks.append(whole(f"step.{number}"))
    loads = [bytes_of(parts) for parts in divide(held)]
    assert max(loads) / (sum(loads) / len(loads)) <= 1.05


def test_replicas_even_out_what_sharding_left_uneven() -> None:
    """Rank 0 alone holds a large tensor; the shared one then goes to the others."""
    held = [[whole("own", 100), whole("shared", 100)], [whole("shared", 100)]]
    divided = divide(held)
    check_exact(held, divided)
    assert bytes_of(divided[0]) == bytes_of(divided[1]) == 400
    assert [part.chunk.name for part in divided[0]] == ["own"]


def test_a_single_tensor_is_cut_by_rows_not_given_to_one_rank() -> None:
    held = [[whole("w", 1, 10, 4)], [whole("w", 1, 10, 4)]]
    divided = divide(held)
    check_exact(held, divided)
    assert [part.length for parts in divided for part in parts] == [5, 5]
    assert {part.dim for parts in divided for part in parts} == {1}, "a dimension of one row cannot be cut"


def test_the_same_state_is_divided_the_same_way_every_time() -> None:
    held = [gpt2_with_adamw()[:40] for _ in range(3)]
    assert divide(held) == divide([list(chunks) for chunks in held])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1,), (1, 1), (2,), (1, 5)])
def test_small_and_empty_tensors_that_all_ranks_hold(ranks: int, shape: tuple[int, ...]) -> None:
    held = [[whole("t", *shape)] for _ in range(ranks)]
    check_exact(held, divide(held))


def test_an_empty_local_shard_writes_nothing() -> None:
    held = [[chunk] for chunk in shards("t", (2, 5), 4)]
    divided = divide(held)
    check_exact(held, divided)
    assert [len(parts) for parts in divided] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ([[box("t", (4,), (0,), (2,))], [box("t", (4,), (3,), (1,))]], "3 elements of 4"),
        ([[box("t", (4,), (0,), (3,))], [box("t", (4,), (2,), (2,))]], "5 elements of 4"),
        ([[box("t", (4,), (0,), (3,))], [box("t", (4,), (1,), (1,))]], "overlap or leave a hole"),
        ([[box("t", (2, 2), (0, 0), (2, 1))], [box("t", (2, 2), (0, 0), (1, 2))]], "overlap or leave a hole"),
        ([[box("t", (4,), (0,), (0,))], []], "t"),
    ],
)
def test_boxes_that_do_not_make_up_the_tensor_are_refused(held: list[list[Chunk]], words: str) -> None:
    with pytest.raises(StateError, match=words) as caught:
        divide(held)
    assert str(caught.value).startswith("t: ")


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (whole("t", 5), r"rank 0 has F32 \[4\], rank 1 has F32 \[5\]"),
        (whole("t", 4, dtype="BF16"), r"rank 0 has F32 \[4\], rank 1 has BF16 \[4\]"),
        (whole("t"), r"rank 0 has F32 \[4\], rank 1 has F32 \[\]"),
    ],
)
def test_ranks_that_disagree_about_a_tensor_are_told_which(second: Chunk, words: str) -> None:
    with pytest.raises(StateError, match=words) as caught:
        divide([[whole("t", 4)], [second]])
    assert "per_rank" in str(caught.value)


@st.composite
def states(draw: st.DrawFn) -> list[list[Chunk]]:
    """Tensors sharded over some ranks and replicated over the others, as meshes give them."""
    replicas, parts = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    held: list[list[Chunk]] = [[] for _ in range(replicas * parts)]
    for number in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype = draw(st.sampled_from(["F32", "BF16", "I64", "BOOL"]))
        kind = draw(st.sampled_from(["replicated", "sharded", "own"]))
        name = f"t{number}"
        if kind == "sharded" and shape:
            dim = draw(st.integers(0, len(shape) - 1))
            for rank, chunk in enumerate(shards(name, shape, parts, dim, dtype) * replicas):
                held[rank].append(chunk)
        elif kind == "own":
            held[draw(st.integers(0, len(held) - 1))].append(whole(name, *shape, dtype=dtype))
        else:
            for chunks in held:
                chunks.append(whole(name, *shape, dtype=dtype))
    return held


@settings(max_examples=200)
@given(states())
def test_every_element_is_written_once_whatever_the_placement(held: list[list[Chunk]]) -> None:
    check_exact(held, divide(held))
