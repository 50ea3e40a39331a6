"""`list`: the checkpoints of a directory, and of its mirror, with their roles."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoints import terminal
from engine.checkpoints.target import open_directory, run_policy
from engine.directory.listing import Listed, committed, list_checkpoints, read_manifest
from engine.directory.pending import pending_copies
from engine.directory.retention import by_sequence, roles, rule_of
from engine.errors import DamagedError, NotFoundError
from engine.format.best import DEFAULT, BestRule
from engine.format.json import encode_metric
from engine.mirror.tiers import both_tiers
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.text import readable_bytes

_HEADER = ("STEP", "EPOCH", "VAL LOSS", "SIZE", "RANKS", "AGE", "ROLES", "STATUS", "CHECKPOINT")
_TIERS_HEADER = (*_HEADER[:-1], "LOCAL", "MIRROR", _HEADER[-1])
_RIGHT = frozenset(range(6))
MIRROR_FREQ_FLAG = "mirror_freq"
"""The training flag that sets which checkpoints a run mirrors; stored with its configuration."""

Roles = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Mirrored:
    """By id, the status in each tier; in the mirror also "owed" for one that is pending."""

    uri: str
    local: Mapping[str, str] = field(default_factory=dict)
    mirror: Mapping[str, str] = field(default_factory=dict)
    pending_bytes: Mapping[str, int] = field(default_factory=dict)


def run(arguments: argparse.Namespace) -> int:
    """Print the listing, oldest first, as text or JSON."""
    storage = open_directory(arguments)
    mirrored = None
    if arguments.mirror is None:
        listed = list_checkpoints(storage)
    else:
        mirror = open_storage(arguments.mirror, dict(arguments.storage_options))
        listed, mirrored = _with_mirror(storage, mirror)
    records = committed(listed)
    serving = roles(records, run_policy(storage, records))
    if arguments.json:
        entries = [as_json(item, serving, storage, mirrored) for item in listed]
        print(json.dumps({"checkpoints": entries}, indent=2))
    elif not listed:
        print(f"no checkpoints in {storage.uri}" + (f" and {mirrored.uri}" if mirrored else ""))
    else:
        print(as_text(listed, serving, time.time(), mirrored, rule_of(records)))
    return 0


def _with_mirror(storage: Storage, mirror: Storage) -> tuple[list[Listed], Mirrored]:
    """Both tiers as one listing. A local directory that does not exist counts as empty: it may be lost."""
    local, copies = _look(storage), _look(mirror)
    records = committed(local)
    freq, policy = _mirror_freq(storage, local), run_policy(storage, records)
    pending = pending_copies(records, committed(copies), freq, policy)
    pending_bytes = {record.id: record.bytes for record in pending}
    mirrored = Mirrored(
        uri=mirror.uri,
        local={item.id: item.status for item in local},
        mirror={item.id: item.status for item in copies} | dict.fromkeys(pending_bytes, "owed"),
        pending_bytes=pending_bytes,
    )
    return list(both_tiers(local, copies).listed), mirrored


def _look(storage: Storage) -> list[Listed]:
    try:
        return list_checkpoints(storage)
    except NotFoundError:
        if storage.is_local:
            return []
        raise  # for a store, a missing bucket is a mistake


def _mirror_freq(storage: Storage, local: list[Listed]) -> int:
    """The `mirror_freq` of the run that wrote the newest local checkpoint."""
    for record in reversed(by_sequence(committed(local))):
        try:
            freq = read_manifest(storage, record.id).config.get(MIRROR_FREQ_FLAG)
        except (DamagedError, NotFoundError):  # since the listing: try the one before
            continue
        return freq if isinstance(freq, int) and not isinstance(freq, bool) and freq >= 0 else 1
    return 1


def as_json(
    item: Listed, serving: Roles, storage: Storage, mirrored: Mirrored | None = None
) -> dict[str, Any]:
    """One entry of the JSON listing. Unknown values, of a partial or damaged one, are null."""
    record = item.record
    entry: dict[str, Any] = {
        "step": item.step,
        "epoch": record.epoch if record else None,
        "val_loss": record.val_loss if record else None,
        "bytes": item.bytes,
        "world_size": record.world_size if record else None,
        "created": record.created if record else None,
        "roles": list(serving.get(item.id, ())),
        "status": item.status,
        "path": record.path if record else storage.describe(item.id),
    }
    if record is not None and record.best != DEFAULT:
        entry["best"] = record.best.to_json()
        entry["metrics"] = {name: encode_metric(value) for name, value in record.metrics.items()}
    if mirrored is None:
        return entry
    return {**entry, "local": mirrored.local.get(item.id), "mirror": mirrored.mirror.get(item.id)}


def as_text(
    listed: list[Listed],
    serving: Roles,
    now: float,
    mirrored: Mirrored | None = None,
    rule: BestRule = DEFAULT,
) -> str:
    """A table, and below it why some are not committed. `now`: Unix time. `rule`: the metric to show."""
    names = _HEADER if mirrored is None else _TIERS_HEADER
    column = rule.label.upper() if rule == DEFAULT else f"{rule.label} ({rule.mode})"
    header = tuple(column if name == "VAL LOSS" else name for name in names)
    lines = [terminal.table(header, [_row(item, serving, now, mirrored, rule) for item in listed], _RIGHT)]
    lines += [f"{item.id}: {terminal.printable(item.reason)}" for item in listed if item.reason]
    if mirrored is not None:
        lines.append(_pending_line(mirrored))
    return "\n".join(lines)


def _pending_line(mirrored: Mirrored) -> str:
    if not mirrored.pending_bytes:
        return f"{mirrored.uri} is up to date"
    count, size = len(mirrored.pending_bytes), readable_bytes(sum(mirrored.pending_bytes.values()))
    verb = "is" if count == 1 else "are"
    return f"{count} checkpoint{'s' * (count != 1)}, {size}, {verb} not yet copied to {mirrored.uri}"


def _row(
    item: Listed, serving: Roles, now: float, mirrored: Mirrored | None, rule: BestRule
) -> tuple[str, ...]:
    record = item.record
    status = item.status + ", held" * item.on_hold + ", link" * bool(item.link)
    value = rule.value(record.metrics) if record else None
    cells: tuple[str, ...] = (
        "-" if item.step is None else str(item.step),
        str(record.epoch) if record else "-",
        "-" if value is None else f"{value:.4f}",
        readable_bytes(item.bytes),
        str(record.world_size) if record else "-",
        terminal.age(now - record.created) if record else "-",
        ", ".join(serving.get(item.id, ())) or "-",
        status,
    )
    if mirrored is not None:
        cells += (mirrored.local.get(item.id, "-"), mirrored.mirror.get(item.id, "-"))
    return (*cells, item.id)
