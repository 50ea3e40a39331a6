"""Which part of a foreign tree is the model, which the optimizer, how far the training was. Pure.

Understood: Holdfast's own exports (exactly, by their marker), nanoGPT's `ckpt.pt`, scripts that save `model`,
`optimizer`, `step`, ..., bare state dicts, and what DCP's `get_state_dict` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.convert.state_tree import EXTRA, MARKER, TensorRef
from engine.errors import DamagedError, StateError
from engine.format.json import decode_metric, parse_canonical
from engine.format.names import MAX_NAME_BYTES

_MODELS = ("model", "state_dict", "model_state_dict", "module")
_OPTIMIZERS = ("optimizer", "optimizer_state_dict", "optim")
_STEPS = ("step", "iter_num", "global_step", "iteration")
_LOSSES = ("val_loss", "best_val_loss")
_CONFIGS = ("config", "model_args", "hparams", "args")
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


@dataclass(frozen=True, slots=True)
class Recognised:
    """A foreign checkpoint's parts.

    model: canonical parameter name -> tensor. optimizer: its state and groups, as they were saved.
    marker: what a Holdfast export says about itself; `tree` is then laid out as that export is.
    config: plain JSON values of the script's configuration.
    """

    model: Mapping[str, TensorRef]
    optimizer: Mapping[str, Any] | None = None
    step: int = 0
    epoch: int = 0
    tokens: int = 0
    val_loss: float | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    marker: Mapping[str, Any] | None = None
    tree: Mapping[str, Any] = field(default_factory=dict)


def recognise(tree: Mapping[str, Any], what: str) -> Recognised:
    """Find the parts. StateError, naming what is there, when there is no model; DamagedError."""
    marker = _marker(tree, what)
    config = _config(tree)
    model = _model(tree, what, marker)
    optimizer = next((tree[key] for key in _OPTIMIZERS if _is_optimizer(tree.get(key))), None)
    return Recognised(
        model=model,
        optimizer=optimizer,
        step=_count(tree, _STEPS),
        epoch=_count(tree, ("epoch",)),
        tokens=_count(tree, ("tokens",)),
        val_loss=_number(tree, _LOSSES),
        config=config,
        marker=marker,
        tree=tree,
    )


def canonical_name(name: str) -> str:
    """A parameter's name without what torch.compile, DDP, FSDP and activation checkpointing add to it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def tensors_by_name(value: Any, what: str) -> dict[str, TensorRef]:
    """The tensors of a state dict by canonical name; nested dicts give dotted names."""
    found: dict[str, TensorRef] = {}
    for key, item in value.items():
        if isinstance(item, TensorRef):
            entries = {str(key): item}
        elif isinstance(item, Mapping):
            entries = {f"{key}.{name}": ref for name, ref in tensors_by_name(item, what).items()}
        else:
            continue
        for name, ref in entries.items():
            if found.setdefault(canonical_name(name), ref) is not ref:
                raise StateError(f"{what} holds two tensors that are both called {canonical_name(name)}")
    return found


def _model(tree: Mapping[str, Any], what: str, marker: Mapping[str, Any] | None) -> dict[str, TensorRef]:
    if marker is not None:
        return {}
    candidates = [tree[key] for key in _MODELS if isinstance(tree.get(key), Mapping)]
    if not candidates and any(isinstance(value, TensorRef) for value in tree.values()):
        candidates = [{key: value for key, value in tree.items() if isinstance(value, TensorRef)}]
    for candidate in candidates:
        model = tensors_by_name(candidate, what)
        if model:
            return model
    there = ", ".join(str(key)[:MAX_NAME_BYTES] for key in list(tree)[:20]) or "nothing"
    raise StateError(f"{what} holds no model that can be recognised: it has {there}, and no 'model'")


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in value["param_groups"])
    )


def _count(tree: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = tree.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18:
            return value
    return 0


def _number(tree: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    for name in names:
        value = tree.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def _config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every configuration that is there, flat, as far as it is JSON; the model's own arguments win."""
    merged: dict[str, Any] = {}
    for name in _CONFIGS:
        value = tree.get(name)
        if isinstance(value, Mapping):
            merged |= {str(key): _json(item) for key, item in value.items() if _json(item) is not None}
    return merged


def _json(value: Any) -> Any:
    if isinstance(value, bool | str) or (isinstance(value, int | float) and value == value):
        finite = not isinstance(value, float) or abs(value) != float("inf")
        return value if finite and (not isinstance(value, int) or abs(value) < 2**63) else None
    if isinstance(value, list | tuple):
        items = [_json(item) for item in value]
        return items if all(item is not None for item in items) else None
    return None


def _marker(tree: Mapping[str, Any], what: str) -> dict[str, Any] | None:
    """What a Holdfast export says about itself. It is as untrusted as the file that it came in."""
    text = tree.get(MARKER)
    if not isinstance(text, str):
        return None
    found = parse_canonical(text.encode("utf-8", "replace"), what=f"the key {MARKER} of {what}")
    kinds = {
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
    if not isinstance(found, dict) or any(not isinstance(found.get(k), kind) for k, kind in kinds.items()):
        raise DamagedError(f"the key {MARKER} of {what} is not what an export writes there")
    if found["version"] != 1:
        raise DamagedError(f"{what} was exported by a newer Holdfast: update Holdfast to import it")
    try:
        found["metrics"] = {name: decode_metric(value) for name, value in found["metrics"].items()}
    except ValueError as error:
        raise DamagedError(f"the key {MARKER} of {what}: {error}") from error
    for key in (*found["modules"], *found["optimizers"]):
        if not isinstance(key, str) or not isinstance(tree.get(key), Mapping):
            raise DamagedError(f"{what} lacks the state {str(key)[:80]!r} that its key {MARKER} names")
    extra = tree.get(EXTRA, {})
    if not isinstance(extra, Mapping) or not all(isinstance(ref, TensorRef) for ref in extra.values()):
        raise DamagedError(f"the key {EXTRA} of {what} is not what an export writes there")
    return found
