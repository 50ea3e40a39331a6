"""The checkpoint as one rank sees it whose modules are declared per rank."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import StateError
from engine.format.manifest import FileReceipt, Manifest, ShardReceipt, TensorInfo
from engine.restore.rename import own_view
from engine.state.captured import OwnNames
from engine.state.values import with_tensor_names

ONE = TensorInfo("F32", (1,))


def manifest() -> Manifest:
    names = ("model.w", "per_rank.00000.ex.w", "per_rank.00001.ex.w", "per_rank.00001.rng.cpu", "ex2.w")
    digest = "0" * 32
    shards = [
        ShardReceipt(
            rank,
            (FileReceipt(f"shard-{rank:05d}.safetensors", 5000, digest),),
            FileReceipt(f"shard-{rank:05d}.json", 700, digest),
        )
        for rank in range(2)
    ]
    return Manifest(
        id="step-00000001-0123abcd",
        sequence=1,
        step=1,
        world_size=2,
        shards=tuple(shards),
        created=0.0,
        tensors=dict.fromkeys(names, ONE),
        aliases={
            "per_rank.00000.ex.t": "per_rank.00000.ex.w",
            "per_rank.00001.ex.t": "per_rank.00001.ex.w",
            "model.t": "per_rank.00001.ex.w",
        },
        objects={"model": {"a": 1}},
    )


def test_own_names_there_and_back() -> None:
    names = OwnNames(1, frozenset({"ex"}))
    for live, saved in (("ex.w", "per_rank.00001.ex.w"), ("ex2.w", "ex2.w"), ("model.ex.w", "model.ex.w")):
        assert names.of(live) == saved
        assert names.live(saved) == live
    assert names.live("per_rank.00000.ex.w") == "per_rank.00000.ex.w"
    assert names.live("per_rank.00001.rng.cpu") == "per_rank.00001.rng.cpu"


def test_tensors_inside_of_documents_are_renamed_and_nothing_else() -> None:
    document = {"a": [{"$tensor": "ex.t"}, {"$tuple": [{"$tensor": "m.t"}]}], "$tensor": "ex.u", "b": "ex.t"}
    assert with_tensor_names(document, OwnNames(3, frozenset({"ex"})).of) == {
        "a": [{"$tensor": "per_rank.00003.ex.t"}, {"$tuple": [{"$tensor": "m.t"}]}],
        "$tensor": "ex.u",
        "b": "ex.t",
    }


def test_a_rank_sees_its_own_under_live_names_and_no_other_ranks() -> None:
    locals_: list[dict[str, Any]] = [
        {"ex": {"n": rank, "t": {"$tensor": f"per_rank.{rank:05d}.ex.x"}}, "rng": {}} for rank in range(2)
    ]
    for rank in range(2):
        seen = own_view(manifest(), locals_, frozenset({"ex"}), rank=rank, world_size=2)
        assert set(seen.tensors) == {"model.w", "ex.w", "per_rank.00001.rng.cpu", "ex2.w"}
        shared = {"model.t": "ex.w"} if rank == 1 else {}
        assert seen.aliases == {"ex.t": "ex.w", **shared}
        assert seen.objects == {"model": {"a": 1}, "ex": {"n": rank, "t": {"$tensor": "ex.x"}}}


def test_nothing_declared_changes_nothing() -> None:
    whole = manifest()
    assert own_view(whole, [], frozenset(), rank=0, world_size=7) is whole


def test_another_world_size() -> None:
    with pytest.raises(StateError, match="ex: saved per rank by 2 ranks"):
        own_view(manifest(), [{}, {}], frozenset({"ex"}), rank=0, world_size=3)
