"""The document of an optimizer: what a checkpoint holds of it besides tensors. Pure.

param_groups   hyperparameters by group, and the names of the group's parameters under "params"
class          the optimizer's class, by name
sharded        whether each rank's state is that of its own part of the parameters
counters       "<parameter>.<field>" -> state that is not a tensor
layouts        "<parameter>.<field>" -> layout of a state tensor that differs from the default
               (`optimizer_layouts`)
more           a mapping of format version 2, where one of these is needed:
    entries    parameter -> its whole state, where that is not a dict with text keys
    extra      [[key, value], ...]: state under keys that are not parameters
    inner      attribute -> document of an optimizer inside this one
    own        what its own state_dict() holds beyond its state and groups
    own_whole  whether `own` is all of its state_dict()
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.errors import DamagedError, StateError
from engine.state.values import tensor_names

Json = Any


@dataclass(frozen=True, slots=True)
class OptimizerDocument:
    """A parsed document; values are still JSON. The fields are those of the module's table."""

    groups: Sequence[Mapping[str, Json]]
    class_name: str = ""
    sharded: bool = False
    counters: Mapping[str, Json] = field(default_factory=dict)
    layouts: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    entries: Mapping[str, Json] = field(default_factory=dict)
    extra: Sequence[Sequence[Json]] = ()
    inner: Mapping[str, Json] = field(default_factory=dict)
    own: Json = None
    own_whole: bool = False

    @property
    def names(self) -> list[list[str]]:
        """The parameters of each group, in order."""
        return [list(group["params"]) for group in self.groups]

    def to_json(self) -> Json:
        """The document as it is stored."""
        found: dict[str, Json] = {"param_groups": list(self.groups)}
        optional: dict[str, Json] = {
            "class": self.class_name,
            "sharded": self.sharded,
            "counters": self.counters,
            "layouts": self.layouts,
        }
        found |= {name: value for name, value in optional.items() if value}
        more: dict[str, Json] = {"entries": self.entries, "extra": self.extra, "inner": self.inner}
        pairs: list[Json] = [[name, value] for name, value in more.items() if value]
        if self.own is not None:
            pairs += [["own", self.own], ["own_whole", self.own_whole]]
        if pairs:
            found["more"] = {"$mapping": {"kind": "dict", "pairs": pairs, "factory": None}}
        return found


def is_optimizer(document: Json) -> bool:
    """Whether a shared value is the document of an optimizer."""
    return (
        isinstance(document, dict)
        and document.keys() <= {"param_groups", "counters", "class", "sharded", "layouts", "more"}
        and isinstance(document.get("param_groups"), list)
    )


def parse(key: str, document: Json) -> OptimizerDocument:
    """Parse a stored document. Raises DamagedError for one that is not an optimizer's."""
    groups = document.get("param_groups") if isinstance(document, dict) else None
    if not isinstance(groups, list) or not all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    ):
        raise DamagedError(f"the saved values of {key} are not those of an optimizer")
    try:
        more = dict(document["more"]["$mapping"]["pairs"]) if "more" in document else {}
        return OptimizerDocument(
            groups=[{**group, "params": [str(name) for name in group["params"]]} for group in groups],
            class_name=str(document.get("class", "")),
            sharded=bool(document.get("sharded")),
            counters=dict(document.get("counters", {})),
            layouts=dict(document.get("layouts", {})),
            entries=dict(more.get("entries", {})),
            extra=[(name, value) for name, value in more.get("extra", ())],
            inner=dict(more.get("inner", {})),
            own=more.get("own"),
            own_whole=bool(more.get("own_whole")),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise DamagedError(f"the saved values of {key} are not those of an optimizer: {error}") from None


def value_tensors(key: str, document: Json) -> list[str]:
    """The names of the tensors inside a state key's value.

    State tensors that an optimizer's own state_dict() refers to are not among them.
    """
    if not is_optimizer(document):
        return tensor_names(document)
    parsed = parse(key, document)
    parts = (
        *parsed.groups,
        *parsed.counters.values(),
        *parsed.entries.values(),
        *(v for _, v in parsed.extra),
    )
    names = [name for part in parts for name in tensor_names(part)]
    names += [name for name in tensor_names(parsed.own) if f"{key}.own" in name]
    inner = (value_tensors(f"{key}.inner.{name}", inner) for name, inner in parsed.inner.items())
    return [*names, *(name for found in inner for name in found)]


def split_path(path: str, names: Collection[str]) -> tuple[str, str]:
    """(parameter, field) of "<parameter>.<field>". Both may contain dots: `names` has the parameters."""
    end = path.rfind(".")
    while end > 0:
        if path[:end] in names:
            return path[:end], path[end + 1 :]
        end = path.rfind(".", 0, end)
    name, _, field = path.rpartition(".")
    return name, field


def merge_documents(key: str, documents: Sequence[Json]) -> Json:
    """Merge the documents of several ranks, whose optimizers hold different parameters.

    Groups with equal hyperparameters become one. Where several ranks have a value, it must be equal.
    Raises: StateError naming what differs.
    """
    first = documents[0]
    if all(document == first for document in documents[1:]):
        return first
    parts = [parse(key, document) for document in documents]
    names = {name for part in parts for name in part.inner}
    return OptimizerDocument(
        groups=_merged_groups(key, parts),
        class_name=_one(key, "class", [part.class_name for part in parts]),
        sharded=any(part.sharded for part in parts),
        counters=_union(key, "counters", [part.counters for part in parts]),
        layouts=_union(key, "layouts", [part.layouts for part in parts]),
        entries=_union(key, "state", [part.entries for part in parts]),
        extra=_one(key, "state", [part.extra for part in parts]),
        inner={
            name: merge_documents(
                f"{key}.inner.{name}", [part.inner[name] for part in parts if name in part.inner]
            )
            for name in sorted(names)
        },
        own=_one(key, "state_dict()", [part.own for part in parts]),
        own_whole=_one(key, "state_dict()", [part.own_whole for part in parts]),
    ).to_json()


def _merged_groups(key: str, parts: Sequence[OptimizerDocument]) -> list[dict[str, Json]]:
    merged: list[dict[str, Json]] = []
    home: dict[str, dict[str, Json]] = {}
    for rank, part in enumerate(parts):
        for group in part.groups:
            hyperparameters = {
                name: value for name, value in group.items() if name not in ("params", "param_names")
            }
            same = next(
                (g for g in merged if {**g, "params": None} == {**hyperparameters, "params": None}), None
            )
            if same is None:
                same = {**hyperparameters, "params": []}
                merged.append(same)
            for name in group["params"]:
                if home.setdefault(name, same) is not same:
                    raise StateError(
                        f"{key}: the hyperparameters of {name} differ between rank {rank} and a lower rank: "
                        f"{hyperparameters} and { ({**home[name], 'params': None}) }"
                    )
                if name not in same["params"]:
                    same["params"].append(name)
    return merged


def _union(key: str, what: str, parts: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    merged: dict[str, Json] = {}
    for part in parts:
        for name, value in part.items():
            if merged.setdefault(name, value) != value:
                raise StateError(f"{key}.{what}: {name} is {merged[name]} on one rank and {value} on another")
    return merged


def _one(key: str, what: str, values: Sequence[Json]) -> Json:
    for value in values[1:]:
        if value != values[0]:
            raise StateError(
                f"{key}: its {what} differs between ranks: {str(values[0])[:80]}, {str(value)[:80]}"
            )
    return values[0]
