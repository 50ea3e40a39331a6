"""Simplifies stored values for other tools: `torch.load(weights_only=True)` knows few classes.

When Holdfast imports the export again, it restores the exact values: the export includes the documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.state.arrays import decode_scalar
from engine.state.leaves import decode_leaf, encode_float, encode_int

Json = Any


def plain(document: Json) -> Json:
    """The document with plain lists, dicts, numbers, text and tensors instead of classes."""
    if isinstance(document, list):
        return [plain(item) for item in document]
    if not isinstance(document, dict):
        return document
    if len(document) == 1:
        ((form, inner),) = document.items()
        if form in _PLAIN:
            return _PLAIN[form](inner)
    return {key: plain(value) for key, value in document.items()}


def _mapping(inner: Json) -> Json:
    kind = "dict" if inner["kind"] == "defaultdict" else inner["kind"]
    return {"$mapping": {"kind": kind, "pairs": plain(inner["pairs"])}}


def _scalar(inner: Json) -> Json:
    scalar = decode_scalar(inner)
    value = scalar.item()
    if type(value) is float:
        return encode_float(value)
    return encode_int(value) if type(value) is int and scalar.dtype.kind in "iu" else _other(scalar, value)


def _other(scalar: Any, value: Any) -> Json:
    return value if type(value) in (bool, str) else str(scalar)


_PLAIN: dict[str, Callable[[Json], Json]] = {
    "$mapping": _mapping,
    "$frozenset": lambda inner: {"$set": plain(inner)},
    "$deque": lambda inner: plain(inner[1]),
    "$namedtuple": lambda inner: {"$tuple": plain(inner["items"])},
    "$enum": lambda inner: inner["name"],
    "$path": lambda inner: inner[1],
    "$date": lambda inner: inner,
    "$datetime": lambda inner: str(decode_leaf("$datetime", inner)),
    "$time": lambda inner: str(decode_leaf("$time", inner)),
    "$timedelta": lambda inner: decode_leaf("$timedelta", inner).total_seconds(),
    "$timezone": lambda inner: str(decode_leaf("$timezone", inner)),
    "$scalar": _scalar,
    "$array": lambda inner: plain(inner["data"]),
    "$composite": lambda inner: plain(inner["parts"]),
}
