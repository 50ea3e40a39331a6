"""Which saved parameter of an optimizer a live one is, and whether it is that optimizer at all. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch.optim import Optimizer

from engine.state.optimizer_document import OptimizerDocument
from engine.state.optimizer_kinds import class_name

_TELLING = {"betas", "momentum", "rho", "alpha", "lambd", "etas", "lr_decay", "beta2_decay", "max_iter"}
"""Hyperparameters that one optimizer of torch has and another lacks."""


def match_names(
    live: Mapping[str, Sequence[str]], owner: str, saved: Collection[str], aliases: Mapping[str, str]
) -> dict[str, str]:
    """Live name -> saved name, of those that the checkpoint knows.

    One saved parameter may be several here: weights that were tied when saved and are not any more.

    Args:
        live: the optimizer's name of each parameter -> all of its full names.
        owner: the state key of the module that the optimizer's names are in; "" where they are full.
        saved: names as saved, full or within one module.
        aliases: further full names of saved tensors.
    """
    names = set(saved)
    found: dict[str, str] = {}
    for name, given in live.items():
        full = [*given, *(aliases[alias] for alias in given if alias in aliases)]
        short = [alias.removeprefix(f"{owner}.") for alias in full] if owner else []
        match = next((candidate for candidate in (name, *short, *full) if candidate in names), None)
        if match is not None:
            found[name] = match
    # Saved within one module, and here in full: whichever one parameter alone can be.
    left: dict[str, list[str]] = {}
    for name in live.keys() - found.keys():
        left.setdefault(live[name][0].partition(".")[2], []).append(name)
    free = names - set(found.values())
    return found | {lives[0]: name for name, lives in left.items() if name in free and len(lives) == 1}


def split_path(path: str, names: Collection[str]) -> tuple[str, str]:
    """(parameter, field) of "<parameter>.<field>"; both may have dots in them, so the parameter is known."""
    end = path.rfind(".")
    while end > 0:
        if path[:end] in names:
            return path[:end], path[end + 1 :]
        end = path.rfind(".", 0, end)
    name, _, field = path.rpartition(".")
    return name, field


def class_difference(key: str, optimizer: Optimizer, document: OptimizerDocument) -> str:
    """Why an optimizer is not of the class that was saved, in a sentence; else "".

    Another class may have fields of the same names and mean others by them.
    """
    was, here = document.class_name, class_name(optimizer)
    if was:
        return "" if was == here else f"{key}: saved from a {was}, here a {here}"
    # Saved before classes were written down: told by what each cannot do without.
    saved = {name for group in document.groups for name in group}
    live = {name for group in optimizer.param_groups for name in group}
    lacks, strange = (live - saved) & _TELLING, (saved - live) & _TELLING
    if lacks and strange:
        return (
            f"{key}: a {here}, which has {sorted(lacks)}, saved from another class, which had "
            f"{sorted(strange)}"
        )
    return ""
