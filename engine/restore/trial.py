"""Try an object's `load_state_dict` on a stand-in, before anything is overwritten.

An entry may refuse what was saved (an enabled GradScaler refuses the empty state of a disabled one), and
weights would have been read before. So a value without tensors is given to a stand-in first: a shallow copy,
with copies of the attributes that `load_state_dict` commonly changes in place.
"""

from __future__ import annotations

import collections
import copy
import random
import types
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from engine.state import rng

_ATOMS = {int, float, str, bool, bytes, complex, type(None)}
_MOST_ELEMENTS = 1 << 16
"""Larger tensors are shared with the stand-in: values from JSON do not fill them."""


class _Plain:
    """An object with only a `__dict__`."""


def refusal(entry: Any, value: Any) -> str:
    """The error of the entry's `load_state_dict` for `value`; "" when it accepts it or is not tried.

    Iterables are not tried, because a copy could start workers. A stand-in that does not accept the entry's
    own current state proves nothing.
    """
    if not _has_stand_in(entry) or hasattr(type(entry), "__iter__") or hasattr(type(entry), "__next__"):
        return ""
    generators = rng.capture()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are shown when the entry itself is loaded
            said = _try(entry, value)
            return "" if not said or _try(entry, entry.state_dict()) else said
    finally:
        rng.restore(generators)


def _try(entry: Any, value: Any) -> str:
    """The error of a stand-in's `load_state_dict` for a value; "" when it accepts it or cannot be made."""
    try:
        trial, given = _stand_in(entry, {}), copy.deepcopy(value)
    except Exception:
        return ""
    try:
        trial.load_state_dict(given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _has_stand_in(entry: Any) -> bool:
    kind = type(entry)
    return (
        hasattr(kind, "load_state_dict")
        and hasattr(entry, "__dict__")
        and "load_state_dict" not in vars(entry)  # it would load the entry itself
        and not hasattr(kind, "__del__")  # deleting the copy would close what the entry still uses
        and not isinstance(entry, nn.Module | Optimizer | torch.Tensor)
        and kind.__basicsize__ == _Plain.__basicsize__  # no slots, no fields of a C extension
    )


def _stand_in(value: Any, made: dict[int, Any]) -> Any:
    """A copy of a stateful object and of its attributes, stateful objects among them included."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, torch.Tensor) and kind is torch.Tensor and value.numel() <= _MOST_ELEMENTS:
        made[id(value)] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        made[id(value)] = value.clone_state()
    elif isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        made[id(value)] = copy.deepcopy(value)
    elif kind in (dict, collections.OrderedDict, collections.defaultdict, collections.Counter):
        found = made[id(value)] = copy.copy(value)
        found.update({key: _stand_in(item, made) for key, item in value.items()})
    elif kind in (list, collections.deque):
        found = made[id(value)] = copy.copy(value)
        for number, item in enumerate(value):
            if type(item) not in _ATOMS:
                found[number] = _stand_in(item, made)
    elif kind in (set, bytearray):
        made[id(value)] = copy.copy(value)
    elif isinstance(value, types.MethodType) and id(value.__self__) in made:
        return types.MethodType(value.__func__, made[id(value.__self__)])
    elif _has_stand_in(value):
        found = made[id(value)] = object.__new__(kind)
        vars(found).update({name: _stand_in(item, made) for name, item in vars(value).items()})
    else:
        return value
    return made[id(value)]
