"""`show`: print one checkpoint's manifest."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from engine.checkpoints import terminal
from engine.checkpoints.target import find, open_target, run_policy, select
from engine.directory.listing import Listed, committed, list_checkpoints, read_manifest
from engine.directory.retention import roles
from engine.format.manifest import Manifest, TensorInfo
from engine.storage.base import Storage
from engine.text import readable_bytes


def run(arguments: argparse.Namespace) -> int:
    """Print the manifest of the named or selected checkpoint."""
    target = open_target(arguments)
    storage = target.storage
    listed = list_checkpoints(storage)
    name = target.name or select(storage, listed, arguments.select).id
    manifest = read_manifest(storage, name)
    item = find(listed, name)
    records = committed(listed)
    serving = roles(records, run_policy(storage, records)).get(name, ())
    if arguments.json:
        print(json.dumps(as_json(manifest, item, serving, storage), indent=2))
    else:
        print("\n".join(as_text(manifest, item, serving, storage)))
    return 0


def as_json(manifest: Manifest, item: Listed, serving: tuple[str, ...], storage: Storage) -> dict[str, Any]:
    """The stored manifest, with the checkpoint's status and roles in its directory."""
    return {
        "path": storage.describe(item.id),
        "status": item.status,
        "reason": item.reason,
        "roles": list(serving),
        "held": item.on_hold,
        "manifest": json.loads(manifest.to_bytes()),
    }


def as_text(manifest: Manifest, item: Listed, serving: tuple[str, ...], storage: Storage) -> Iterator[str]:
    """The manifest as lines. Tensors are summarised by state and type: there may be thousands."""
    created = datetime.fromtimestamp(manifest.created, UTC).isoformat(" ", "seconds")
    facts = {
        "checkpoint": storage.describe(item.id),
        "status": item.status + ", held" * item.on_hold + (f": {item.reason}" if item.reason else ""),
        "roles": ", ".join(serving) or "-",
        "step": str(manifest.step),
        "epoch": str(manifest.epoch),
        "tokens": str(manifest.tokens),
        "created": created,
        "reasons": ", ".join(manifest.reasons),
        "metrics": _pairs(manifest.metrics) or "-",
        "sequence": str(manifest.sequence),
        "parent": manifest.parent or ", ".join(manifest.parents) or "-",
        "ranks": str(manifest.world_size),
        "mesh": _pairs(manifest.mesh) or "-",
        "size": readable_bytes(manifest.total_bytes),
        "software": _pairs(manifest.software) or "-",
    }
    width = max(map(len, facts))
    yield from (f"{name.ljust(width)}  {terminal.printable(value)}" for name, value in facts.items())
    yield from _section("tensors", _tensor_table(manifest.tensors))
    yield from _section("aliases", _lines(manifest.aliases))
    yield from _section("shards", _shard_table(manifest))
    yield from _section("objects", "\n".join(sorted(manifest.objects)))
    yield from _section(
        "config", _lines({name: json.dumps(value) for name, value in manifest.config.items()})
    )


def _section(title: str, body: str) -> Iterator[str]:
    if body:
        yield f"\n{title}"
        yield from (f"  {terminal.printable(line)}" for line in body.split("\n"))


def _tensor_table(tensors: Mapping[str, TensorInfo]) -> str:
    """One line per state and type: the number of tensors, elements and bytes."""
    counts: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for name, info in tensors.items():
        group = (name.partition(".")[0], info.dtype)
        counts[group] += 1
        elements[group] += math.prod(info.shape)
        sizes[group] += info.tensor_bytes
    rows = [
        (*key, str(counts[key]), str(elements[key]), readable_bytes(sizes[key])) for key in sorted(counts)
    ]
    header = ("STATE", "TYPE", "TENSORS", "ELEMENTS", "SIZE")
    return terminal.table(header, rows, frozenset({2, 3, 4})) if rows else ""


def _shard_table(manifest: Manifest) -> str:
    rows = [
        (str(shard.rank), receipt.file, str(receipt.bytes), receipt.digest)
        for shard in manifest.shards
        for receipt in (*shard.files, shard.index)
    ]
    return terminal.table(("RANK", "FILE", "BYTES", "DIGEST"), rows, frozenset({0, 2}))


def _lines(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} = {value}" for name, value in sorted(values.items()))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
