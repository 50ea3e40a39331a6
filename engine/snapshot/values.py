"""A state dict as JSON plus named tensors, and back.

A checkpoint holds tensors and JSON, nothing else: no pickle is ever written or read. A tensor leaf
becomes `{"$tensor": name}`; the few Python values that schedulers and loaders commonly hold and that
JSON lacks (tuples, non-finite floats, dicts with other than text keys) become one-key objects that start
with `$`. Everything else is refused with its key path and type.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from engine.errors import DamagedError, UnsavableValueError

Json = Any
_MAX_DEPTH = 48  # JSON containers; a manifest may nest 64, and puts a few around a value


def encode(value: object, path: str, tensors: dict[str, torch.Tensor]) -> Json:
    """Turn a value into JSON, moving its tensors into `tensors` under dotted names below `path`.

    Raises: UnsavableValueError for a value that is neither a tensor nor JSON, with its key path and type.
    """
    return _encode(value, path, tensors, 0)


def _encode(value: object, path: str, tensors: dict[str, torch.Tensor], depth: int) -> Json:
    if depth > _MAX_DEPTH:
        raise UnsavableValueError(f"{path}: nested deeper than {_MAX_DEPTH} levels (a cycle?)")
    if isinstance(value, torch.Tensor):
        if path in tensors:
            raise UnsavableValueError(f"{path}: two tensors have the same name; rename one of the keys")
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, str):
        _check_text(value, path)
        return value
    if value is None or isinstance(value, bool):
        return value
    if type(value) is int:
        if not -(2**63) < value < 2**63:
            raise UnsavableValueError(f"{path}: the integer {value} does not fit into 64 bits")
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        levels = 1 if isinstance(value, list) else 2
        items = [_encode(item, f"{path}.{i}", tensors, depth + levels) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if type(value) in (dict, collections.OrderedDict, collections.Counter, collections.defaultdict):
        return _encode_dict(value, path, tensors, depth)  # type: ignore[arg-type]
    raise UnsavableValueError(
        f"{path}: a {type(value).__module__}.{type(value).__qualname__} is neither a tensor nor JSON, and "
        "Holdfast writes no pickle; turn it into a tensor, number, string, list or dict in state_dict()"
    )


def _encode_dict(
    value: Mapping[object, object], path: str, tensors: dict[str, torch.Tensor], depth: int
) -> Json:
    for key in value:
        if isinstance(key, str):
            _check_text(key, path)
    plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
    if plain and not isinstance(value, collections.Counter):
        # Not str(key): that of an enum whose members are texts is its name.
        texts = ((str.__str__(key), item) for key, item in value.items() if isinstance(key, str))
        return {text: _encode(item, f"{path}.{text}", tensors, depth + 1) for text, item in texts}
    # MultiStepLR keeps its milestones in a Counter of ints; optimizers key their state by int.
    for key in value:
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise UnsavableValueError(
                f"{path}: the key {key!r} is a {type(key).__name__}; keys must be text or integers"
            )
        if isinstance(key, int) and not -(2**63) < key < 2**63:
            raise UnsavableValueError(f"{path}: the key {key} does not fit into 64 bits")
    kind = "$counter" if isinstance(value, collections.Counter) else "$items"
    return {kind: [[k, _encode(v, f"{path}.{k}", tensors, depth + 3)] for k, v in value.items()]}


def _check_text(text: str, path: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UnsavableValueError(f"{path}: {text[:40]!a} is not Unicode text") from None


def decode(value: Json, tensor: Callable[[str], torch.Tensor]) -> Any:
    """Turn JSON of `encode` back into the value; `tensor(name)` supplies each tensor leaf.

    Raises: DamagedError for an object that `encode` cannot have made.
    """
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key == "$tensor" and isinstance(inner, str):
            return tensor(inner)
        if key == "$float" and inner in ("nan", "inf", "-inf"):
            return float(inner)
        if key == "$tuple" and isinstance(inner, list):
            return tuple(decode(item, tensor) for item in inner)
        if key in ("$items", "$counter") and isinstance(inner, list):
            return _decode_items(key, inner, tensor)
    if any(key.startswith("$") for key in value):
        raise DamagedError(f"a stored value has the unknown form {sorted(value)[:3]}")
    return {key: decode(inner, tensor) for key, inner in value.items()}


def _decode_items(kind: str, items: list[Json], tensor: Callable[[str], torch.Tensor]) -> Any:
    pairs: dict[Any, Any] = {}
    for item in items:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int)):
            raise DamagedError("a stored dict is not a list of pairs")
        pairs[item[0]] = decode(item[1], tensor)
    return collections.Counter(pairs) if kind == "$counter" else pairs


def tensor_names(value: Json) -> list[str]:
    """The names of all tensor leaves in encoded JSON, in order."""
    if isinstance(value, list):
        return [name for item in value for name in tensor_names(item)]
    if not isinstance(value, dict):
        return []
    if len(value) == 1 and isinstance(value.get("$tensor"), str):
        return [value["$tensor"]]
    return [name for inner in value.values() for name in tensor_names(inner)]
