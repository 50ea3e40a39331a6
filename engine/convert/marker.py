"""The marker of a Holdfast export. It is as untrusted as its file. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.convert.state_tree import EXTRA, MARKER, TensorRef
from engine.errors import DamagedError
from engine.format.json import decode_metric, parse_canonical

_KINDS = {
    "version": int,
    "modules": list,
    "optimizers": list,
    "aliases": dict,
    "objects": dict,
    "local": dict,
    "config": dict,
    "metrics": dict,
    "step": int,
    "epoch": int,
    "tokens": int,
}


def read_marker(tree: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """The marker in the tree of one of our exports; None for a foreign one. DamagedError."""
    text = tree.get(MARKER)
    if not isinstance(text, str):
        return None
    found = parse_canonical(text.encode("utf-8", "replace"), what=f"the key {MARKER} of {what}")
    if not isinstance(found, dict) or any(not isinstance(found.get(k), kind) for k, kind in _KINDS.items()):
        raise DamagedError(f"the key {MARKER} of {what} is not what an export writes there")
    if found["version"] != 1:
        raise DamagedError(f"{what} was exported by a newer Holdfast: update Holdfast to import it")
    try:
        found["metrics"] = {name: decode_metric(value) for name, value in found["metrics"].items()}
    except ValueError as error:
        raise DamagedError(f"the key {MARKER} of {what}: {error}") from error
    for key in (*found["modules"], *found["optimizers"]):
        if not isinstance(key, str) or not isinstance(tree.get(key), Mapping):
            raise DamagedError(f"{what} lacks the state {str(key)[:80]!r} that its key {MARKER} lists")
    extra = tree.get(EXTRA, {})
    if not isinstance(extra, Mapping) or not all(isinstance(ref, TensorRef) for ref in extra.values()):
        raise DamagedError(f"the key {EXTRA} of {what} is not what an export writes there")
    return found


_PROGRESS = ("step", "epoch", "tokens", "val_loss", "config", "rng_state", "cuda_rng_state")


def added_keys(tree: Mapping[str, Any], marker: Mapping[str, Any]) -> list[str]:
    """Keys of an exported tree that the export did not write."""
    known = {MARKER, EXTRA, *_PROGRESS, *marker["modules"], *marker["optimizers"], *marker["objects"]}
    return [str(key) for key in tree if key not in known]
