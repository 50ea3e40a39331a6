"""The target of a command: a checkpoint directory, or one checkpoint in it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from engine.directory.listing import Listed, committed, is_checkpoint_dir, list_checkpoints, read_manifest
from engine.directory.record import CheckpointRecord
from engine.directory.resolve import log_passed_over, resolve
from engine.directory.retention import Retention, by_sequence, rule_of
from engine.directory.selectors import describe, parse_selector
from engine.errors import ConfigError, DamagedError, NotFoundError, SelectorError
from engine.format.names import DEAD_PREFIX, MANIFEST, parse_attempt_name
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.storage.redact import redact_uri
from engine.storage.uris import split_uri

KEEP_FLAG = "keep_checkpoints"
"""The training flag that sets how many rolling checkpoints a run keeps; stored with its configuration."""


@dataclass(frozen=True, slots=True)
class Target:
    """A directory's storage, and the name of one checkpoint in it if the target is one."""

    storage: Storage
    name: str | None


def open_target(arguments: argparse.Namespace) -> Target:
    """Open `arguments.target`. A checkpoint is recognised by its directory's name, or by its manifest."""
    options = dict(arguments.storage_options)
    try:
        parent, name = split_uri(arguments.target)
    except ConfigError:  # "/" or "s3://bucket" can only be a directory
        return Target(open_storage(arguments.target, options), None)
    if parse_attempt_name(name.removeprefix(DEAD_PREFIX)) is not None:
        return Target(open_storage(parent, options), name)
    storage = open_storage(arguments.target, options)
    if is_checkpoint_dir(storage):
        return Target(open_storage(parent, options), name)
    return Target(storage, None)


def open_directory(arguments: argparse.Namespace) -> Storage:
    """Open a target that must be a checkpoint directory. SelectorError if it is one checkpoint."""
    target = open_target(arguments)
    if target.name is not None:
        raise SelectorError(
            f"{redact_uri(arguments.target)} is one checkpoint: `{arguments.command}` works on its "
            f"directory, {target.storage.uri}"
        )
    return target.storage


def open_checkpoint(arguments: argparse.Namespace) -> tuple[Storage, str]:
    """Open a target that must be one committed checkpoint. SelectorError or NotFoundError otherwise."""
    target = open_target(arguments)
    if target.name is None:
        available = describe(committed(list_checkpoints(target.storage)))
        raise SelectorError(
            f"{redact_uri(arguments.target)} is not one checkpoint: give the path of one. {available}"
        )
    if not target.storage.exists(f"{target.name}/{MANIFEST}"):
        raise NotFoundError(
            f"{redact_uri(arguments.target)} is not a committed checkpoint: never committed, or deleted"
        )
    return target.storage, target.name


def select(storage: Storage, listed: list[Listed], text: str) -> CheckpointRecord:
    """The committed record that a selector selects. Damaged ones that it passes over are logged."""
    found = resolve(listed, parse_selector(text), storage.uri)
    log_passed_over(found.passed_over)
    return found.record


def find(listed: list[Listed], name: str) -> Listed:
    """The listed attempt of that name; a substitute for a directory whose name is not an attempt's."""
    return next((item for item in listed if item.id == name), Listed(name, "committed", None, 0))


def run_policy(storage: Storage, records: list[CheckpointRecord]) -> Retention:
    """The stored part of the policy of the run that wrote the newest checkpoint: number and metric."""
    rule = rule_of(records)
    default = Retention(metric=rule.metric, mode=rule.mode)
    for record in reversed(by_sequence(records)):
        try:
            kept = read_manifest(storage, record.id).config.get(KEEP_FLAG)
        except (DamagedError, NotFoundError):  # damaged or deleted since the listing: try the one before
            continue
        if isinstance(kept, int) and not isinstance(kept, bool) and kept >= 0:
            return replace(default, rolling=kept)
        break
    return default
