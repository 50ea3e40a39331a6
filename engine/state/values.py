"""A value as JSON plus named tensors, and back.

A checkpoint holds tensors and JSON, nothing else: no pickle is ever written or read. A tensor becomes
`{"$tensor": name}`; a Python value that JSON lacks becomes an object with one key that starts with `$`. A
value without a form is refused with its key path and type.
"""

from __future__ import annotations

import collections
import enum
import json
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import numpy as np
import torch

from engine.errors import DamagedError, UnsavableValueError
from engine.state import leaves
from engine.state.arrays import decode_array, decode_scalar, encode_array, encode_scalar
from engine.state.composites import decode_composite, encode_composite, is_composite, missing_composite
from engine.state.leaves import check_text
from engine.state.named_types import decode_named, encode_enum, missing_class, type_name
from engine.state.tensor_format import check_savable

Json = Any
MAX_DEPTH = 48  # JSON containers: a manifest may nest 64 and puts a few around a value

_BEYOND = 2**63

_FACTORIES: dict[str, type] = {
    kind.__name__: kind for kind in (dict, list, set, tuple, int, float, str, bool, bytes, complex)
}
"""The default factories of defaultdicts that a checkpoint may name."""

_REMEDIES: Mapping[str, str] = {
    "torch._C.Generator": "make it an entry of the state by itself, or store its get_state()",
    "numpy.random._generator.Generator": "make it an entry of the state by itself, or store "
    "its bit_generator.state",
    "numpy.random.mtrand.RandomState": "make it an entry of the state by itself, or store its get_state()",
    "random.Random": "make it an entry of the state by itself, or store its getstate()",
    "argparse.Namespace": "store vars() of it",
    "types.SimpleNamespace": "store vars() of it",
    "builtins.range": "store list() of it",
    "builtins.memoryview": "store bytes() of it",
    "array.array": "store numpy.asarray() of it",
    **dict.fromkeys(
        ("decimal.Decimal", "fractions.Fraction", "uuid.UUID", "torch.layout", "torch.memory_format"),
        "store str() of it",
    ),
    "builtins.mappingproxy": "store dict() of it",
    "builtins.function": "store its name",
}


def encode(value: object, path: str, tensors: dict[str, torch.Tensor], *, keep_order: bool = False) -> Json:
    """Turn a value into JSON; its tensors are added to `tensors` under dotted names below `path`.

    keep_order: preserve the order of dicts' keys, which JSON objects do not: the format sorts them.
    Raises: UnsavableValueError for a value without a form, with its key path, its type and what to do.
    """
    return _Encoder(tensors, keep_order).encode(value, path, 0)


class _Encoder:
    def __init__(self, tensors: dict[str, torch.Tensor], keep_order: bool) -> None:
        self._tensors = tensors
        self._keep_order = keep_order
        self._no_tensors = ""

    def encode(self, value: Any, path: str, depth: int) -> Json:
        if depth > MAX_DEPTH:
            raise too_deep(path)
        kind = type(value)
        if kind is str:
            return check_text(value, path)
        if kind is int:
            return leaves.encode_int(value)
        if kind is float:
            return leaves.encode_float(value)
        if value is None or kind is bool:
            return value
        if isinstance(value, torch.Tensor):
            if is_composite(value):
                return encode_composite(value, path, lambda part, at: self.encode(part, at, depth + 4))
            return self._tensor(value, path)
        if kind is dict or kind in (collections.OrderedDict, collections.Counter, collections.defaultdict):
            return self._mapping(value, path, depth)
        if kind is list:
            return self._items(value, path, depth)
        if kind is tuple:
            return {"$tuple": self._items(value, path, depth + 1)}
        return self._rare(value, path, depth)

    def _rare(self, value: Any, path: str, depth: int) -> Json:
        found = leaves.encode_leaf(value, path)
        if found is not None:
            return found
        kind = type(value)
        if isinstance(value, enum.Enum):
            return encode_enum(value, path)
        if isinstance(value, np.generic):
            return encode_scalar(value, path)
        if kind is np.ndarray:
            return encode_array(value, path, lambda tensor: self._tensor(tensor, path))
        if kind in (set, frozenset):
            return {f"${kind.__name__}": self._sorted_items(value, path, depth + 1)}
        if kind is collections.deque:
            return {"$deque": [value.maxlen, self._items(value, path, depth + 2)]}
        if isinstance(value, tuple) and _is_namedtuple(value):
            return self._namedtuple(value, path, depth)
        if kind is torch.torch_version.TorchVersion:  # `torch.__version__`: text, with an order of its own
            return str(value)
        raise UnsavableValueError(_refusal(value, path))

    def _tensor(self, value: torch.Tensor, path: str) -> Json:
        if self._no_tensors:
            raise UnsavableValueError(f"{path}: a tensor in {self._no_tensors}; use a list or a dict")
        check_savable(path, value)
        name, number = path, 2
        while name in self._tensors:  # the keys 1 and "1", or "a.b" and "b" in "a"
            name, number = f"{path}~{number}", number + 1
        self._tensors[name] = value
        return {"$tensor": name}

    def _items(self, value: Any, path: str, depth: int) -> list[Json]:
        # A history of losses may have a million items: making a path for each would take most of the time.
        return [
            item
            if (type(item) is float and isfinite(item)) or (type(item) is int and -_BEYOND < item < _BEYOND)
            else self.encode(item, f"{path}.{i}", depth + 1)
            for i, item in enumerate(value)
        ]

    def _sorted_items(self, value: Any, path: str, depth: int) -> list[Json]:
        """A set's items, sorted: two processes may iterate over equal sets in different orders."""
        return sorted((self._hashed(item, path, depth + 1) for item in value), key=_spelled)

    def _hashed(self, value: Any, path: str, depth: int) -> Json:
        """A key of a dict or an item of a set."""
        before, self._no_tensors = self._no_tensors, "a key or a set"
        try:
            return self.encode(value, path, depth)
        finally:
            self._no_tensors = before

    def _namedtuple(self, value: Any, path: str, depth: int) -> Json:
        return {
            "$namedtuple": {
                "type": type_name(value, path, "a tuple or a dict of it (_asdict())"),
                "fields": list(value._fields),
                "items": [
                    self.encode(item, f"{path}.{field}", depth + 3)
                    for field, item in zip(value._fields, value, strict=True)
                ],
            }
        }

    def _mapping(self, value: Any, path: str, depth: int) -> Json:
        kind = type(value)
        for key in value:
            if isinstance(key, str):
                check_text(key, path)
        texts = all(type(key) is str for key in value)
        plain = kind is dict and texts and not any(key.startswith("$") for key in value)
        if plain and (not self._keep_order or list(value) == sorted(value)):
            return {key: self.encode(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
        simple = texts or all(type(key) in (str, int) and _is_short(key) for key in value)
        if simple and kind in (dict, collections.Counter) and not getattr(value, "__dict__", None):
            # MultiStepLR keeps its milestones in a Counter of ints; optimizers key their state by int.
            form = "$items" if kind is dict else "$counter"
            return {form: [[k, self.encode(v, f"{path}.{k}", depth + 3)] for k, v in value.items()]}
        return {"$mapping": self._any_mapping(value, path, depth + 1)}

    def _any_mapping(self, value: Any, path: str, depth: int) -> Json:
        pairs = [
            [self._hashed(key, f"{path}.{key!r}", depth + 3), self.encode(item, f"{path}.{key}", depth + 3)]
            for key, item in value.items()
        ]
        found: dict[str, Json] = {"kind": type(value).__name__, "pairs": pairs}
        more = vars(value) if hasattr(value, "__dict__") else {}
        if more:  # a module's state_dict() keeps versions there
            found["attributes"] = self.encode(dict(more), f"{path}.__dict__", depth + 1)
        if isinstance(value, collections.defaultdict):
            factory = value.default_factory
            name = getattr(factory, "__name__", "")
            if factory is not None and _FACTORIES.get(name) is not factory:
                raise UnsavableValueError(
                    f"{path}: a defaultdict's factory must be None or one of {', '.join(_FACTORIES)}, "
                    f"but is {factory!r}; store dict() of it"
                )
            found["factory"] = name if factory is not None else None
        return found


def too_deep(path: str) -> UnsavableValueError:
    """The error for containers nested deeper than the format allows."""
    return UnsavableValueError(f"{path}: nested deeper than {MAX_DEPTH} levels (a cycle?)")


def _is_short(key: object) -> bool:
    return not isinstance(key, int) or -(2**63) < key < 2**63


def _is_namedtuple(value: Any) -> bool:
    fields = getattr(value, "_fields", None)
    is_one = isinstance(fields, tuple) and len(fields) == len(value)
    return is_one and not getattr(value, "__dict__", None)


def _spelled(value: Json) -> str:
    return json.dumps(value, sort_keys=True)


def _refusal(value: object, path: str) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    remedy = _REMEDIES.get(name, "")
    for base in (dict, list, tuple, str, int, float, set, bytes):
        if isinstance(value, base) and not remedy:
            remedy = f"store {base.__name__}() of it"
    if not remedy and isinstance(value, np.ndarray):
        remedy = "store numpy.asarray() of it"
    if not remedy and hasattr(value, "__dataclass_fields__"):
        remedy = "store dataclasses.asdict() of it"
    if not remedy and hasattr(value, "state_dict"):
        remedy = "make it an entry of the state by itself, or store its state_dict()"
    remedy = remedy or "turn it into a tensor, number, string, list or dict"
    return (
        f"{path}: a checkpoint cannot hold a {name}, because Holdfast stores no pickles; {remedy}"
    )


def decode(value: Json, tensor: Callable[[str], torch.Tensor]) -> Any:
    """The inverse of `encode`; `tensor(name)` returns each tensor.

    Raises: DamagedError for an object that `encode` cannot have made; StateMismatchError for a value of a
        class that this program does not have.
    """
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, inner),) = value.items()
        if key.startswith("$"):
            return _decode_form(key, inner, tensor)
    if any(key.startswith("$") for key in value):
        raise DamagedError(f"a stored value has the unknown form {sorted(value)[:3]}")
    return {key: decode(inner, tensor) for key, inner in value.items()}


def _decode_form(form: str, inner: Json, tensor: Callable[[str], torch.Tensor]) -> Any:
    if form == "$tensor" and isinstance(inner, str):
        return tensor(inner)
    if form == "$float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if form in _SEQUENCES and isinstance(inner, list):
        return _of_hashable(form, lambda: _SEQUENCES[form](decode(item, tensor) for item in inner))
    if form in ("$items", "$counter") and isinstance(inner, list):
        return _decode_items(form, inner, tensor)
    if form == "$mapping" and isinstance(inner, dict):
        return _decode_mapping(inner, tensor)
    if form == "$deque" and _is_deque(inner):
        return collections.deque((decode(item, tensor) for item in inner[1]), inner[0])
    if form == "$array":
        return decode_array(inner, tensor)
    if form == "$composite":
        return decode_composite(inner, lambda part: decode(part, tensor))
    if form == "$scalar":
        return decode_scalar(inner)
    if form in ("$enum", "$namedtuple"):
        items = inner.get("items") if isinstance(inner, dict) else None
        return decode_named(form, inner, decode(items, tensor))
    if leaves.is_leaf_form(form):
        return leaves.decode_leaf(form, inner)
    raise DamagedError(f"a stored value has the unknown form {[form]}")


def _is_deque(inner: Json) -> bool:
    if not (isinstance(inner, list) and len(inner) == 2 and isinstance(inner[1], list)):
        return False
    return inner[0] is None or (type(inner[0]) is int and len(inner[1]) <= inner[0])


_SEQUENCES: dict[str, Callable[[Any], Any]] = {"$tuple": tuple, "$set": set, "$frozenset": frozenset}


def _of_hashable(form: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except TypeError as error:
        raise DamagedError(f"a stored {form} is malformed: {error}") from None


def _decode_items(kind: str, items: list[Json], tensor: Callable[[str], torch.Tensor]) -> Any:
    pairs: dict[Any, Any] = {}
    for item in items:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str | int)):
            raise DamagedError("a stored dict is not a list of pairs")
        pairs[item[0]] = decode(item[1], tensor)
    return collections.Counter(pairs) if kind == "$counter" else pairs


def _decode_mapping(inner: dict[str, Json], tensor: Callable[[str], torch.Tensor]) -> Any:
    kind, items, factory = inner.get("kind"), inner.get("pairs"), inner.get("factory")
    known = kind in ("dict", "OrderedDict", "Counter", "defaultdict")
    if not known or not isinstance(items, list) or not (factory is None or factory in _FACTORIES):
        raise DamagedError(f"a stored $mapping is malformed: {str(inner)[:40]!a}")
    if not all(isinstance(item, list) and len(item) == 2 for item in items):
        raise DamagedError("a stored $mapping is not a list of pairs")
    pairs = _of_hashable("$mapping", lambda: {decode(k, tensor): decode(v, tensor) for k, v in items})
    if kind == "defaultdict":
        return collections.defaultdict(_FACTORIES[factory] if factory is not None else None, pairs)
    if kind == "dict":
        return pairs
    found = collections.OrderedDict(pairs) if kind == "OrderedDict" else collections.Counter(pairs)
    attributes = decode(inner.get("attributes", {}), tensor)
    if not isinstance(attributes, dict):
        raise DamagedError("the attributes of a stored $mapping are not a dict")
    vars(found).update(attributes)
    return found


def tensor_names(value: Json) -> list[str]:
    """The names of all tensors in encoded JSON, in order."""
    if isinstance(value, list):
        return [name for item in value for name in tensor_names(item)]
    if not isinstance(value, dict):
        return []
    if len(value) == 1 and isinstance(value.get("$tensor"), str):
        return [value["$tensor"]]
    return [name for inner in value.values() for name in tensor_names(inner)]


def with_tensor_names(document: Json, name: Callable[[str], str]) -> Json:
    """Encoded JSON with other names for its tensors."""
    if isinstance(document, list):
        return [with_tensor_names(item, name) for item in document]
    if not isinstance(document, dict):
        return document
    if len(document) == 1 and isinstance(document.get("$tensor"), str):
        return {"$tensor": name(document["$tensor"])}
    return {key: with_tensor_names(inner, name) for key, inner in document.items()}


def missing_classes(value: Json) -> list[str]:
    """One sentence for each value in encoded JSON whose class this program does not have."""
    if isinstance(value, list):
        return [line for item in value for line in missing_classes(item)]
    if not isinstance(value, dict):
        return []
    lines = [line for inner in value.values() for line in missing_classes(inner)]
    for form in ("$enum", "$namedtuple"):
        if form in value and len(value) == 1:
            lines += filter(None, [missing_class(form, value[form])])
    if "$composite" in value and len(value) == 1:
        lines += filter(None, [missing_composite(value["$composite"])])
    return lines
