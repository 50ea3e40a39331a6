"""The state of one rank at one moment, as a value, and how a checkpoint names what belongs to one rank."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch

RNG_KEY = "rng"
PER_RANK_PREFIX = "per_rank"


@dataclass(slots=True)
class Captured:
    """One moment's state of one rank.

    tensors: every tensor once, by canonical name; DTensors stay DTensors. Not copied: live memory.
    fixed: the names that belong to modules and optimizers: the same objects as in every capture of the
        same `generation`. The others may be new objects each time.
    buffers: the names that belong to modules and are no parameters: they may differ between ranks.
    guarded: the names that only an optimizer's step changes: its parameters and its state.
    stateless: of each parameter without optimizer state, the name that its state's tensors would begin with.
    aliases: further names of tensors in `tensors` (tied weights), alias -> name.
    shared: JSON of the values that are the same on all ranks, by state key.
    local: JSON of this rank's own values, by state key.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    guarded: frozenset[str] = frozenset()
    buffers: frozenset[str] = frozenset()
    generation: int = 0
    aliases: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Any] = field(default_factory=dict)
    stateless: frozenset[str] = frozenset()


def per_rank_name(rank: int, key: str) -> str:
    """The prefix of the names of one rank's own tensors: they are never merged with another rank's."""
    return f"{PER_RANK_PREFIX}.{rank:05d}.{key}"


@dataclass(frozen=True, slots=True)
class OwnNames:
    """The names in the checkpoint of what this rank holds under these state keys."""

    rank: int
    keys: AbstractSet[str]

    def of(self, name: str) -> str:
        """The name in the checkpoint of a tensor of any state key."""
        return per_rank_name(self.rank, name) if name.partition(".")[0] in self.keys else name

    def live(self, name: str) -> str:
        """The inverse of `of`; other ranks' names stay as they are."""
        own = name.removeprefix(per_rank_name(self.rank, ""))
        return own if own.partition(".")[0] in self.keys else name
