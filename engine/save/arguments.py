"""Checks the arguments of a Checkpointer's calls before anything changes."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from engine.directory.retention import Retention
from engine.errors import ConfigError
from engine.format.json import MAX_INT
from engine.format.manifest import REASONS
from engine.options import check_addresses, check_switches, is_whole, shown

MOST_STEPS = 2**48
"""A larger step is a mistake: at a million steps a second it would take nine years."""


def check_setup(
    directory: object,
    state: object,
    *,
    per_rank: object,
    rank0: object,
    retention: object,
    busy: object,
    timeout_secs: object,
    overlap: object,
    memory_budget_bytes: object,
    on_event: object,
    read_only: object,
) -> None:
    """ConfigError for an invalid argument of a Checkpointer; `engine.options` checks its groups itself."""
    check_addresses(directory=directory)
    _check_state(state)
    check_names(per_rank=per_rank, rank0=rank0)
    if retention is not None and not isinstance(retention, Retention):
        raise ConfigError(
            f"retention is {shown(retention)}: it must be a Retention, or None to keep everything"
        )
    if busy not in ("wait", "skip"):
        raise ConfigError(f"busy is {shown(busy)}: it must be 'wait' or 'skip'")
    if not _is_number(timeout_secs) or not 0 < timeout_secs < math.inf:  # type: ignore[operator]
        raise ConfigError(f"timeout_secs is {shown(timeout_secs)}: it must be a number of seconds above 0")
    if overlap not in ("auto", False):
        raise ConfigError(f"overlap is {shown(overlap)}: it must be 'auto' or False")
    if memory_budget_bytes is not None and not (is_whole(memory_budget_bytes) and memory_budget_bytes > 0):  # type: ignore[operator]
        raise ConfigError(
            f"memory_budget_bytes is {shown(memory_budget_bytes)}: it must be a whole number of bytes above "
            "0, or None"
        )
    if on_event is not None and not callable(on_event):
        raise ConfigError(f"on_event is {shown(on_event)}: it must be a function of one dict, or None")
    check_switches(read_only=read_only)


def check_names(**given: object) -> None:
    """ConfigError unless each is a sequence of str; a single str would be read letter by letter."""
    for name, value in given.items():
        if isinstance(value, str):
            raise ConfigError(f"{name} is the text {value!r}: give a tuple, {name}=({value!r},)")
        plain = isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes)
        if not plain or not all(isinstance(item, str) for item in value):  # type: ignore[attr-defined]
            raise ConfigError(f"{name} is {shown(value)}: it must be a tuple of names")


def check_rename(rename: object) -> dict[str, str]:
    """The names as a dict. ConfigError unless it maps str to str."""
    if rename is None:
        return {}
    names = isinstance(rename, Mapping) and all(
        isinstance(name, str) and name for pair in rename.items() for name in pair
    )
    if not names:
        raise ConfigError(
            f"rename is {shown(rename)}: it must be a dict from saved names to names in the state"
        )
    return dict(rename)  # type: ignore[call-overload, no-any-return]


def check_selector(selector: object) -> str:
    """The selector as a str. ConfigError for anything else."""
    if isinstance(selector, os.PathLike):
        selector = os.fspath(selector)
    if not isinstance(selector, str):
        hint = f"'step:{selector}'" if is_whole(selector) else "'latest'"
        raise ConfigError(f"the selector is {shown(selector)}: it must be text, such as {hint}")
    return selector


def whole_numbers(**given: object) -> list[int]:
    """The numbers as Python's own, in order; accepts NumPy's and torch's. ConfigError for anything else."""
    for name, value in given.items():
        if not is_whole(value):
            raise ConfigError(f"{name} is {shown(value)}: it must be a whole number")
        if not -MAX_INT <= operator.index(value) <= MAX_INT:  # type: ignore[arg-type]
            raise ConfigError(f"{name} is {value}: it does not fit into 64 bits")
    return [operator.index(value) for value in given.values()]  # type: ignore[arg-type]


def check_save(step: int, epoch: int, tokens: int, reasons: object) -> tuple[str, ...]:
    """The reasons of a save. ConfigError for invalid arguments of `save`."""
    check_names(reasons=reasons)
    found: tuple[str, ...] = tuple(reasons)  # type: ignore[arg-type]
    unknown = [reason for reason in found if reason not in REASONS]
    if unknown or not found or len(set(found)) != len(found):
        raise ConfigError(f"reasons is {found}: it must name one or more of {', '.join(REASONS)}, each once")
    if not 0 <= step <= MOST_STEPS:
        raise ConfigError(f"step is {step}: it must be from 0 to {MOST_STEPS} (2**48)")
    for name, value in (("epoch", epoch), ("tokens", tokens)):
        if value < 0:
            raise ConfigError(f"{name} is {value}: it must be 0 or more")
    return found


def plain_metrics(metrics: object) -> dict[str, float]:
    """Metrics as floats by name, from numbers or one-element arrays and tensors. ConfigError for others."""
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics is {shown(metrics)}: it must be a dict from names to numbers")
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise ConfigError(f"the metric name {shown(name)} is not text")
        if value is None:
            raise ConfigError(f"the metric {name!r} is None: leave it out of saves that have no value for it")
        found[name] = _metric(name, value)
    return found


def _metric(name: str, value: Any) -> float:
    has_parts = isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)
    if not has_parts and (hasattr(value, "__float__") or hasattr(value, "__index__")):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    raise ConfigError(f"the metric {name!r} is {shown(value)}: it must be a single number")


def _check_state(state: object) -> None:
    if isinstance(state, nn.Module):
        raise ConfigError(
            f"state is a {type(state).__name__}: give a dict that names it, such as {{'model': model}}"
        )
    if not isinstance(state, Mapping):
        raise ConfigError(f"state is {shown(state)}: it must be a dict from names to the objects to save")
    for name in state:
        if not isinstance(name, str):
            raise ConfigError(f"the state key {shown(name)} is not text")


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
