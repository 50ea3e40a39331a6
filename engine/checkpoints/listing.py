"""`list`: what a directory holds, and what each checkpoint serves as."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from engine.catalog.listing import Listed, committed, list_checkpoints
from engine.catalog.select import roles
from engine.checkpoints import text
from engine.checkpoints.target import open_directory, run_policy
from engine.storage.base import Storage

_HEADER = ("STEP", "EPOCH", "VAL LOSS", "SIZE", "RANKS", "AGE", "ROLES", "STATUS", "CHECKPOINT")
_RIGHT = frozenset(range(6))

Roles = dict[str, tuple[str, ...]]


def run(arguments: argparse.Namespace) -> int:
    """Print the listing, oldest first, as text or JSON."""
    storage = open_directory(arguments)
    listed = list_checkpoints(storage)
    records = committed(listed)
    serving = roles(records, run_policy(storage, records))
    if arguments.json:
        entries = [as_json(item, serving, storage) for item in listed]
        print(json.dumps({"checkpoints": entries}, indent=2))
    elif not listed:
        print(f"no checkpoints in {storage.uri}")
    else:
        print(as_text(listed, serving, time.time()))
    return 0


def as_json(item: Listed, serving: Roles, storage: Storage) -> dict[str, Any]:
    """One entry of the JSON listing. What a partial or damaged one cannot tell is null."""
    record = item.record
    return {
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


def as_text(listed: list[Listed], serving: Roles, now: float) -> str:
    """A table, and below it why some are not committed. `now`: Unix time."""
    lines = [text.table(_HEADER, [_row(item, serving, now) for item in listed], _RIGHT)]
    lines += [f"{item.id}: {text.printable(item.reason)}" for item in listed if item.reason]
    return "\n".join(lines)


def _row(item: Listed, serving: Roles, now: float) -> tuple[str, ...]:
    record = item.record
    status = f"{item.status}, held" if item.held else item.status
    loss = record.val_loss if record else None
    return (
        "-" if item.step is None else str(item.step),
        str(record.epoch) if record else "-",
        "-" if loss is None else f"{loss:.4f}",
        text.size(item.bytes),
        str(record.world_size) if record else "-",
        text.age(now - record.created) if record else "-",
        ", ".join(serving.get(item.id, ())) or "-",
        status,
        item.id,
    )
