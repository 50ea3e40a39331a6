"""`diff`: compare two checkpoints, tensor by tensor."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.checkpoints import terminal
from engine.checkpoints.target import open_checkpoint
from engine.checkpoints.terminal import cleaning_up_on_sigterm, meter

if TYPE_CHECKING:
    from engine.convert.compare import Difference, TensorDifference
    from engine.format.manifest import TensorInfo

EXIT_DIFFERENT = 1

_HEADER = ("TENSOR", "LARGEST DIFFERENCE", "ELEMENTS")


def run(arguments: argparse.Namespace) -> int:
    """Print the differences, as text or JSON. Exit code 1 if any tensor differs, like `diff`."""
    from engine.convert.compare import diff_checkpoints

    before, after = (
        open_checkpoint(argparse.Namespace(**{**vars(arguments), "target": target}))
        for target in arguments.target
    )
    with cleaning_up_on_sigterm(), meter("diff") as bar:
        found = diff_checkpoints(before, after, on_total=bar.on_total, progress=bar.progress)
    if arguments.json:
        paths = [storage.describe(name) for storage, name in (before, after)]
        print(json.dumps(as_json(found, *paths), indent=2))
    else:
        print("\n".join(terminal.printable(line) for part in as_text(found) for line in part.split("\n")))
    return 0 if found.same else EXIT_DIFFERENT


def as_json(found: Difference, before: str, after: str) -> dict[str, Any]:
    """All differences, and the names of equal tensors."""
    return {
        "before": before,
        "after": after,
        "same": found.same,
        "added": list(found.added),
        "removed": list(found.removed),
        "changed": [_changed(item) for item in found.changed],
        "equal": [item.name for item in found.common if item.equal],
        "equal_digests": [item.name for item in found.common if item.compared == "digests"],
        "largest_difference": max((item.largest or 0.0 for item in found.changed), default=0.0),
        "values": list(found.values),
    }


def as_text(found: Difference) -> Iterator[str]:
    """The differences in lines, the largest first."""
    yield from (f"only in the second: {name}" for name in found.added)
    yield from (f"only in the first: {name}" for name in found.removed)
    reshaped = [item for item in found.changed if item.before != item.after]
    yield from (f"{i.name} was {_shown(i.before)}, is {_shown(i.after)}" for i in reshaped)
    moved = sorted(
        (item for item in found.changed if item.before == item.after),
        key=lambda item: (item.largest is not None, -(item.largest or 0.0)),
    )
    if moved:
        yield terminal.table(_HEADER, [_row(item) for item in moved], frozenset({1, 2}))
    if found.values:
        yield f"other values differ: {', '.join(found.values)}"
    equal = [item for item in found.common if item.equal]
    by_digest = sum(item.compared == "digests" for item in equal)
    yield (
        f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed, "
        f"{len(equal)} equal ({by_digest} of them by digest alone)"
    )


def _changed(item: TensorDifference) -> dict[str, Any]:
    return {
        "name": item.name,
        "before": {"dtype": item.before.dtype, "shape": list(item.before.shape)},
        "after": {"dtype": item.after.dtype, "shape": list(item.after.shape)},
        "largest_difference": item.largest,
        "elements": item.elements,
    }


def _row(item: TensorDifference) -> tuple[str, str, str]:
    return item.name, "not a number" if item.largest is None else f"{item.largest:.6g}", str(item.elements)


def _shown(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"
