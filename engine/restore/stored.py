"""`Checkpointer.read`: saved values by state key, without objects to restore into. Rank-local, verified."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.errors import DamagedError, NotFoundError, SelectorError
from engine.restore.choice import Choice, choose_checkpoint, copy_name, storage_of
from engine.restore.chunk_locations import Indexes, LocalValues, locate_chunks, locations_of
from engine.restore.filters import Filter
from engine.restore.load_plan import plan_reads
from engine.restore.read import LOCAL_PACE, STORE_PACE, read_slices
from engine.restore.saved import Saved
from engine.state.captured import PER_RANK_PREFIX, RNG_KEY, per_rank_name
from engine.state.modules import NOTES
from engine.state.optimizer_document import OptimizerDocument, is_optimizer, parse, value_tensors
from engine.storage.base import Storage

log = logging.getLogger(__name__)


def read_stored(
    storage: Storage,
    selector: str,
    include: Sequence[str],
    *,
    rank: int,
    world_size: int,
    options: Mapping[str, str] | None = None,
    mirror: Storage | None = None,
) -> dict[str, Any]:
    """What a checkpoint holds, by state key; {} when `latest` finds nothing at all.

    Args:
        include: shell patterns for tensor names and state keys, as for a restore; () means everything.
        rank, world_size: the caller's: values saved per rank are those of this rank.
    Raises: SelectorError, also when nothing matches `include`; DamagedError; StorageError.
    """
    passed_over: set[str] = set()
    while True:
        choice = choose_checkpoint(storage, selector, passed_over=passed_over, options=options, mirror=mirror)
        if choice is None:
            return {}
        try:
            return _read(
                storage_of(choice.target, choice.tier, storage, mirror, options),
                choice,
                include,
                rank,
                world_size,
            )
        except (DamagedError, NotFoundError) as error:
            copy = copy_name(choice.record.id, choice.tier)
            if selector != "latest" or copy in passed_over:
                raise
            log.warning("%s cannot be read, trying another: %s", choice.record.id, error)
            passed_over.add(copy)


def _read(
    storage: Storage, choice: Choice, include: Sequence[str], rank: int, world_size: int
) -> dict[str, Any]:
    manifest = choice.manifest
    indexes = Indexes(storage, manifest, choice.name)
    locate_chunks(manifest, indexes.every())  # they describe the manifest's tensors, whole and once
    saved = Saved(manifest, LocalValues(indexes, manifest.world_size), rank, world_size)
    contents = _Contents(saved, Filter(include=tuple(include)))
    tensors = contents.tensors
    sources = {name: name for name in tensors}
    slices, found = plan_reads(tensors, sources, manifest, locations_of(indexes.every()), indexes)
    read_slices(storage, choice.name, slices, found, pace=LOCAL_PACE if storage.is_local else STORE_PACE)
    result = contents.values()
    if include and not result:
        keys = ", ".join(sorted(key for key in saved.keys if key != PER_RANK_PREFIX))
        raise SelectorError(f"nothing in {manifest.id} matches include={list(include)}; it holds {keys}")
    return result


class _Contents:
    """The selected part of a checkpoint, and memory to read its tensors into."""

    def __init__(self, saved: Saved, filter: Filter) -> None:
        self._saved = saved
        manifest = saved.manifest
        local = saved.own if saved.same_world else {}
        documents = {**local, **{key: saved.json(key) for key in manifest.objects}}
        self._fields = _fields(saved, documents, filter)
        self._documents = {
            key: document
            for key, document in documents.items()
            if filter.takes_key(key) or (key in self._fields and is_optimizer(document))
        }
        for document in self._documents.values():
            saved.will_read(document, {})
        for names in self._fields.values():
            for name in names.values():
                if name not in saved.tensors:
                    saved.will_read({"$tensor": name}, {})
        self.tensors = saved.tensors

    def values(self) -> dict[str, Any]:
        """The values by state key; the tensors must have been read."""
        return {key: self._value(key) for key in sorted({*self._fields, *self._documents})}

    def _value(self, key: str) -> Any:
        fields = {name: self.tensors[stored] for name, stored in self._fields.get(key, {}).items()}
        document = self._documents.get(key)
        if document is None:
            return fields
        if is_optimizer(document):
            return _optimizer(self._saved, parse(key, document), fields)
        value = self._saved.decoded(document)
        if isinstance(value, dict) and (fields or NOTES & value.keys()):
            return fields | {name: item for name, item in value.items() if name not in NOTES}
        return value


def _fields(saved: Saved, documents: Mapping[str, Any], filter: Filter) -> dict[str, dict[str, str]]:
    """By state key, the tensors that no document refers to: those of modules and optimizers, under all names.

    Where ranks have their own (buffers, keys declared per rank), this rank's.
    """
    manifest = saved.manifest
    inside = {name for key, document in documents.items() for name in value_tensors(key, document)}
    found: dict[str, dict[str, str]] = {}
    own = per_rank_name(saved.rank, "") if saved.same_world else "-"
    for stored in sorted((*manifest.tensors, *manifest.aliases), key=lambda name: name.startswith(own)):
        name = stored.removeprefix(own)
        key, _, rest = name.partition(".")
        if rest and key != PER_RANK_PREFIX and stored not in inside and filter.takes_value(key, name):
            found.setdefault(key, {})[rest] = manifest.aliases.get(stored, stored)
    found.pop(RNG_KEY, None)
    return found


def _optimizer(
    saved: Saved, document: OptimizerDocument, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """The optimizer's state_dict() with parameters by name; optimizers inside it are under "inner"."""
    known = sorted((name for names in document.names for name in names), key=len, reverse=True)
    state: dict[str, Any] = {name: saved.decoded(entry) for name, entry in document.entries.items()}
    counters = {path: saved.decoded(value) for path, value in document.counters.items()}
    mine = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    for path, value in {**mine, **counters}.items():
        parameter = next((name for name in known if path.startswith(f"{name}.")), path.rpartition(".")[0])
        state.setdefault(parameter, {})[path.removeprefix(f"{parameter}.")] = value
    for key, value in document.extra:
        state[saved.decoded(key)] = saved.decoded(value)
    groups = [saved.decoded(dict(group)) for group in document.groups]
    found: dict[str, Any] = {"state": state, "param_groups": groups}
    if document.own is not None:
        found["own"] = saved.decoded(document.own)
    if document.inner:
        found["inner"] = {}
    for name, inner in document.inner.items():
        prefix = f"inner.{name}."
        below = {path.removeprefix(prefix): t for path, t in tensors.items() if path.startswith(prefix)}
        found["inner"][name] = _optimizer(saved, parse(name, inner), below)
    return found
