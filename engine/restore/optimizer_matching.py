"""How a saved optimizer matches a live one: parameters by name, hyperparameters by parameter. Pure.

Hyperparameters belong to parameters, not to group numbers: each live group gets those of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from engine.state import values
from engine.state.optimizer_document import OptimizerDocument
from engine.state.optimizer_kinds import class_name
from engine.state.optimizer_state_dicts import LIVE_FLAGS, first_difference

_NOT_HYPERPARAMETERS = {"params", "param_names", *LIVE_FLAGS}

_TELLING = {"betas", "momentum", "rho", "alpha", "lambd", "etas", "lr_decay", "beta2_decay", "max_iter"}
"""Hyperparameters that tell torch's optimizers apart."""


def match_names(
    live: Mapping[str, Sequence[str]], owner: str, saved: Collection[str], aliases: Mapping[str, str]
) -> dict[str, str]:
    """Live name -> saved name, for the parameters that the checkpoint has.

    One saved parameter may be several here: weights that were tied when saved and are not tied here.

    Args:
        live: the optimizer's name of each parameter -> all of its full names.
        owner: the state key of the module that the live names are relative to; "" where they are full.
        saved: the saved names, full or relative to one module.
        aliases: other full names of saved tensors.
    """
    names = set(saved)
    found: dict[str, str] = {}
    for name, given in live.items():
        full = [*given, *(aliases[alias] for alias in given if alias in aliases)]
        short = [alias.removeprefix(f"{owner}.") for alias in full] if owner else []
        match = next((candidate for candidate in (name, *short, *full) if candidate in names), None)
        if match is not None:
            found[name] = match
    # Saved relative to one module, and full here: only unambiguous names match.
    left: dict[str, list[str]] = {}
    for name in live.keys() - found.keys():
        left.setdefault(live[name][0].partition(".")[2], []).append(name)
    free = names - set(found.values())
    return found | {lives[0]: name for name, lives in left.items() if name in free and len(lives) == 1}


def class_difference(key: str, optimizer: Optimizer, document: OptimizerDocument) -> str:
    """Why an optimizer's class is not the saved one, in a sentence; else "".

    State fields with equal names may mean other things in another class.
    """
    was, here = document.class_name, class_name(optimizer)
    if was:
        return "" if was == here else f"{key}: saved from a {was}, here a {here}"
    # Checkpoints of early versions have no class: compare the hyperparameters that a class needs.
    saved = {name for group in document.groups for name in group}
    live = {name for group in optimizer.param_groups for name in group}
    lacks, strange = (live - saved) & _TELLING, (saved - live) & _TELLING
    if lacks and strange:
        return (
            f"{key}: saved from an optimizer with {sorted(strange)}; the one here is a {here}, which has "
            f"{sorted(lacks)} instead"
        )
    return ""


@dataclass(frozen=True, slots=True)
class Group:
    """A parameter group.

    names: the saved names of its parameters. values: all else in the group. unknown: live names of parameters
    that were in no group when saved.
    """

    names: Sequence[str]
    values: Mapping[str, Any]
    unknown: Sequence[str] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it has no parameters."""
        return not self.names and not self.unknown


def live_group(names: Sequence[str], values: Mapping[str, Any], saved_names: Mapping[str, str]) -> Group:
    """A live group under saved names: its parameters may have had other names when saved."""
    found = [saved_names[name] for name in names if name in saved_names]
    return Group(found, values, [name for name in names if name not in saved_names])


@dataclass(frozen=True, slots=True)
class Assigned:
    """The hyperparameters that the live groups get.

    values: by group. conflicts: one sentence for each value that a group cannot have. notes: one sentence for
    each group without saved values.
    """

    values: Sequence[Mapping[str, Any]]
    conflicts: Sequence[str] = field(default_factory=list)
    notes: Sequence[str] = field(default_factory=list)


def assign(key: str, live: Sequence[Group], saved: Sequence[Group], takes: Callable[[str], bool]) -> Assigned:
    """Give each live group the saved hyperparameters of its parameters.

    Groups may be in another order. A live group may be merged from several saved ones. These are conflicts: a
    value in which merged groups differ; a value of a split group in which its live parts differ, because the
    saved one would undo that; a value that a live tensor would round.

    Args:
        key: the optimizer's, for messages.
        takes: whether to restore a hyperparameter; others keep their live values.
    """
    homes = _homes(live, saved)
    found: list[dict[str, Any]] = []
    conflicts: list[str] = []
    for number, group in enumerate(live):
        sources = [saved[at] for at in homes[number]]
        mine: dict[str, Any] = {}
        for name in dict.fromkeys(name for source in sources for name in source.values):
            if name in _NOT_HYPERPARAMETERS or not takes(name):
                continue
            claims = [source for source in sources if name in source.values]
            parts = [
                part
                for part, of in zip(live, homes, strict=True)
                if set(of) & set(homes[number]) and name in part.values
            ]
            conflict = _conflict(f"{name} of group {number}", name, group, claims, parts)
            if conflict:
                conflicts.append(
                    f'{key}: {conflict}; exclude=("{key}.param_groups.{name}",) keeps the live values'
                )
            mine[name] = claims[0].values[name]
        found.append(mine)
    saved_values = {name for group in saved for name in group.values} - _NOT_HYPERPARAMETERS
    notes = [
        f"{key}: group {number} keeps its live values, because {_some(group.unknown)} had no group when saved"
        for number, group in enumerate(live)
        if group.unknown and not homes[number] and any(map(takes, saved_values & group.values.keys()))
    ]
    return Assigned(found, conflicts, notes)


def _homes(live: Sequence[Group], saved: Sequence[Group]) -> list[list[int]]:
    """For each live group, the positions of the saved groups that had its parameters."""
    home = {name: number for number, group in enumerate(saved) for name in group.names}
    homes = [list(dict.fromkeys(home[name] for name in group.names if name in home)) for group in live]
    # Empty groups can only be matched by their order.
    empty = [number for number, group in enumerate(saved) if group.is_empty]
    here = [number for number, group in enumerate(live) if group.is_empty]
    if len(empty) == len(here):
        for at, number in zip(empty, here, strict=True):
            homes[number] = [at]
    return homes


def _conflict(what: str, name: str, group: Group, claims: Sequence[Group], parts: Sequence[Group]) -> str:
    """Why a live group cannot have a saved hyperparameter, in a sentence; else "".

    Args:
        claims: the saved groups that have a value for it.
        parts: the live groups that have a value and were one group with this one when saved.
    """
    value = claims[0].values[name]
    here: Any = group.values.get(name)
    other = next((claim for claim in claims if _differ(value, claim.values[name])), None)
    if other is not None:
        return (
            f"{what} was {_show(value)} for {_some(claims[0].names)} and "
            f"{_show(other.values[name])} for {_some(other.names)} when saved"
        )
    split = any(_differ(parts[0].values[name], part.values[name]) for part in parts[1:])
    if split and _differ(here, value):
        return (
            f"{what} ({_some(group.names)}) is {_show(here)} here and was {_show(value)} when saved, in one "
            "group with parameters whose values differ here"
        )
    if _rounds(here, value):
        return (
            f"{what} was {_show(value)} when saved, which its {here.dtype} tensor here would round. Use a "
            "number or a tensor of torch.float64 here"
        )
    return ""


def _differ(one: Any, two: Any) -> bool:
    if isinstance(one, bool | int | float) and isinstance(two, bool | int | float):
        return one != two and not (one != one and two != two)
    return bool(first_difference("", one, two))


def _rounds(live: Any, value: Any) -> bool:
    """Whether a live scalar tensor would round the number that it is filled with."""
    if not isinstance(value, int | float) or not isinstance(live, torch.Tensor) or live.ndim:
        return False
    try:
        return _differ(torch.full((), value, dtype=live.dtype).item(), value)
    except (RuntimeError, OverflowError):  # out of the range of the dtype
        return True


def _show(value: Any) -> str:
    return str(value)[:60]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


class Unread:
    """A value with tensors, which are unknown until they were read."""

    def __init__(self, document: Any) -> None:
        self.document = document

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unread) and self.document == other.document

    def __hash__(self) -> int:
        return hash(str(self.document))

    def __str__(self) -> str:
        return "a tensor"


def _no_tensor(name: str) -> torch.Tensor:
    raise AssertionError(f"the value has no tensors, and yet {name}")


def known(document: Any) -> Any:
    """A saved value, or an `Unread` one if it has tensors."""
    return Unread(document) if values.tensor_names(document) else values.decode(document, _no_tensor)
