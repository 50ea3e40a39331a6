"""`verify`: compare stored bytes with what was written, of one checkpoint or a whole directory."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from engine.checkpoints import terminal
from engine.checkpoints.target import find, open_target
from engine.checkpoints.terminal import meter
from engine.directory import marks
from engine.directory.listing import Listed, list_checkpoints
from engine.directory.verify import Progress, VerifyResult, verify_checkpoint
from engine.errors import HoldfastError, NewerFormatError, NotFoundError, SelectorError, StorageError
from engine.format.names import MANIFEST
from engine.storage.base import Storage
from engine.text import readable_bytes, readable_rate

log = logging.getLogger(__name__)

EXIT_DAMAGED = 1

_LOCAL_THREADS = 2
_STORE_THREADS = 8


def run(arguments: argparse.Namespace) -> int:
    """Verify and report. Exit code 1 when anything is damaged.

    In a directory, a checkpoint of a newer format does not stop the others; its error is raised at the end,
    unless there is damage to report. One that is deleted meanwhile is skipped. A checkpoint found whole loses
    its damage mark.
    """
    target = open_target(arguments)
    storage = target.storage
    listed = list_checkpoints(storage)
    if target.name is None:
        chosen = [item for item in listed if item.status != "partial"]
    else:
        chosen = [find(listed, target.name)]
    if not chosen:
        partial = f", only {len(listed)} partial" if listed else ""
        raise SelectorError(f"nothing to verify: no committed checkpoint in {storage.uri}{partial}")
    results: list[VerifyResult] = []
    errors: list[HoldfastError] = []
    with meter("verify") as bar:
        bar.on_total(sum(item.bytes for item in chosen))
        for item in chosen:
            try:
                results.append(_verify(storage, item, arguments.quick, bar.progress))
            except NotFoundError as error:
                if target.name is None and not storage.exists(f"{item.id}/{MANIFEST}"):
                    log.info("%s was deleted during the verification", item.id)
                else:
                    errors.append(error)
            except NewerFormatError as error:
                errors.append(error)
            else:
                cleared = results[-1].ok and not arguments.quick and _clear_mark(storage, item.id)
                if not arguments.json:
                    lines = report(results[-1], item, cleared=cleared, quick=arguments.quick)
                    print("\n".join(lines), flush=True)
    if arguments.json:
        print(json.dumps(as_json(results, storage), indent=2))
    if any(not result.ok for result in results):
        for unverified in errors:
            print(f"error: {unverified}", file=sys.stderr)
        return EXIT_DAMAGED
    if errors:
        raise errors[0]
    return 0


def report(
    result: VerifyResult, item: Listed, *, cleared: bool = False, quick: bool = False
) -> Iterator[str]:
    """The lines about one checkpoint.

    cleared: its damage mark was just removed. quick: its data was not read.
    """
    size, rate = readable_bytes(result.bytes), readable_rate(result.bytes, result.secs)
    speed = f"{size} in {result.secs:.2f} s, {rate}"
    yield f"{'ok     ' if result.ok else 'DAMAGED'}  {result.id}  {speed}"
    yield from (f"  {terminal.printable(damage.sentence)}" for damage in result.damage)
    if result.ok and item.status == "damaged":
        found = "its sizes and indexes are right" if quick else "nothing is wrong with it"
        yield f"  {found}, but it is listed as damaged: {terminal.printable(item.reason)}"
    if cleared:
        yield "  its damage mark was removed"


def as_json(results: list[VerifyResult], storage: Storage) -> dict[str, Any]:
    """The report of all checkpoints that could be verified."""
    return {
        "ok": all(result.ok for result in results),
        "checkpoints": [
            {
                "id": result.id,
                "path": storage.describe(result.id),
                "ok": result.ok,
                "bytes": result.bytes,
                "secs": result.secs,
                "damage": [asdict(damage) for damage in result.damage],
            }
            for result in results
        ],
    }


def _clear_mark(storage: Storage, id: str) -> bool:
    try:
        return marks.clear_damage_mark(storage, id)
    except StorageError as error:
        log.warning("could not remove the damage mark of %s: %s", id, error)
        return False


def _verify(storage: Storage, item: Listed, quick: bool, progress: Progress) -> VerifyResult:
    threads = _LOCAL_THREADS if storage.is_local else _STORE_THREADS
    return verify_checkpoint(storage, item.id, quick=quick, progress=progress, threads=threads)
