"""Manifests: round trip, no changed byte goes unnoticed, and every contradiction is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DamagedError, HoldfastError, NewerFormatError
from engine.format import digest
from engine.format.json import canonical_bytes
from engine.format.manifest import FileReceipt, Manifest, ShardReceipt, TensorInfo

ID = "step-00000250-1f0c9a3e"
DIGEST = "0123456789abcdef" * 2


def receipt(rank: int) -> ShardReceipt:
    return ShardReceipt(
        rank,
        (
            FileReceipt(f"shard-{rank:05d}.safetensors", 5000, DIGEST),
            FileReceipt(f"shard-{rank:05d}-1.safetensors", 4500, DIGEST),
        ),
        FileReceipt(f"shard-{rank:05d}.json", 700, DIGEST),
    )


MANIFEST = Manifest(
    id=ID,
    sequence=7,
    parent="step-00000200-00000000",
    parents=("step-00000100-00000000",),
    step=250,
    epoch=1,
    tokens=1000,
    created=1_700_000_000.25,
    reasons=("interval", "best"),
    metrics={"val_loss": 3.25, "grad_norm": float("inf")},
    world_size=2,
    mesh={"names": ["dp"], "shape": [2]},
    tensors={"model.w": TensorInfo("F32", (10, 3)), "step": TensorInfo("I64", ())},
    aliases={"model.head": "model.w"},
    objects={"loader": {"position": 7}},
    config={"seed": 1},
    software={"torch": "2.13.0"},
    shards=(receipt(0), receipt(1)),
)
RAW = MANIFEST.to_bytes()


def sealed(document: dict[str, Any]) -> bytes:
    """The document with the digest it would have been written with."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return canonical_bytes({**rest, "digest": digest.bytes_digest(canonical_bytes(rest))})


def test_round_trip() -> None:
    again = Manifest.from_bytes(RAW, what="x")
    assert again == MANIFEST
    assert again.to_bytes() == RAW
    assert sealed(json.loads(RAW)) == RAW
    assert again.total_bytes == 2 * (5000 + 4500 + 700)


def test_nan_metric_round_trip() -> None:
    raw = dataclasses.replace(MANIFEST, metrics={"val_loss": float("nan")}).to_bytes()
    assert b'"val_loss":"nan"' in raw
    assert Manifest.from_bytes(raw, what="x").to_bytes() == raw


def test_smallest() -> None:
    smallest = Manifest(
        id="step-00000000-00000000",
        sequence=1,
        step=0,
        world_size=1,
        shards=(ShardReceipt(0, (), FileReceipt("shard-00000.json", 100, DIGEST)),),
        tensors={},
        created=0.0,
    )
    assert Manifest.from_bytes(smallest.to_bytes(), what="x") == smallest


def test_any_changed_byte_is_noticed() -> None:
    """Every byte, three ways; and every cut."""
    for position in range(len(RAW)):
        for flip in (0x01, 0x20, 0x80):
            damaged = bytearray(RAW)
            damaged[position] ^= flip
            with pytest.raises(DamagedError) as raised:
                Manifest.from_bytes(bytes(damaged), what="x")
            assert not isinstance(raised.value, NewerFormatError)
    for size in range(len(RAW)):
        with pytest.raises(DamagedError):
            Manifest.from_bytes(RAW[:size], what="x")
    with pytest.raises(DamagedError):
        Manifest.from_bytes(RAW + b" ", what="x")


def test_newer_format() -> None:
    raw = sealed({**json.loads(RAW), "format_version": 3, "something": "new"})
    with pytest.raises(NewerFormatError, match=r"m\.json has format version 3.*update Holdfast"):
        Manifest.from_bytes(raw, what="m.json")


def put(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.update(values)


def in_shard(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["shards"][0].update(values)


def in_file(**values: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["shards"][0]["files"][0].update(values)


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda document: document.pop("step"),
    "unknown field": put(code="x"),
    "id elsewhere": put(id="../../etc"),
    "id of another step": put(id="step-00000251-1f0c9a3e"),
    "sequence negative": put(sequence=-1),
    "sequence is true": put(sequence=True),
    "step beyond 18 digits": put(step=10**18),
    "epoch is text": put(epoch="1"),
    "tokens negative": put(tokens=-1),
    "created is text": put(created="now"),
    "created is true": put(created=True),
    "no reason": put(reasons=[]),
    "unknown reason": put(reasons=["whim"]),
    "reason twice": put(reasons=["best", "best"]),
    "reasons are numbers": put(reasons=[1]),
    "parent elsewhere": put(parent="/etc"),
    "parent is a number": put(parent=1),
    "parents elsewhere": put(parents=["x"]),
    "metric is text": put(metrics={"val_loss": "3.25"}),
    "metric is a list": put(metrics={"val_loss": [1]}),
    "world of nobody": put(world_size=0),
    "world of one": put(world_size=1),
    "world of millions": put(world_size=2**62),
    "mesh is a list": put(mesh=[]),
    "tensors is a list": put(tensors=[]),
    "tensor is a list": put(tensors={"w": []}),
    "tensor of no dtype": put(tensors={"w": {"shape": []}}, aliases={}),
    "tensor of unknown dtype": put(tensors={"w": {"shape": [], "dtype": "object"}}, aliases={}),
    "tensor of negative shape": put(tensors={"w": {"shape": [-1, -1], "dtype": "F32"}}, aliases={}),
    "tensor larger than all shards": put(tensors={"w": {"shape": [4751], "dtype": "F32"}}, aliases={}),
    "tensor of 2**124 elements": put(tensors={"w": {"shape": [2**62, 2**62], "dtype": "F32"}}, aliases={}),
    "tensor without a name": put(tensors={"": {"shape": [], "dtype": "F32"}}, aliases={}),
    "alias of nothing": put(aliases={"head": "nothing"}),
    "alias of itself": put(aliases={"head": "head"}),
    "alias that is a tensor": put(aliases={"step": "model.w"}),
    "alias is a list": put(aliases={"head": ["model.w"]}),
    "objects is a list": put(objects=[]),
    "config is text": put(config="x"),
    "software is nested": put(software={"torch": {}}),
    "a shard less": lambda document: document["shards"].pop(),
    "shards in another order": lambda document: document["shards"].reverse(),
    "a shard twice": lambda document: document["shards"].__setitem__(1, document["shards"][0]),
    "shard of another rank": in_shard(rank=1),
    "shard unknown field": in_shard(x=1),
    "shard index elsewhere": in_shard(index={"file": "../shard-00000.json", "bytes": 1, "digest": DIGEST}),
    "shard index of another rank": in_shard(index={"file": "shard-00001.json", "bytes": 1, "digest": DIGEST}),
    "shard index is a list": in_shard(index=[]),
    "file elsewhere": in_file(file="/etc/passwd"),
    "file of another rank": in_file(file="shard-00001.safetensors"),
    "file of another part": in_file(file="shard-00000-1.safetensors"),
    "file of negative size": in_file(bytes=-1),
    "file of no digest": in_file(digest=""),
    "file unknown field": in_file(x=1),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(change: Callable[[dict[str, Any]], object]) -> None:
    """Each with the right digest: whoever wrote it meant it."""
    document = json.loads(RAW)
    change(document)
    raw = sealed(document)
    assert raw != RAW
    with pytest.raises(DamagedError, match=r"^m\.json") as raised:
        Manifest.from_bytes(raw, what="m.json")
    assert "own digest" not in str(raised.value)


def test_the_largest_tensor_that_the_shards_can_hold() -> None:
    fits = {"w": TensorInfo("F32", (4750,))}
    assert dataclasses.replace(MANIFEST, tensors=fits, aliases={}).tensors == fits


@pytest.mark.parametrize("document", [[], 1, "x", None, {}, {"digest": DIGEST}])
def test_not_a_manifest(document: object) -> None:
    with pytest.raises(DamagedError):
        Manifest.from_bytes(canonical_bytes(document), what="x")


@pytest.mark.parametrize("values", [{"config": {"a": {1}}}, {"objects": {"a": float("nan")}}])
def test_values_that_are_not_json_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(config|objects)\.a is"):
        dataclasses.replace(MANIFEST, **values).to_bytes()


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-5, 2**63 - 1)
    | st.text(max_size=5)
    | st.lists(st.integers(-2, 2**40), max_size=3)
    | st.just({})
)


@given(st.sampled_from(sorted(json.loads(RAW))), VALUES)
def test_any_value_anywhere_is_refused_or_loads(name: str, value: object) -> None:
    raw = sealed({**json.loads(RAW), name: value})
    try:
        manifest = Manifest.from_bytes(raw, what="x")
    except HoldfastError as error:
        said = str(error)
    else:
        said = ""
        assert Manifest.from_bytes(manifest.to_bytes(), what="x") == manifest
    assert "\n" not in said
    assert len(said) < 1000
