"""Which part of a checkpoint is to be restored, and how exactly it has to fit. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Wanted:
    """A choice among the names of a state.

    model_only: modules, nothing else.
    include, exclude: shell patterns over tensor names ("model.transformer.h.*") and state keys ("loader");
        no include means everything. What is left out keeps its live value.
    strict: everything wanted must be in both, with equal shape and dtype. Otherwise what matches is loaded,
        a tensor that has grown in its first dimension is filled as far as the saved one goes, and the rest
        stays as it is.
    """

    model_only: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = True

    @property
    def everything(self) -> bool:
        """Whether nothing is left out."""
        return not (self.model_only or self.include or self.exclude)

    def takes(self, name: str) -> bool:
        """Whether the tensor of that name is wanted."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def takes_value(self, key: str, name: str) -> bool:
        """Whether something below a state key is wanted that has a name of its own but may be no tensor."""
        included = not self.include or any(_covers(p, key) or fnmatchcase(name, p) for p in self.include)
        return included and not any(_covers(p, key) or fnmatchcase(name, p) for p in self.exclude)

    def takes_key(self, key: str) -> bool:
        """Whether the values under a state key are wanted, by its name or by a pattern for all below it."""
        included = not self.include or any(_covers(pattern, key) for pattern in self.include)
        return included and not any(_covers(pattern, key) for pattern in self.exclude)


def _covers(pattern: str, key: str) -> bool:
    return fnmatchcase(key, pattern) or fnmatchcase(f"{key}.", pattern)
