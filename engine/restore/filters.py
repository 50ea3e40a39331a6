"""Which part of a checkpoint is to be restored, and how exactly it has to fit. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Filter:
    """A choice among the names of a state.

    model_only: modules, nothing else.
    include, exclude: shell patterns over tensor names ("model.transformer.h.*") and state keys ("loader",
        "model"), which mean all below them; no include means everything. What is left out keeps its live
        value.
    strict: everything wanted must be in both, with equal shape and dtype. Otherwise what matches is loaded,
        a tensor that has grown in its first dimension is filled as far as the saved one goes, and the rest
        stays as it is.
    rename: saved name -> live name, of tensors, of state keys, and of all below them. The patterns are over
        live names.
    """

    model_only: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = True
    rename: Mapping[str, str] = field(default_factory=dict)

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return not (self.model_only or self.include or self.exclude)

    def takes(self, name: str) -> bool:
        """Whether the tensor of that name is wanted: by its own name, or by that of its state key."""
        return self.takes_value(name.partition(".")[0], name)

    def unknown(self, names: Collection[str], keys: Collection[str], *, excluded: bool = False) -> list[str]:
        """The patterns to include, or to exclude, that mean nothing here: spelled wrong, it seems.

        Args:
            names: what there is below modules. Below other state keys anything may be named.
            keys: the state keys.
        """
        modules = {name.partition(".")[0] for name in names}
        return [
            pattern
            for pattern in (self.exclude if excluded else self.include)
            if pattern.partition(".")[0] not in set(keys) - modules
            and not any(_covers(pattern, key) for key in keys)
            and not any(fnmatchcase(name, pattern) for name in names)
        ]

    def inside(self, keys: Collection[str]) -> list[str]:
        """The patterns for a part of one of these state keys, whose values come whole."""
        found = [(pattern, pattern.partition(".")[0]) for pattern in (*self.include, *self.exclude)]
        return [pattern for pattern, key in found if key in keys and not _covers(pattern, key)]

    def takes_value(self, key: str, name: str) -> bool:
        """Whether something below a state key is wanted that has a name of its own but may be no tensor."""
        if not self.include and not self.exclude:
            return True
        included = not self.include or any(_covers(p, key) or fnmatchcase(name, p) for p in self.include)
        return included and not any(_covers(p, key) or fnmatchcase(name, p) for p in self.exclude)

    def takes_key(self, key: str) -> bool:
        """Whether the values under a state key are wanted, by its name or by a pattern for all below it."""
        included = not self.include or any(_covers(pattern, key) for pattern in self.include)
        return included and not any(_covers(pattern, key) for pattern in self.exclude)


def _covers(pattern: str, key: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(f"{key}.", pattern)
