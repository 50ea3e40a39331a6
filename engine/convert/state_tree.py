"""A checkpoint as the nested dict that training scripts save, with references instead of tensors.

JSON text under the key `holdfast` has everything that the plain form would lose, so that importing it again
gives a checkpoint that resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.convert.checkpoint import CheckpointTensors
from engine.convert.checkpoint_parts import Contents, contents_of
from engine.convert.plain_values import plain
from engine.convert.tensors import converted
from engine.directory.record import VAL_LOSS
from engine.errors import DamagedError
from engine.format.json import canonical_bytes, encode_metric
from engine.format.manifest import Manifest, TensorInfo
from engine.state.captured import RNG_KEY
from engine.state.optimizer_document import split_path
from engine.state.values import decode, tensor_names

MARKER = "holdfast"
"""The key of the values that only Holdfast reads."""

EXTRA = "holdfast_tensors"
"""The key of the tensors that belong to neither a module nor an optimizer, by full names."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorRef:
    """A tensor to read later, by its name in the source. One object represents one storage."""

    name: str
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Unheld:
    """Replaces a value that a checkpoint cannot store; `words` describes it, with an article."""

    words: str


def torch_tree(source: CheckpointTensors, *, dtype: str | None, model_only: bool) -> dict[str, Any]:
    """The tree of a `.pt`: optimizers with numbered parameters, other state as its objects returned it."""
    refs = _Refs(source.manifest, dtype)
    contents = contents_of(source.manifest)
    tree = _modules(contents, refs)
    if not model_only:
        for key, fields in contents.optimizers.items():
            tree[key] = _numbered(_optimizer(source.manifest, key, fields, refs))
        tree |= _other_values(source.manifest, contents, refs)
        tree |= _random_states(source, refs)
    # A state key of the same name wins: it is what the script itself would have saved.
    tree = {**_progress(source.manifest), "config": dict(source.manifest.config), **tree}
    return tree | _marker(source, contents, refs, model_only=model_only)


def dcp_tree(source: CheckpointTensors, *, dtype: str | None, model_only: bool) -> dict[str, Any]:
    """The tree of a DCP directory: in the form of `get_state_dict`, with parameters by name."""
    refs = _Refs(source.manifest, dtype)
    contents = contents_of(source.manifest)
    tree = _modules(contents, refs)
    if not model_only:
        for key, fields in contents.optimizers.items():
            tree[key] = _optimizer(source.manifest, key, fields, refs)
    tree = {**_progress(source.manifest), **tree}
    return tree | _marker(source, contents, refs, model_only=model_only)


def map_refs(value: Any, replace: Callable[[TensorRef], Any]) -> Any:
    """The same tree with every reference replaced."""
    if isinstance(value, TensorRef):
        return replace(value)
    if isinstance(value, dict):
        return {key: map_refs(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_refs(item, replace) for item in value)
    return value


def refs_in(value: Any) -> list[TensorRef]:
    """Every distinct reference of a tree, in order."""
    found: dict[int, TensorRef] = {}

    def note(ref: TensorRef) -> None:
        found.setdefault(id(ref), ref)

    map_refs(value, note)
    return list(found.values())


class _Refs:
    """One reference per tensor. `--dtype` applies to modules, never to an optimizer's state."""

    def __init__(self, manifest: Manifest, dtype: str | None) -> None:
        self._manifest = manifest
        self._dtype = dtype
        self._made: dict[str, TensorRef] = {}

    def module(self, name: str) -> TensorRef:
        return self._ref(name, self._dtype)

    def value(self, name: str) -> TensorRef:
        return self._ref(name, None)

    def _ref(self, name: str, dtype: str | None) -> TensorRef:
        name = self._manifest.aliases.get(name, name)
        info = self._manifest.tensors.get(name)
        if info is None:
            raise DamagedError(f"{self._manifest.id} refers to the tensor {name}, which it does not list")
        return self._made.setdefault(name, TensorRef(name, converted(info, dtype)))


def _modules(contents: Contents, refs: _Refs) -> dict[str, Any]:
    return {
        key: {name: refs.module(stored) for name, stored in names.items()}
        for key, names in contents.modules.items()
    }


def _optimizer(
    manifest: Manifest, key: str, fields: Mapping[str, Mapping[str, str]], refs: _Refs
) -> dict[str, Any]:
    document = decode(plain(manifest.objects[key]), refs.value)  # type: ignore[arg-type]
    state: dict[str, dict[str, Any]] = {
        parameter: {field: refs.value(name) for field, name in names.items()}
        for parameter, names in fields.items()
    }
    parameters = {str(name) for group in document["param_groups"] for name in group["params"]}
    for path, value in document.get("counters", {}).items():
        parameter, field = split_path(path, parameters)
        state.setdefault(parameter, {})[field] = value
    more = document.get("more", {})
    state |= more.get("entries", {})
    # A number would be taken as a parameter's.
    state |= {name: value for name, value in more.get("extra", ()) if isinstance(name, str)}
    own = more.get("own") if not more.get("own_whole") else None
    return {**(own or {}), "state": state, "param_groups": document["param_groups"]}


def _numbered(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The form for `Optimizer.load_state_dict`: parameters by their position over all groups."""
    numbers: dict[str, int] = {}
    groups = []
    for group in optimizer["param_groups"]:
        own = [numbers.setdefault(name, len(numbers)) for name in group["params"]]
        groups.append({**group, "params": own})
    found = optimizer["state"]
    state = dict(sorted((numbers[name], fields) for name, fields in found.items() if name in numbers))
    state |= {name: value for name, value in found.items() if name not in numbers}
    return {**optimizer, "state": state, "param_groups": groups}


def _other_values(manifest: Manifest, contents: Contents, refs: _Refs) -> dict[str, Any]:
    return {
        key: decode(plain(value), refs.value)  # type: ignore[arg-type]
        for key, value in manifest.objects.items()
        if key not in contents.optimizers and key not in contents.modules
    }


def _random_states(source: CheckpointTensors, refs: _Refs) -> dict[str, Any]:
    """Rank 0's generators, for `torch.set_rng_state` and `torch.cuda.set_rng_state`."""
    saved = source.indexes[0].local.get(RNG_KEY)
    if not isinstance(saved, dict) or "torch" not in saved:
        return {}
    states = decode(saved, refs.value)  # type: ignore[arg-type]
    found = {"rng_state": states["torch"]}
    return found | ({"cuda_rng_state": states["cuda"]} if "cuda" in states else {})


def _progress(manifest: Manifest) -> dict[str, Any]:
    loss = manifest.metrics.get(VAL_LOSS)
    return {
        "step": manifest.step,
        "epoch": manifest.epoch,
        "tokens": manifest.tokens,
        "val_loss": loss if loss is not None and math.isfinite(loss) else None,
    }


def _marker(
    source: CheckpointTensors, contents: Contents, refs: _Refs, *, model_only: bool
) -> dict[str, Any]:
    manifest = source.manifest
    local = {} if model_only else dict(source.indexes[0].local)
    objects = {} if model_only else dict(manifest.objects)
    names = [*tensor_names(objects), *tensor_names(local), *(() if model_only else contents.inside)]
    document = {
        "version": 1,
        "id": manifest.id,
        "modules": sorted(contents.modules),
        "optimizers": [] if model_only else sorted(contents.optimizers),
        "aliases": dict(manifest.aliases),
        "objects": objects,
        "local": local,
        "config": dict(manifest.config),
        "metrics": {name: encode_metric(value) for name, value in manifest.metrics.items()},
        "step": manifest.step,
        "epoch": manifest.epoch,
        "tokens": manifest.tokens,
    }
    extra = {name: refs.value(name) for name in names}
    return {MARKER: canonical_bytes(document).decode("utf-8"), **({EXTRA: extra} if extra else {})}
