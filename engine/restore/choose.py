"""Which checkpoint a selector means, where it lies, and what is left when it is damaged. Rank 0's work."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from engine.catalog.listing import Listed, committed, list_checkpoints, read_manifest
from engine.catalog.record import CheckpointRecord, from_manifest
from engine.catalog.select import Selector, choose, parse_selector
from engine.errors import DamagedError, NotFoundError, SelectorError
from engine.format.manifest import Manifest
from engine.mirror.tiers import Tier, both_tiers
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.storage.redact import redact_uri
from engine.storage.split import split_uri

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint to restore.

    `target` is the directory or URI to open it at, "" for the run's own or its mirror, as `tier` says; `name`
    its directory there, which a copy may have renamed.
    """

    target: str
    name: str
    record: CheckpointRecord
    manifest: Manifest
    tier: Tier = "local"


def in_mirror(id: str) -> str:
    """How the mirror's copy of a checkpoint is called among those that are passed over."""
    return f"mirror/{id}"


def choose_checkpoint(
    storage: Storage,
    selector_text: str,
    *,
    passed_over: Collection[str] = (),
    options: Mapping[str, str] | None = None,
    mirror: Storage | None = None,
) -> Choice | None:
    """The checkpoint that the selector means; None when `latest` finds nothing at all.

    Args:
        passed_over: ids that failed to restore just now, and `in_mirror` of them; `latest` walks back past
            them.
        mirror: the second tier: the newest whole checkpoint of both counts, and the local copy is nearer.
    Raises: SelectorError listing what there is; DamagedError when everything there is damaged or partial;
        StorageError when the storage cannot be listed: an outage is not "no checkpoints".
    """
    selector = parse_selector(selector_text)
    if selector.kind == "path":
        return _at_path(selector_text, options)
    local = _look(storage)
    theirs = _look(mirror) if mirror is not None and not _is_here(local, selector, passed_over) else []
    tiers = both_tiers(
        [_unless_passed_over(item, item.id in passed_over) for item in local],
        [_unless_passed_over(item, in_mirror(item.id) in passed_over) for item in theirs],
    )
    listed = list(tiers.listed)
    records = committed(listed)
    if not records and selector.kind == "latest":
        if not listed:
            return None
        where = storage.uri if mirror is None else f"{storage.uri} (and its mirror {mirror.uri})"
        raise DamagedError(_nothing_whole(where, listed))
    record = choose(records, selector)
    if selector.kind == "latest":
        _tell_walk_back([item for item in listed if item.id not in passed_over], record)
    if record.id in tiers.from_mirror:
        assert mirror is not None
        return Choice("", record.id, record, read_manifest(mirror, record.id), "mirror")
    return Choice("", record.id, record, read_manifest(storage, record.id))


def _look(storage: Storage) -> list[Listed]:
    try:
        return list_checkpoints(storage)
    except NotFoundError:
        return []


def _is_here(local: list[Listed], selector: Selector, passed_over: Collection[str]) -> bool:
    """Whether the local directory alone decides: then a mirror that does not answer stops nothing."""
    wanted = [item for item in committed(local) if item.id == selector.text and item.id not in passed_over]
    return selector.kind == "id" and bool(wanted)


def _unless_passed_over(item: Listed, passed_over: bool) -> Listed:
    if not passed_over:
        return item
    return replace(item, status="damaged", reason=item.reason or "failed to restore just now")


def _at_path(text: str, options: Mapping[str, str] | None) -> Choice:
    parent, name = split_uri(text)
    storage = open_storage(parent, options)
    try:
        manifest = read_manifest(storage, name)
    except NotFoundError as error:
        raise SelectorError(
            f"{redact_uri(text)} is not a checkpoint: it has no manifest.json. Give the directory of one "
            "checkpoint (…/step-00000250-1f0c9a3e), or a selector such as latest"
        ) from error
    return Choice(os.fspath(parent), name, from_manifest(manifest, storage.uri, name=name), manifest)


def _nothing_whole(where: str, listed: list[Listed]) -> str:
    lines = [f"{item.id}: {item.reason}" for item in listed if item.status != "committed"]
    return (
        f"{where} holds no whole checkpoint, only damaged or unfinished ones ({'; '.join(lines)}). "
        "Nothing was deleted. Restore one by hand, or start anew in another --checkpoint_dir"
    )


def _tell_walk_back(listed: list[Listed], record: CheckpointRecord) -> None:
    for item in listed:
        newer = item.record is not None and item.record.sequence > record.sequence
        if item.status == "damaged" and newer:
            log.warning("passing over %s, which is damaged: %s", item.id, item.reason)
