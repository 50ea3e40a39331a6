"""Modules and optimizers that are declared per rank: their tensors carry names of the rank. Pure.

Inside of a run they have the names that any module has; only the checkpoint tells ranks apart.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from engine.state.captured import per_rank_name


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


def with_names(document: Any, name: Callable[[str], str]) -> Any:
    """The JSON with other names for the tensors that it refers to."""
    if isinstance(document, list):
        return [with_names(item, name) for item in document]
    if not isinstance(document, dict):
        return document
    if len(document) == 1 and isinstance(document.get("$tensor"), str):
        return {"$tensor": name(document["$tensor"])}
    return {key: with_names(inner, name) for key, inner in document.items()}
