"""A checkpoint under live names: by `restore(rename={saved: live})`, and as this rank sees its own. Pure.

A name in `rename` applies to itself and to everything below it: "model.encoder" also to
"model.encoder.0.weight". Everything with that name follows: an optimizer's state of those parameters, extra
state, each rank's own values. What the checkpoint has under a live name that another name takes is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import StateError, StateMismatchError
from engine.format.manifest import Manifest
from engine.state.captured import PER_RANK_PREFIX, OwnNames
from engine.state.modules import NOTES
from engine.state.optimizer_document import is_optimizer, parse, split_path
from engine.state.optimizer_layouts import SAME
from engine.state.values import tensor_names, with_tensor_names

Json = Any


@dataclass(frozen=True, slots=True)
class Renamed:
    """A checkpoint under live names. `stored` is the name in the checkpoint of each tensor."""

    manifest: Manifest
    locals_: Sequence[Mapping[str, Json]]
    stored: Mapping[str, str]


def rename_checkpoint(
    manifest: Manifest, locals_: Sequence[Mapping[str, Json]], rename: Mapping[str, str]
) -> Renamed:
    """The checkpoint as if it had been saved under the live names.

    Raises: StateMismatchError for a name that the checkpoint does not have, and for two that become one.
    """
    if not rename:
        return Renamed(manifest, locals_, {})
    names = _Names(manifest, locals_, rename)
    tensors = names.live_names(manifest.tensors)
    stored = {live: name for name, live in tensors.items()}
    aliases = {
        live: tensors[manifest.aliases[name]]
        for name, live in names.live_names(manifest.aliases).items()
        if manifest.aliases[name] in tensors and live not in stored
    }
    changed = replace(
        manifest,
        tensors={live: manifest.tensors[name] for live, name in stored.items()},
        aliases=aliases,
        objects={**names.loose(stored), **names.documents(manifest.objects)},
    )
    return Renamed(changed, [names.documents(local) for local in locals_], stored)


def own_view(
    manifest: Manifest,
    locals_: Sequence[Mapping[str, Any]],
    keys: AbstractSet[str],
    *,
    rank: int,
    world_size: int,
) -> Manifest:
    """The manifest with this rank's own tensors and values of `keys` under live names, without other ranks'.

    Raises: StateError at another world size than the saved one: the ranks do not correspond then.
    """
    if not keys:
        return manifest
    if manifest.world_size != world_size:
        raise StateError(
            f"{', '.join(sorted(keys))}: saved per rank by {manifest.world_size} ranks. Modules and "
            f"optimizers in per_rank cannot be restored on {world_size}: resume with the saved world size, "
            f"or leave them out with exclude={tuple(f'{key}.*' for key in sorted(keys))}"
        )
    names = OwnNames(rank, keys)
    prefixes = tuple(f"{PER_RANK_PREFIX}.{other:05d}.{key}." for other in range(world_size) for key in keys)

    def seen(saved: Mapping[str, Any]) -> dict[str, Any]:
        live = {names.live(name): value for name, value in saved.items()}
        return {name: value for name, value in live.items() if not name.startswith(prefixes)}

    aliases = {alias: names.live(name) for alias, name in seen(manifest.aliases).items()}
    own = {key: with_tensor_names(locals_[rank][key], names.live) for key in keys if key in locals_[rank]}
    return replace(
        manifest,
        tensors=seen(manifest.tensors),
        aliases={alias: name for alias, name in aliases.items() if not name.startswith(prefixes)},
        objects={**manifest.objects, **own},
    )


class _Names:
    def __init__(
        self, manifest: Manifest, locals_: Sequence[Mapping[str, Json]], rename: Mapping[str, str]
    ) -> None:
        self._rename = rename
        documents = [item for found in (manifest.objects, *locals_) for item in found.items()]
        inside = {name for _, document in documents for name in tensor_names(document)}
        stored = {*manifest.tensors, *manifest.aliases}
        self._everything = {_own(name)[1] for name in stored}
        optimizers: dict[str, Json] = {key: doc for key, doc in documents if is_optimizer(doc)}
        outside = (_own(name)[1].partition(".") for name in stored - inside)
        self._modules = {key for key, dot, _ in outside if dot and key not in optimizers}
        self._parameters = {
            key: self._parameters_of([name for names in parse(key, document).names for name in names])
            for key, document in optimizers.items()
        }
        self._check_known(manifest, {key for key, _ in documents})

    def _check_known(self, manifest: Manifest, keys: set[str]) -> None:
        known = self._everything | keys
        for saved in self._rename:
            if not any(name == saved or name.startswith(f"{saved}.") for name in known):
                there = ", ".join(sorted({name.partition(".")[0] for name in known}))
                raise StateMismatchError(
                    f"rename names {saved!r}, which {manifest.id} does not hold (it holds {there}); "
                    "nothing was changed"
                )

    def of(self, name: str) -> str:
        """The live name of a full name."""
        start = name
        while start:
            if start in self._rename:
                return self._rename[start] + name[len(start) :]
            start = start.rpartition(".")[0]
        return name

    def tensor(self, name: str) -> str:
        """The live name of a stored tensor."""
        prefix, rest = _own(name)
        key = rest.partition(".")[0]
        live = self.of(rest)
        if live == rest or self.of(key) != key:
            live = self._of_optimizer(key, rest, live)
        return prefix + live

    def _of_optimizer(self, key: str, name: str, live: str) -> str:
        """The part below ".state." is a parameter, which may have another name here."""
        parameters = self._parameters.get(key)
        before, dot, path = name.partition(".state.")
        if not parameters or not dot:
            return live
        parameter, field = split_path(path, parameters)
        new = parameters.get(parameter, parameter)
        return f"{self.of(before)}.state.{new}.{field}"

    def _parameters_of(self, names: Sequence[str]) -> dict[str, str]:
        """Saved name -> live name of an optimizer's parameters, full or relative to one module."""
        full = {name: self._full_parameter(name) for name in names}
        apart = len({live.partition(".")[0] for live in full.values() if live}) > 1
        return {
            name: live if live and (apart or name in self._everything) else live.partition(".")[2] or name
            for name, live in full.items()
        }

    def _full_parameter(self, name: str) -> str:
        """The full live name of an optimizer's parameter; "" when no tensor has it."""
        if name in self._everything:
            return self.of(name)
        found = [full for key in sorted(self._modules) if (full := f"{key}.{name}") in self._everything]
        return next((self.of(full) for full in found if self.of(full) != full), found[0] if found else "")

    def live_names(self, names: Mapping[str, Any]) -> dict[str, str]:
        """Stored name -> live name, without names that another name takes."""
        found = {name: self.tensor(name) for name in names}
        taken: dict[str, str] = {}
        for name, live in found.items():
            if live != name and taken.setdefault(live, name) != name:
                raise StateMismatchError(
                    f"rename maps both {taken[live]} and {name} to {live}; nothing was changed"
                )
        return {name: live for name, live in found.items() if live != name or not self._is_given_away(name)}

    def _is_given_away(self, name: str) -> bool:
        """Whether another name takes this name, or a prefix of it."""
        start = _own(name)[1]
        while start and not any(live == start != saved for saved, live in self._rename.items()):
            start = start.rpartition(".")[0]
        return bool(start)

    def loose(self, stored: Mapping[str, str]) -> dict[str, Json]:
        """Documents for tensors that were in a module when saved and are state entries here."""
        return {live: {"$tensor": live} for live, name in stored.items() if "." not in live and "." in name}

    def documents(self, documents: Mapping[str, Json]) -> dict[str, Json]:
        """JSON by state key, under live names."""
        found: dict[str, Json] = {}
        moved: set[str] = set()
        for key, document in documents.items():
            live = self.of(key)
            if live == key and key in self._rename.values() and key not in self._rename:
                continue  # another key takes its name
            if live in moved:
                raise StateMismatchError(f"rename maps two state keys to {live}; nothing was changed")
            if live != key:
                moved.add(live)
            renamed = with_tensor_names(document, self.tensor)
            if "." in live and isinstance(renamed, dict) and renamed.keys() == {"$tensor"}:
                continue  # a state entry when saved, and a module's tensor here
            if key in self._parameters:
                found[live] = _with_parameters(renamed, self._parameters[key])
            elif key in self._modules and isinstance(renamed, dict) and not _is_form(renamed):
                for name, value in renamed.items():
                    self._add_module_value(found, key, name, value)
            else:
                found[live] = renamed
        return found

    def _add_module_value(self, found: dict[str, Json], key: str, name: str, value: Json) -> None:
        if name not in NOTES:
            new, _, rest = self.of(f"{key}.{name}").partition(".")
            found.setdefault(new, {})[rest] = value
            return
        # A note is a list of names, or values by name.
        for below in value:
            new, _, rest = self.of(f"{key}.{below}").partition(".")
            note = found.setdefault(new, {}).setdefault(name, type(value)())
            if isinstance(value, dict):
                note[rest] = value[below]
            else:
                note.append(rest)


def _own(name: str) -> tuple[str, str]:
    """(the prefix of a name that is one rank's own, or ""; the name without it)."""
    first, _, rest = name.partition(".")
    if first != PER_RANK_PREFIX:
        return "", name
    rank, _, name = rest.partition(".")
    return f"{first}.{rank}.", name


def _is_form(document: Mapping[str, Json]) -> bool:
    return len(document) == 1 and next(iter(document)).startswith("$")


def _with_parameters(document: Json, names: Mapping[str, str]) -> Json:
    """An optimizer's document with other names for its parameters."""

    def path(text: str) -> str:
        parameter, field = split_path(text, names)
        return f"{names.get(parameter, parameter)}.{field}"

    parsed = parse("the optimizer", document)
    if parsed.own is not None and any(name != new for name, new in names.items()):
        raise StateMismatchError(
            f"a {parsed.class_name} saves itself through its own state_dict(), which may hold the names of "
            "parameters: it cannot be restored under other names. Leave it out with exclude=; nothing was "
            "changed"
        )
    return replace(
        parsed,
        groups=[_with_names_of_group(group, names) for group in parsed.groups],
        counters=_renamed(parsed.counters, path),
        layouts={
            path(at): {**layout, SAME: path(layout[SAME])} if SAME in layout else layout
            for at, layout in parsed.layouts.items()
        },
        entries=_renamed(parsed.entries, lambda name: names.get(name, name)),
        inner={name: _with_parameters(inner, names) for name, inner in parsed.inner.items()},
    ).to_json()


def _renamed(found: Mapping[str, Json], name: Callable[[str], str]) -> dict[str, Json]:
    return {name(key): value for key, value in found.items()}


def _with_names_of_group(group: Mapping[str, Json], names: Mapping[str, str]) -> dict[str, Json]:
    params = [names.get(name, name) for name in group["params"]]
    return {**group, "params": params}
