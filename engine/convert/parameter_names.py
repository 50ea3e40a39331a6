"""Strips from a foreign model's parameter names what wrappers add to them. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"})
"""Parts that torch.compile, activation checkpointing, FSDP and Lightning insert anywhere in names."""

_HOLDERS = frozenset({"module", "model", "net", "network", "_module", "_model"})
"""Attributes under which wrappers and scripts keep the model: removed if all names have them."""

_GPT2 = re.compile(r"(|.*?\.)(?:transformer\.)?wte\.weight")


@dataclass(frozen=True, slots=True)
class Names:
    """Maps a checkpoint's names to the model's.

    dropped: the wrappers' parts that occur. prefix: a shared prefix to remove, "model." for instance; may be
    empty.
    """

    dropped: tuple[str, ...] = ()
    prefix: str = ""

    def of(self, name: str) -> str:
        """The model's name of a parameter; other names lose only the wrappers' parts."""
        return without_wrappers(name).removeprefix(self.prefix)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was changed in the names, in sentences."""
        said = []
        if self.dropped:
            parts = ", ".join(f'"{part}."' for part in self.dropped)
            said.append(f"removed {parts} from its names, which a wrapper had added")
        if self.prefix:
            said.append(f'removed the prefix "{self.prefix}", which all its names share')
        return tuple(said)


def shared_names(names: Sequence[str], *, are_the_modules: bool = False) -> Names:
    """What to strip from the names of one model.

    are_the_modules: the names are those of a module's own state_dict(), as in a Hugging Face directory: a
    Llama with a tied output layer has "model." before all of them, and so does the live module.
    """
    parts = {part for name in names for part in name.split(".")[:-1]}
    plain = [without_wrappers(name) for name in names]
    return Names(tuple(sorted(parts & WRAPPERS)), _shared_prefix(plain, () if are_the_modules else _HOLDERS))


def without_wrappers(name: str) -> str:
    """A name without the parts that wrappers inserted."""
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part not in WRAPPERS), parts[-1]])


def _shared_prefix(names: Sequence[str], holders: Collection[str]) -> str:
    gpt2 = next((found for name in names if (found := _GPT2.fullmatch(name))), None)
    if gpt2 is not None:  # any prefix will do: what follows it identifies the tensors
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
