"""Which part of a checkpoint to restore, and how exactly it has to match. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Filter:
    """Selects names of a state.

    model_only: modules only.
    include, exclude: shell patterns for tensor names ("model.transformer.h.*") and state keys ("loader",
        "model"), which select everything below them; no include selects everything. Whatever is left out
        keeps its live value.
    strict: everything selected must be in both, with equal shape and dtype. Otherwise matching tensors are
        loaded, a tensor that has more rows than when it was saved is filled with the saved rows, and all
        others keep their values.
    rename: saved name -> live name, of tensors and state keys and of everything below them. The patterns
        match live names.
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
        """Whether the tensor of that name is selected, by its own name or its state key."""
        return self.takes_value(name.partition(".")[0], name)

    def unknown(self, names: Collection[str], keys: Collection[str], *, excluded: bool = False) -> list[str]:
        """The include (or exclude) patterns that match nothing here, probably typing errors.

        Args:
            names: all names below modules; below other state keys any name is allowed.
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
        """The patterns for a part of one of these state keys, whose values are restored as a whole."""
        found = [(pattern, pattern.partition(".")[0]) for pattern in (*self.include, *self.exclude)]
        return [pattern for pattern, key in found if key in keys and not _covers(pattern, key)]

    def takes_value(self, key: str, name: str) -> bool:
        """Whether a name below a state key is selected; it need not be a tensor's."""
        if not self.include and not self.exclude:
            return True
        included = not self.include or any(_covers(p, key) or fnmatchcase(name, p) for p in self.include)
        return included and not any(_covers(p, key) or fnmatchcase(name, p) for p in self.exclude)

    def takes_key(self, key: str) -> bool:
        """Whether the values under a state key are selected, by its name or a pattern for all below it."""
        included = not self.include or any(_covers(pattern, key) for pattern in self.include)
        return included and not any(_covers(pattern, key) for pattern in self.exclude)


def _covers(pattern: str, key: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(f"{key}.", pattern)
