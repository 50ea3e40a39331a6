"""A checkpoint of one rank that never sees a disk: what is saved of a state, and restoring it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.format.json import canonical_bytes, parse_canonical
from engine.format.manifest import FileReceipt, Manifest, ShardReceipt, TensorInfo
from engine.restore.destination import Destination
from engine.restore.filters import Filter
from engine.state.capture import StateCapture
from engine.state.tensor_format import from_torch

_DIGEST = "0123456789abcdef" * 2


@dataclass(frozen=True)
class InMemory:
    """A manifest, each rank's own values, and what the tensors held."""

    manifest: Manifest
    locals_: list[dict[str, Any]]
    tensors: Mapping[str, torch.Tensor]


def saved_of(state: Mapping[str, Any]) -> InMemory:
    """Save a state of one rank."""
    captured = StateCapture(state, (), 0).capture()
    files = (FileReceipt("shard-00000.safetensors", 1 << 20, _DIGEST),)
    manifest = Manifest(
        id="step-00000001-aaaaaaaa",
        sequence=1,
        step=1,
        created=0.0,
        reasons=("manual",),
        world_size=1,
        tensors={n: TensorInfo(from_torch(t.dtype, n), tuple(t.shape)) for n, t in captured.tensors.items()},
        aliases=captured.aliases,
        objects=_through_json(captured.shared),
        shards=(ShardReceipt(0, files, FileReceipt("shard-00000.json", 1, _DIGEST)),),
    )
    tensors = {name: tensor.detach().clone() for name, tensor in captured.tensors.items()}
    return InMemory(manifest, [_through_json(captured.local)], tensors)


def destination(state: Mapping[str, Any], saved: InMemory, **filter: Any) -> Destination:
    """A state of one rank, made ready for what was saved."""
    return Destination(
        StateCapture(state, (), 0),
        saved.manifest,
        saved.locals_,
        rank=0,
        world_size=1,
        seed=0,
        filter=Filter(**filter),
    )


def restored(saved: InMemory, state: dict[str, Any], **filter: Any) -> dict[str, Any]:
    """Restore into a state, which is returned."""
    found = destination(state, saved, **filter)
    found.check("the checkpoint")
    with torch.no_grad():
        for name, tensor in found.tensors.items():
            source = saved.tensors[found.sources[name]]
            assert source.dtype == tensor.dtype
            tensor[tuple(map(slice, source.shape))] = source
    found.finish()
    return state


def _through_json(value: Any) -> Any:
    return parse_canonical(canonical_bytes(value), what="a document")
