"""`copy`: copy one or all committed checkpoints of a directory to another directory."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from engine.checkpoints.target import open_target, select
from engine.checkpoints.terminal import Meter, cleaning_up_on_sigterm, meter
from engine.directory.listing import committed, list_checkpoints, read_manifest
from engine.directory.retention import by_sequence
from engine.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    HoldfastError,
    NotFoundError,
    SelectorError,
)
from engine.format.names import parse_attempt_name
from engine.lease.lease import Lease
from engine.mirror.copy_checkpoint import Copied, copy_checkpoint
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.storage.uris import split_uri
from engine.text import readable_bytes, readable_rate

_RUN_ID = "copy"


@dataclass(frozen=True, slots=True)
class _Item:
    """A checkpoint to copy: its directory's name, and how many bytes it has."""

    name: str
    bytes: int


def run(arguments: argparse.Namespace) -> int:
    """Copy, newest first, and print a line for each checkpoint.

    A damaged one, or one whose name is taken, does not stop the others; the error is raised at the end.
    """
    target = open_target(arguments)
    source = target.storage
    items, problems = _select_items(source, target.name, arguments.select)
    destination = open_storage(_directory(arguments.to), dict(arguments.storage_options))
    if destination.uri == source.uri:
        raise ConfigError(f"{source.uri} is both source and target of this copy: give two directories")
    destination.make_dir()
    with cleaning_up_on_sigterm(), Lease.acquire(destination, run_id=_RUN_ID) as lease, meter("copy") as bar:
        lease.start_heartbeat()
        # Each byte is read twice: to be sent, and on arrival.
        bar.on_total(2 * sum(item.bytes for item in items))
        for item in items:
            try:
                copied = _copy(source, item, destination, lease, bar)
            except (AlreadyExistsError, DamagedError, NotFoundError) as error:
                problems.append(error)
            else:
                print(_summary(copied), flush=True)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise type(problems[0])(f"not everything was copied: {problems[0]}{more}")
    return 0


def _directory(to: str) -> str:
    """The directory of the copies. They keep their names, so `to` may also end with a checkpoint's name."""
    try:
        parent, name = split_uri(to)
    except ConfigError:  # "/" or "s3://bucket"
        return to
    return to if parse_attempt_name(name) is None else parent


def _copy(source: Storage, item: _Item, destination: Storage, lease: Lease, bar: Meter) -> Copied:
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        bar.progress(count)

    copied = copy_checkpoint(source, item.name, destination, lease=lease, check=True, progress=progress)
    bar.progress(max(0, 2 * item.bytes - done))  # files that were there already were read only once
    return copied


def _summary(copied: Copied) -> str:
    speed = f"in {copied.secs:.2f} s, {readable_rate(copied.sent_bytes, copied.secs)}"
    if not copied.sent_bytes:
        return f"present  {copied.id}  {readable_bytes(copied.bytes)}, intact: nothing was sent"
    sent = "" if copied.sent_bytes == copied.bytes else f"{readable_bytes(copied.sent_bytes)} of "
    return f"copied   {copied.id}  {sent}{readable_bytes(copied.bytes)} {speed}"


def _select_items(
    source: Storage, name: str | None, selector: str | None
) -> tuple[list[_Item], list[HoldfastError]]:
    """The checkpoints to copy, newest first, and the errors of those that cannot be copied."""
    if name is not None:
        if selector is not None:
            raise ConfigError(f"{source.describe(name)} is one checkpoint: omit --select")
        try:
            return [_Item(name, read_manifest(source, name).total_bytes)], []
        except NotFoundError as error:
            raise NotFoundError(
                f"{source.describe(name)} is not a committed checkpoint: never committed, or deleted"
            ) from error
    listed = list_checkpoints(source)
    if selector is not None:
        record = select(source, listed, selector)
        return [_Item(record.id, record.bytes)], []
    records = by_sequence(committed(listed))
    damaged = [item for item in listed if item.status == "damaged"]
    if not records and not damaged:
        partial = f", only {len(listed)} partial" if listed else ""
        raise SelectorError(f"nothing to copy: no committed checkpoint in {source.uri}{partial}")
    problems: list[HoldfastError] = [
        DamagedError(f"{source.describe(item.id)} is damaged: {item.reason}") for item in damaged
    ]
    return [_Item(record.id, record.bytes) for record in reversed(records)], problems
