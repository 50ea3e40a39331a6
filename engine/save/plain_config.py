"""Turns a run's configuration into JSON, each value in the form in which a person would write it.

The configuration is a record for people and tools. It is never restored, so a path may become text; a value
without an obvious text form is refused.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import math
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engine.errors import ConfigError
from engine.format.json import canonical_bytes

_MOST_LEVELS = 40
_AS_TEXT = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex, datetime.timedelta)
_BY_NAME = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def plain_config(config: object) -> dict[str, Any]:
    """The configuration as a JSON object, from a mapping, namespace, dataclass or object with `to_dict`.

    Raises: ConfigError naming the key path of a value that has no form in JSON.
    """
    if config is None:
        return {}
    found = _plain(config, "config", 0)
    if not isinstance(found, dict):
        kind = type(config).__name__
        raise ConfigError(f"config is a {kind}: it must be a dict, a namespace or a dataclass")
    try:
        canonical_bytes(found)
    except ValueError as error:
        raise ConfigError(f"config cannot be written as JSON: {error}") from None
    return found


def _plain(value: Any, path: str, depth: int) -> Any:
    if depth > _MOST_LEVELS:
        raise ConfigError(f"{path[:200]}: nested deeper than {_MOST_LEVELS} levels (a cycle?)")
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else str(value)
    if isinstance(value, enum.Enum):
        return value.value if type(value.value) in (int, str) else value.name
    found = _from_libraries(value, path)
    if found is not value:
        return _plain(found, path, depth + 1)
    if isinstance(value, str | int | float):
        return next(kind(value) for kind in (str, bool, int, float) if isinstance(value, kind))
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, _BY_NAME):
        return f"{value.__module__}.{value.__qualname__}"
    return _plain_container(value, path, depth)


def _from_libraries(value: Any, path: str) -> Any:
    """A value of NumPy or torch as a Python value; anything else unchanged."""
    if isinstance(value, np.generic):
        return str(value) if value.dtype.kind in "mM" else value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 and not value.is_meta:
            return value.item()
        raise ConfigError(f"{path} is a tensor of shape {list(value.shape)}: give a number, or its tolist()")
    return value


def _plain_container(value: Any, path: str, depth: int) -> Any:
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        value = vars(value)
    elif dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return _plain_mapping(value, path, depth)
    if isinstance(value, set | frozenset):
        items = [_plain(item, path, depth + 1) for item in value]
        return sorted(items, key=lambda item: (type(item).__name__, str(item)))
    raw = isinstance(value, bytes | bytearray | memoryview)
    if isinstance(value, Sequence | collections.deque) and not raw:
        return [_plain(item, f"{path}[{number}]", depth + 1) for number, item in enumerate(value)]
    kind = type(value)
    raise ConfigError(
        f"{path} is a {kind.__module__}.{kind.__qualname__}, which JSON cannot hold: give text, a number, "
        "a list or a dict instead"
    )


def _plain_mapping(value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = _plain(key, f"the key {key!r} of {path}", depth + 1)
        if isinstance(name, list | dict):
            raise ConfigError(f"{path} has the key {key!r}, which JSON cannot hold: give text")
        text = name if isinstance(name, str) else str(name)
        if text in found:
            raise ConfigError(f"{path} has two keys that are both written {text!r} in JSON: rename one")
        found[text] = _plain(item, f"{path}.{text}", depth + 1)
    return found
