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
    """The state of one rank at one moment.

    tensors: every tensor once, by canonical name. They are live memory, not copies; DTensors stay DTensors.
    fixed: the names of tensors in modules and optimizers: the same objects in every capture of one
        `generation`. The other tensors may be new objects each time.
    buffers: the names of modules' tensors that are not parameters: these may differ between ranks.
    guarded: the names of tensors that only an optimizer's step changes: its parameters and its state.
    stateless: for each parameter without optimizer state, the prefix that the names of its state would have.
    aliases: other names of tensors in `tensors` (tied weights), alias -> name.
    shared: JSON of the values that are equal on all ranks, by state key.
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
    """A name for one rank's own tensor or value: such names are never merged with another rank's."""
    return f"{PER_RANK_PREFIX}.{rank:05d}.{key}"


@dataclass(frozen=True, slots=True)
class OwnNames:
    """The checkpoint's names for what this rank holds under state keys that are declared per rank.

    In a run such tensors have the same names as any module's; only the checkpoint tells ranks apart.
    """

    rank: int
    keys: AbstractSet[str]

    def of(self, name: str) -> str:
        """The checkpoint's name for a live tensor of any state key."""
        return per_rank_name(self.rank, name) if name.partition(".")[0] in self.keys else name

    def live(self, name: str) -> str:
        """The inverse of `of`; other ranks' names stay as they are."""
        own = name.removeprefix(per_rank_name(self.rank, ""))
        return own if own.partition(".")[0] in self.keys else name
