"""Resolve a selector to a checkpoint: one answer, one error and one warning for every caller.

`resolve` is pure and works on a listing of one tier or of two; `checkpoint_at` reads the manifest at a path.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.directory.listing import Listed, committed, read_manifest
from engine.directory.record import CheckpointRecord
from engine.directory.retention import best_first, by_sequence, rule_of
from engine.directory.selectors import Selector, choose
from engine.errors import NotFoundError, SelectorError
from engine.format.manifest import Manifest
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.storage.uris import split_uri

log = logging.getLogger(__name__)

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Resolved:
    """The selected checkpoint. `passed_over`: damaged ones that would have been selected instead."""

    record: CheckpointRecord
    passed_over: tuple[Listed, ...] = ()


def resolve(listed: Sequence[Listed], selector: Selector, where: str) -> Resolved:
    """The committed checkpoint that the selector selects; `where` names the directory in the error.

    SelectorError lists the committed checkpoints, and why the others cannot be used.
    """
    whole = committed(listed)
    try:
        record = choose(whole, selector)
    except SelectorError as error:
        raise SelectorError(f"{error}{_unusable(listed, where)}") from None
    if selector.kind not in ("latest", "best"):
        return Resolved(record)
    rule = selector.rule or rule_of(whole)

    def is_first(damaged: CheckpointRecord) -> bool:
        both = [damaged, record]
        return damaged is (by_sequence(both)[-1] if selector.kind == "latest" else best_first(both, rule)[0])

    passed_over = [
        item
        for item in listed
        if item.status == "damaged" and item.record is not None and is_first(item.record)
    ]
    return Resolved(record, tuple(passed_over))


@dataclass(frozen=True, slots=True)
class AtPath:
    """The checkpoint at a path or URI: the directory it is in, its name there, and its manifest."""

    parent: str
    name: str
    storage: Storage
    manifest: Manifest


def checkpoint_at(address: str, options: Mapping[str, str] | None = None) -> AtPath:
    """The committed checkpoint at a path or URI. SelectorError if there is none; DamagedError."""
    parent, name = split_uri(address)
    storage = open_storage(parent, options)
    try:
        return AtPath(parent, name, storage, read_manifest(storage, name))
    except NotFoundError as error:
        raise SelectorError(
            f"no checkpoint at {storage.describe(name)}: it has no manifest.json. Give the directory of "
            "one checkpoint (…/step-00000250-1f0c9a3e), or a selector such as latest"
        ) from error


def log_passed_over(damaged: Sequence[Listed]) -> None:
    """Warn of the damaged checkpoints that a selector passed over."""
    for item in damaged:
        log.warning("skipping %s, which is damaged: %s", item.id, item.reason)


def _unusable(listed: Sequence[Listed], where: str) -> str:
    """A sentence about the checkpoints that are damaged or partial; "" when there are none."""
    unusable = [item for item in listed if item.status != "committed"]
    if not unusable:
        return ""
    damaged = sum(item.status == "damaged" for item in unusable)
    shown = [f"{item.id} is {item.status} ({item.reason})" for item in unusable[:_SHOWN]]
    more = f"; and {len(unusable) - _SHOWN} more" if len(unusable) > _SHOWN else ""
    counts = f"{damaged} damaged and {len(unusable) - damaged} partial"
    return f". {where} also has {counts}: {'; '.join(shown)}{more}"
