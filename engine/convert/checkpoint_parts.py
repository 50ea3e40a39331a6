"""Sorts a checkpoint's tensors into modules, optimizers and other values. Pure.

The manifest does not say it directly: names begin with their state key, an optimizer's JSON has groups of
parameters, and a value's JSON refers to its tensors. All other tensors belong to modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import StateError
from engine.format.manifest import Manifest
from engine.state.captured import PER_RANK_PREFIX
from engine.state.optimizer_document import is_optimizer, split_path, value_tensors


@dataclass(frozen=True, slots=True)
class Contents:
    """State keys by kind.

    modules: key -> {name in the module: name in the checkpoint}, tied weights under all their names.
    optimizers: key -> parameter name -> field ("exp_avg") -> name in the checkpoint.
    inside: names in the checkpoint of the tensors of optimizers inside other optimizers.
    """

    modules: Mapping[str, Mapping[str, str]]
    optimizers: Mapping[str, Mapping[str, Mapping[str, str]]]
    inside: tuple[str, ...] = ()


def contents_of(manifest: Manifest) -> Contents:
    """Sort the tensors of a checkpoint by kind."""
    optimizers: dict[str, dict[str, dict[str, str]]] = {
        key: {} for key, value in manifest.objects.items() if is_optimizer(value)
    }
    parameters = {key: _parameters(manifest.objects[key]) for key in optimizers}
    inside = []
    modules: dict[str, dict[str, str]] = {}
    values = {name for key, value in manifest.objects.items() for name in value_tensors(key, value)}
    for name in (*manifest.tensors, *manifest.aliases):
        key, _, rest = name.partition(".")
        if key == PER_RANK_PREFIX or not rest or name in values:
            continue
        if key not in optimizers:
            modules.setdefault(key, {})[rest] = manifest.aliases.get(name, name)
        elif rest.startswith("state."):
            parameter, field = split_path(rest.removeprefix("state."), parameters[key])
            optimizers[key].setdefault(parameter, {})[field] = manifest.aliases.get(name, name)
        else:
            inside.append(name)
    return Contents(modules, optimizers, tuple(inside))


def _parameters(document: Any) -> set[str]:
    groups = (group.get("params", ()) for group in document["param_groups"] if isinstance(group, dict))
    return {str(name) for names in groups for name in names}


def main_module(contents: Contents, what: str) -> str:
    """The key of the model: "model", or the only module. StateError otherwise."""
    if "model" in contents.modules:
        return "model"
    if len(contents.modules) == 1:
        return next(iter(contents.modules))
    there = ", ".join(sorted(contents.modules)) or "none"
    raise StateError(
        f"{what} has no state key 'model' and not exactly one module ({there}): save the model as 'model'"
    )
