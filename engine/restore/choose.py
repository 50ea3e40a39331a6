"""Which checkpoint a selector means, where it lies, and what is left when it is damaged. Rank 0's work."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from engine.catalog.listing import Listed, committed, list_checkpoints, read_manifest
from engine.catalog.record import CheckpointRecord, from_manifest
from engine.catalog.select import choose, parse_selector
from engine.errors import DamagedError, NotFoundError, SelectorError
from engine.format.manifest import Manifest
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.storage.redact import redact_uri
from engine.storage.split import split_uri

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint to restore.

    `target` is the directory or URI to open it at, "" for the run's own; `name` its directory there, which
    a copy may have renamed.
    """

    target: str
    name: str
    record: CheckpointRecord
    manifest: Manifest


def choose_checkpoint(
    storage: Storage,
    selector_text: str,
    *,
    passed_over: Collection[str] = (),
    options: Mapping[str, str] | None = None,
) -> Choice | None:
    """The checkpoint that the selector means; None when `latest` finds nothing at all.

    Args:
        passed_over: ids that failed to restore just now; `latest` walks back past them.
    Raises: SelectorError listing what there is; DamagedError when everything there is damaged or partial;
        StorageError when the storage cannot be listed: an outage is not "no checkpoints".
    """
    selector = parse_selector(selector_text)
    if selector.kind == "path":
        return _at_path(selector_text, options)
    try:
        listed = list_checkpoints(storage)
    except NotFoundError:
        listed = []
    records = [record for record in committed(listed) if record.id not in passed_over]
    if not records and selector.kind == "latest":
        if not listed:
            return None
        raise DamagedError(_nothing_whole(storage, listed, passed_over))
    record = choose(records, selector)
    if selector.kind == "latest":
        _tell_walk_back(listed, record)
    return Choice("", record.id, record, read_manifest(storage, record.id))


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


def _nothing_whole(storage: Storage, listed: list[Listed], passed_over: Collection[str]) -> str:
    lines = [
        f"{item.id}: {item.reason or 'failed to restore just now'}"
        for item in listed
        if item.status != "committed" or item.id in passed_over
    ]
    return (
        f"{storage.uri} holds no whole checkpoint, only damaged or unfinished ones ({'; '.join(lines)}). "
        "Nothing was deleted. Restore one by hand, or start anew in another --checkpoint_dir"
    )


def _tell_walk_back(listed: list[Listed], record: CheckpointRecord) -> None:
    for item in listed:
        newer = item.record is not None and item.record.sequence > record.sequence
        if item.status == "damaged" and newer:
            log.warning("passing over %s, which is damaged: %s", item.id, item.reason)
