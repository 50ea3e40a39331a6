"""The `$` forms of stored values, and the format version that each of them needs.

A document is written as version 2 only if something in it needs version 2: an older Holdfast then reports it
as newer, not as damaged, and can still read everything else.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FIRST_VERSION = 1
"""The version of documents that need nothing newer."""

FORMAT_VERSION = 2
"""The newest version that this Holdfast writes and reads."""

FORMS: dict[str, int] = {
    "$tensor": 1,
    "$tuple": 1,
    "$float": 1,
    "$items": 1,
    "$counter": 1,
    "$nan": 2,
    "$int": 2,
    "$complex": 2,
    "$bytes": 2,
    "$bytearray": 2,
    "$mapping": 2,
    "$set": 2,
    "$frozenset": 2,
    "$deque": 2,
    "$namedtuple": 2,
    "$enum": 2,
    "$path": 2,
    "$date": 2,
    "$time": 2,
    "$datetime": 2,
    "$timedelta": 2,
    "$timezone": 2,
    "$dtype": 2,
    "$device": 2,
    "$size": 2,
    "$scalar": 2,
    "$array": 2,
    "$composite": 2,
}
"""Form -> the version that introduced it. A `$` key that is not listed here is damage."""

DTYPES: dict[str, int] = {"F4": 2}
"""Element type -> the version that introduced it, if that is not the first."""


def version_needed(*values: Any, dtypes: Iterable[str] = ()) -> int:
    """The format version that a document with these JSON values and element types must declare."""
    needed = max((DTYPES.get(dtype, FIRST_VERSION) for dtype in dtypes), default=FIRST_VERSION)
    left = [*values]
    while left and needed < FORMAT_VERSION:
        value = left.pop()
        if isinstance(value, dict):
            needed = max(needed, *(FORMS.get(key, FIRST_VERSION) for key in value), FIRST_VERSION)
            left.extend(value.values())
        elif isinstance(value, list | tuple):
            left.extend(value)
    return needed


def without_order(value: Any) -> Any:
    """The same values, with every dict of text keys as a JSON object, so that their order does not matter."""
    if isinstance(value, list):
        return [without_order(item) for item in value]
    if not isinstance(value, dict):
        return value
    pairs = value.get("$items")
    if len(value) == 1 and isinstance(pairs, list):
        texts = [pair for pair in pairs if isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str]
        if len(texts) == len(pairs) and not any(key.startswith("$") for key, _ in texts):
            return {key: without_order(item) for key, item in texts}
    return {key: without_order(item) for key, item in value.items()}
