"""The names of a foreign model's parameters without what wrappers put before and into them. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"})
"""Parts that torch.compile, activation checkpointing, FSDP and Lightning put into names, anywhere."""

_HOLDERS = frozenset({"module", "model", "net", "network", "_module", "_model"})
"""Attributes under which wrappers and scripts keep the model: taken off where all names have them."""

_GPT2 = re.compile(r"(|.*?\.)(?:transformer\.)?wte\.weight")


@dataclass(frozen=True, slots=True)
class Names:
    """How a checkpoint's own names become the model's.

    dropped: the wrappers' parts that occur. prefix: what all names share and none keeps, "model." for
    instance; empty for nothing.
    """

    dropped: tuple[str, ...] = ()
    prefix: str = ""

    def of(self, name: str) -> str:
        """The model's name of a parameter; a name of something else stays as it is, wrappers aside."""
        return without_wrappers(name).removeprefix(self.prefix)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the names, in sentences."""
        said = []
        if self.dropped:
            parts = ", ".join(f'"{part}."' for part in self.dropped)
            said.append(f"removed {parts} from its names: a wrapper had added it")
        if self.prefix:
            said.append(f'removed the prefix "{self.prefix}", which all of its names share')
        return tuple(said)


def shared_names(names: Sequence[str], *, are_the_modules: bool = False) -> Names:
    """What to take off the names of one model.

    are_the_modules: they are known to be those of a module's own state_dict(), as in a directory of Hugging
    Face: a Llama with a tied output layer has "model." before each of them, and so does the live module.
    """
    parts = {part for name in names for part in name.split(".")[:-1]}
    plain = [without_wrappers(name) for name in names]
    return Names(tuple(sorted(parts & WRAPPERS)), _shared_prefix(plain, () if are_the_modules else _HOLDERS))


def without_wrappers(name: str) -> str:
    """A name without the parts that wrappers put into it."""
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part not in WRAPPERS), parts[-1]])


def _shared_prefix(names: Sequence[str], holders: Collection[str]) -> str:
    gpt2 = next((found for name in names if (found := _GPT2.fullmatch(name))), None)
    if gpt2 is not None:  # whatever its script calls it: the tensors are known by what follows
        prefix = gpt2[1]
        return prefix if _all_begin(names, prefix) else ""
    prefix = ""
    while True:
        first = {name[len(prefix) :].partition(".")[0] for name in names}
        holder = next(iter(first), "")
        longer = f"{prefix}{holder}."
        if len(first) != 1 or holder not in holders or not _all_begin(names, longer):
            return prefix
        prefix = longer


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) and len(name) > len(prefix) for name in names)
