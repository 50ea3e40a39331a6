"""Typed access to the fields of a parsed document, with the same checks and errors for every reader.

A document from storage is untrusted: the type and range of each field are checked before it is used, and the
error names the document and the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from engine.errors import DamagedError
from engine.format.json import MAX_INT

T = TypeVar("T")

_DIGEST = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Fields:
    """One JSON object of a document; `what` names it in errors.

    `finish()` refuses fields that were never read: a field that a reader ignores could change the document's
    meaning.
    """

    __slots__ = ("_left", "_value", "what")

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise DamagedError(f"{what} is not a JSON object")
        self._value: dict[str, Any] = value
        self._left = set(value)
        self.what = what

    def take(self, name: str) -> Any:
        """The field's raw value. DamagedError if it is missing."""
        if name not in self._value:
            raise DamagedError(f"{self.what} lacks the field {name!r}")
        self._left.discard(name)
        return self._value[name]

    def has(self, name: str) -> bool:
        """Whether the field exists; for the few that are optional."""
        return name in self._value

    def integer(self, name: str, *, least: int = 0, most: int = MAX_INT) -> int:
        """An integer in [least, most]."""
        value = self.take(name)
        if not is_int(value) or not least <= value <= most:
            raise self.wrong(name, value, f"an integer from {least} to {most}")
        return int(value)

    def number(self, name: str) -> float:
        """A finite number."""
        value = self.take(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, value, "a finite number")
        return float(value)

    def text(self, name: str) -> str:
        """A string."""
        value = self.take(name)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def digest(self, name: str) -> str:
        """A digest: 32 lower-case hex digits."""
        value = self.text(name)
        if not _DIGEST.fullmatch(value):
            raise self.wrong(name, value, "32 hex digits")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object."""
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return value

    def array(self, name: str) -> list[Any]:
        """A JSON array."""
        value = self.take(name)
        if not isinstance(value, list):
            raise self.wrong(name, value, "an array")
        return value

    def integers(self, name: str, *, most_items: int = 64) -> tuple[int, ...]:
        """An array of integers from 0, such as a shape."""
        value = self.array(name)
        if len(value) > most_items or not are_extents(value):
            raise self.wrong(name, value, f"up to {most_items} integers from 0")
        return tuple(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """An array of strings."""
        value = self.array(name)
        if not all(isinstance(item, str) for item in value):
            raise self.wrong(name, value, "an array of text")
        return tuple(value)

    def wrong(self, name: str, value: object, expected: str) -> DamagedError:
        """The error for a field with an unexpected value."""
        return DamagedError(f"{self.what} has {_short(value)} as {name!r}: expected {expected}")

    def finish(self) -> None:
        """DamagedError if the object has a field that was never read."""
        if self._left:
            raise DamagedError(f"{self.what} has an unknown field {sorted(self._left)[0][:40]!r}")


def is_int(value: object) -> bool:
    """Whether it is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def are_extents(values: Iterable[object]) -> bool:
    """Whether each is an integer in [0, MAX_INT]. A plain loop: documents hold hundreds of short lists."""
    for value in values:  # noqa: SIM110
        if type(value) is not int or not 0 <= value <= MAX_INT:
            return False
    return True


def validated(what: str, build: Callable[[], T]) -> T:
    """Build a value; a ValueError of its own validation becomes a DamagedError that names the document."""
    try:
        return build()
    except DamagedError as error:
        raise type(error)(f"{what}: {error}") from None
    except ValueError as error:
        raise DamagedError(f"{what}: {error}") from None


def _short(value: object) -> str:
    text = ascii(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
