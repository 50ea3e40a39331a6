"""Tensors that are made of other tensors: subclasses with `__tensor_flatten__`, such as torchao's.

A checkpoint holds their parts, their class and the context that `__tensor_flatten__` returns. The class is
looked up among those that the program has imported, as with enums (`named_types`), and rebuilds the tensor by
its own `__tensor_unflatten__`. Protocol: torch/utils/_python_dispatch.py, `TensorWithFlatten`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from engine.errors import DamagedError, StateMismatchError, UnsavableValueError
from engine.state.named_types import find_class, type_name

Json = Any

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, DTensor)
_FIELDS = {"type", "parts", "context", "shape", "stride"}


def is_composite(tensor: torch.Tensor) -> bool:
    """Whether the tensor has no memory of its own and names the tensors that it is made of.

    DTensors do not count, because their parts are shards of a global tensor, nor do nested tensors.
    """
    kind = type(tensor)
    if kind in _PLAIN_TYPES or isinstance(tensor, DTensor):
        return False
    follows = hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")
    return follows and not tensor.is_nested


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a composite tensor, by attribute; they may be composite themselves."""
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return {name: getattr(tensor, name) for name in names}


def leaves_of(tensor: torch.Tensor, name: str) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    """The plain tensors that a composite one is made of: (name, holder, attribute, tensor) of each.

    The holder is the dict that has the tensor under that attribute; an empty dict where none has.
    """
    for attribute, part in parts_of(tensor).items():
        if is_composite(part):
            yield from leaves_of(part, f"{name}.{attribute}")
        else:
            holder = vars(tensor) if vars(tensor).get(attribute) is part else {}
            yield f"{name}.{attribute}", holder, attribute, part


def describe(tensor: torch.Tensor, path: str, encode: Callable[[Any, str], Json]) -> dict[str, Any]:
    """Class, shape and context of a live composite tensor: only an equal one can be filled in place.

    The context (block sizes of scales, settings) is encoded as a value where it has a form, else as its
    repr(): it is only compared.
    Raises: UnsavableValueError where that repr() differs between processes.
    """
    kind = type(tensor)
    _, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    try:
        encode(context, path)
    except UnsavableValueError as error:
        text = repr(context)
        if " at 0x" in text:
            raise UnsavableValueError(
                f"{path}: a {kind.__qualname__} has values besides its parts, and they cannot be stored "
                f"({error})"
            ) from error
        context = text
    parts = {
        name: describe(part, f"{path}.{name}", encode) if is_composite(part) else None
        for name, part in parts_of(tensor).items()
    }
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "shape": list(tensor.shape),
        "context": context,
        "parts": parts,
    }


def encode_composite(tensor: torch.Tensor, path: str, encode: Callable[[Any, str], Json]) -> Json:
    """The form of a composite tensor; `encode` makes the forms of its parts and its context.

    Raises: UnsavableValueError for a class that cannot be found by its name.
    """
    _, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return {
        "$composite": {
            "type": type_name(tensor, path, "the tensors that it is made of"),
            "parts": {name: encode(part, f"{path}.{name}") for name, part in parts_of(tensor).items()},
            "context": encode(context, f"{path}.context"),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
        }
    }


def decode_composite(inner: Json, decode: Callable[[Json], Any]) -> torch.Tensor:
    """The tensor of a form, rebuilt by its class.

    Raises: StateMismatchError when this program has no such class, or the class fails; DamagedError.
    """
    kind = _class_of(inner)
    parts = {name: decode(part) for name, part in inner["parts"].items()}
    if not all(isinstance(part, torch.Tensor) for part in parts.values()):
        raise DamagedError(f"a stored $composite is not made of tensors: {sorted(parts)[:5]}")
    context = decode(inner["context"])
    shape, stride = torch.Size(inner["shape"]), tuple(inner["stride"])
    try:
        found: torch.Tensor = kind.__tensor_unflatten__(parts, context, shape, stride)
    except Exception as error:
        raise StateMismatchError(
            f"a tensor of the class {kind.__qualname__} was saved, and the class here does not accept its "
            f"parts ({type(error).__name__}: {error}): install the version of {kind.__module__} that the "
            "saved run had"
        ) from error
    return found


def missing_composite(inner: Json) -> str:
    """Why a composite tensor cannot be rebuilt here, in a sentence; else ""."""
    try:
        _class_of(inner)
    except StateMismatchError as error:
        return str(error)
    return ""


def _class_of(inner: Json) -> Any:
    fits = (
        isinstance(inner, Mapping)
        and inner.keys() == _FIELDS
        and _are_counts(inner["shape"], inner["stride"])
        and isinstance(inner["type"], str)
        and isinstance(inner["parts"], Mapping)
        and len(inner["parts"]) > 0
    )
    if not fits:
        raise DamagedError(f"a stored $composite is malformed: {str(inner)[:40]!a}")
    name = inner["type"]
    kind = find_class(name)
    module, _, qualname = name.partition(":")
    if kind is None:
        raise StateMismatchError(
            f"a tensor of the class {qualname[:80]} was saved, and this program has no such class in "
            f"{module[:80]}: import that module before restoring"
        )
    if not issubclass(kind, torch.Tensor) or not hasattr(kind, "__tensor_unflatten__"):
        raise StateMismatchError(
            f"a tensor of the class {module[:80]}.{qualname[:80]} was saved, and the class here is not a "
            "tensor that can be rebuilt from its parts"
        )
    return kind


def _are_counts(*found: Any) -> bool:
    return all(isinstance(each, list) and all(type(n) is int and n >= 0 for n in each) for each in found)
