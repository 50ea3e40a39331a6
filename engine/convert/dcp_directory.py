"""`--format dcp`: a stock DCP directory for plain `dcp.load(state, checkpoint_id=...)`."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.dcp_stock import write_stock
from engine.convert.state_tree import TensorRef, dcp_tree, map_refs
from engine.convert.tensors import Progress, fill, ignore_progress
from engine.state.tensor_format import to_torch

METADATA = ".metadata"
"""The file that makes a directory a DCP checkpoint."""


def dcp_bytes(source: CheckpointTensors, *, dtype: str | None, model_only: bool) -> int:
    """How many tensor bytes `write_dcp` will write; tied weights are written under each name."""
    tree = dcp_tree(source, dtype=dtype, model_only=model_only)
    return sum(ref.info.tensor_bytes for ref in _by_flat_name(tree).values())


def write_dcp(
    source: CheckpointTensors,
    folder: Path,
    *,
    dtype: str | None = None,
    model_only: bool = False,
    progress: Progress = ignore_progress,
) -> None:
    """Write the new directory `folder`, one tensor in memory at a time. DamagedError; StorageError."""
    tree = dcp_tree(source, dtype=dtype, model_only=model_only)
    refs = _by_flat_name(tree)

    def read(name: str) -> torch.Tensor:
        ref = refs[name]
        out = torch.empty(ref.info.shape, dtype=to_torch(ref.info.dtype))
        fill(out, source.windows(ref.name), progress)
        return out

    def meta(ref: TensorRef) -> torch.Tensor:
        return torch.empty(ref.info.shape, dtype=to_torch(ref.info.dtype), device="meta")

    write_stock(folder, map_refs(tree, meta), read)


def _by_flat_name(value: object, path: tuple[str, ...] = ()) -> dict[str, TensorRef]:
    """References by the flattened names of DCP's planner."""
    if isinstance(value, TensorRef):
        return {".".join(path): value}
    items: list[tuple[object, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found: dict[str, TensorRef] = {}
    for key, item in items:
        found |= _by_flat_name(item, (*path, str(key)))
    return found
