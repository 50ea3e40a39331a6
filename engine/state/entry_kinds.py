"""State entries that are neither modules nor optimizers: what is saved of each kind, and how it is restored.

All are restored in place, because the training loop keeps using the object that it put into the state:
through `load_state_dict` where there is one, else by replacing a container's items or a generator's state.
"""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

GENERATOR = "generator"
"""The key that names a random number generator's kind in what is saved of it."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How entries of some classes are saved and restored.

    take: the value to save of an entry. put: gives an entry a saved value.
    holds_values: whether the entry keeps the very values that it is given.
    """

    classes: tuple[type, ...]
    take: Callable[[Any], Any]
    put: Callable[[Any, Any], None]
    holds_values: bool = False


def kind_of(entry: object) -> Kind | None:
    """How an entry is saved and restored; None for one that cannot be."""
    if hasattr(entry, "state_dict"):
        return _STATEFUL if hasattr(entry, "load_state_dict") else None
    if isinstance(entry, random.SystemRandom):  # it has no state
        return None
    return next((kind for kind in KINDS if isinstance(entry, kind.classes)), None)


def saved_value(entry: object) -> Any:
    """What is saved of an entry that is neither a module nor an optimizer."""
    kind = kind_of(entry)
    assert kind is not None, "the state was checked when it was handed over"
    return kind.take(entry)


def reseed(entry: Any, seed: int) -> None:
    """Seed a generator: for a rank that did not exist when the checkpoint was saved."""
    if isinstance(entry, torch.Generator):
        entry.manual_seed(seed)
    elif isinstance(entry, np.random.Generator):
        fresh = np.random.Generator(type(entry.bit_generator)(seed))
        _put_numpy(entry, _take_numpy(fresh))
    elif isinstance(entry, np.random.RandomState):
        entry.seed(seed % 2**32)
    else:
        entry.seed(seed)


def generator_kind(entry: object) -> str:
    """Which saved generator fits this one, in a few words; "" for an entry that is not a generator."""
    if isinstance(entry, torch.Generator):
        return f"torch.Generator on {entry.device.type}"
    if isinstance(entry, np.random.Generator):
        return f"numpy.random.Generator of {type(entry.bit_generator).__name__}"
    if isinstance(entry, np.random.RandomState):
        return f"numpy.random.RandomState of {entry.get_state(legacy=False)['bit_generator']}"
    return "random.Random" if isinstance(entry, random.Random) else ""


def _take_torch(entry: torch.Generator) -> dict[str, Any]:
    return {GENERATOR: generator_kind(entry), "state": entry.get_state()}


def _put_torch(entry: torch.Generator, value: Any) -> None:
    entry.set_state(value["state"].cpu())


def _take_numpy(entry: np.random.Generator) -> dict[str, Any]:
    bits: Any = entry.bit_generator
    seeds = bits.seed_seq
    found: dict[str, Any] = {GENERATOR: generator_kind(entry), "state": bits.state}
    if type(seeds) is np.random.SeedSequence:  # `spawn` continues from it
        found["seeds"] = {
            name: getattr(seeds, name) for name in ("entropy", "spawn_key", "pool_size", "n_children_spawned")
        }
    return found


def _put_numpy(entry: np.random.Generator, value: Any) -> None:
    bits: Any = entry.bit_generator
    if "seeds" in value:
        # The only way to set the seeds behind `spawn`; NumPy's own unpickling does the same.
        bits.__setstate__((value["state"], np.random.SeedSequence(**value["seeds"])))
    else:
        bits.state = value["state"]


def _take_legacy(entry: np.random.RandomState) -> dict[str, Any]:
    return {GENERATOR: generator_kind(entry), "state": entry.get_state(legacy=False)}


def _put_legacy(entry: np.random.RandomState, value: Any) -> None:
    entry.set_state(value["state"])


def _take_python(entry: random.Random) -> dict[str, Any]:
    version, words, gauss_next = entry.getstate()
    tensor = torch.tensor(words, dtype=torch.int64)
    return {GENERATOR: generator_kind(entry), "gauss_next": gauss_next, "version": version, "words": tensor}


def _put_python(entry: random.Random, value: Any) -> None:
    entry.setstate((value["version"], tuple(value["words"].tolist()), value["gauss_next"]))


def _put_tensor(entry: torch.Tensor, value: torch.Tensor) -> None:
    if entry is not value:
        # A tensor that was made in inference mode can only be changed in that mode.
        with torch.inference_mode() if entry.is_inference() else torch.no_grad():
            entry.copy_(value)


def _put_array(entry: np.ndarray[Any, Any], value: Any) -> None:
    entry[...] = value


def _put_mapping(entry: Any, value: Any) -> None:
    entry.clear()
    entry.update(value)


def _put_sequence(entry: Any, value: Any) -> None:
    entry[:] = value


def _put_deque(entry: collections.deque[Any], value: Any) -> None:
    entry.clear()
    entry.extend(value)


_STATEFUL = Kind((), lambda entry: entry.state_dict(), lambda entry, value: entry.load_state_dict(value))

KINDS: tuple[Kind, ...] = (
    Kind((torch.Tensor,), lambda entry: entry, _put_tensor),
    Kind((np.ndarray,), lambda entry: np.asarray(entry), _put_array),
    # Saved as plain dicts: the entry keeps its own class and its attributes (a defaultdict's factory).
    Kind((dict,), lambda entry: dict(entry), _put_mapping, holds_values=True),
    Kind((list,), lambda entry: list(entry), _put_sequence, holds_values=True),
    Kind((set,), lambda entry: set(entry), _put_mapping),
    Kind((collections.deque,), lambda entry: list(entry), _put_deque, holds_values=True),
    Kind((bytearray,), lambda entry: bytes(entry), _put_sequence),
    Kind((torch.Generator,), _take_torch, _put_torch),
    Kind((np.random.Generator,), _take_numpy, _put_numpy),
    Kind((np.random.RandomState,), _take_legacy, _put_legacy),
    Kind((random.Random,), _take_python, _put_python),
)
"""What a state may hold besides modules, optimizers and objects with `state_dict` and `load_state_dict`."""
