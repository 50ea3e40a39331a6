"""Canonical JSON: each value has one serialisation, so that a digest of the bytes is a digest of the value.

Canonical means: sorted keys, no spaces, UTF-8 without unnecessary escapes, no NaN or Infinity, integers
within 64 bits, at most `MAX_DEPTH` nested containers. A file that parses but is not canonical was changed
after it was written: it is damaged.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from engine.errors import DamagedError

MAX_DEPTH = 64
"""How deep a document may nest containers."""

MAX_BYTES = 256 << 20
"""Largest JSON document that is read: the index of a shard of 1.5 TB."""

MAX_VALUES = 8_000_000
"""Most values in one document. A value of two bytes takes up to 70 parsed: this limits the memory."""

MAX_INT = 2**63 - 1
"""Largest absolute integer in a document: readers in other languages have 64 bits."""

_MAX_INT_DIGITS = 19
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_LONG_NUMBER = re.compile(rb"(?<![0-9.])[0-9]{%d}" % _MAX_INT_DIGITS)  # not the digits after a point
_MAX_SPLIT_BYTES = 4 << 20
"""Longer documents are not split at their quotes: each part of two bytes would take 45 bytes."""
_ONE_DIGIT = bytes.maketrans(b"0123456789", b"0000000000")
_LONG_RUN = b"0" * _MAX_INT_DIGITS
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")


def canonical_bytes(value: object) -> bytes:
    """Serialise a JSON value canonically. ValueError names the key path of a value that is not JSON."""
    _check(value, "", MAX_DEPTH)
    return _spell(value)


def parse_canonical(raw: bytes, *, what: str, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Parse bytes that `canonical_bytes` wrote.

    `what` names the document in errors. DamagedError: too large, too deep, not JSON, or not canonical (which
    includes duplicate keys: they do not survive a round trip).
    """
    value, has_long_numbers = _parse(raw, what, max_bytes, max_depth, None)
    try:
        again = canonical_bytes(value) if has_long_numbers else _spell(value)
    except ValueError as error:
        fault = _fault(value, error)
        raise DamagedError(f"{what} holds a value that the format does not allow: {fault}") from None
    if again != raw:
        raise DamagedError(f"{what} is not in canonical form: it was changed after it was written")
    return value


def parse_bounded(
    raw: bytes,
    *,
    what: str,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    constants: bool = False,
) -> Any:
    """Parse JSON of bounded size and depth, canonical or not. DamagedError otherwise.

    constants: accept NaN and Infinity, which Python's json writes although they are not JSON.
    """
    return _parse(raw, what, max_bytes, max_depth, pairs_hook, constants=constants)[0]


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`pairs_hook` for documents that are not canonical: refuse duplicate keys."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def encode_metric(value: float) -> float | str:
    """A metric as a JSON value: a finite float, or "nan", "inf", "-inf"."""
    value = float(value)
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def decode_metric(value: object) -> float:
    """The inverse of `encode_metric`. ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a metric")
    if isinstance(value, str) and value not in ("nan", "inf", "-inf"):
        raise ValueError(f"{value[:40]!r} is not a metric: only nan, inf and -inf are spelled out")
    return float(value)


def _parse(
    raw: bytes,
    what: str,
    max_bytes: int,
    max_depth: int,
    pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None,
    *,
    constants: bool = False,
) -> tuple[Any, bool]:
    """The value, and whether the document has numbers so long that they may exceed 64 bits."""
    if len(raw) > max_bytes:
        raise DamagedError(f"{what} has {len(raw)} bytes, more than the limit of {max_bytes}")
    structure = _outside_strings(raw)
    if structure.count(b",") + structure.count(b"[") + structure.count(b"{") > MAX_VALUES:
        raise DamagedError(f"{what} has more values than the limit of {MAX_VALUES}")
    brackets = structure.translate(_ONE_BRACKET, _NOT_BRACKETS)
    if _deeper_than(brackets, max_depth):
        if brackets.count(b"[") != brackets.count(b"]"):
            raise DamagedError(f"{what} is not valid JSON: its brackets do not match; it may be truncated")
        raise DamagedError(f"{what} is nested more than {max_depth} levels deep")
    # Most documents have no long run of digits, and to find that out is much faster than to find one.
    has_long_numbers = _LONG_RUN in structure.translate(_ONE_DIGIT) and bool(_LONG_NUMBER.search(structure))
    try:
        value = json.loads(
            raw.decode("utf-8"),
            parse_constant=None if constants else _refuse_constant,
            parse_int=_int if has_long_numbers else None,  # it would call Python for each integer
            object_pairs_hook=pairs_hook,
        )
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{what} is not valid JSON: {error}") from None
    return value, has_long_numbers


def _outside_strings(raw: bytes) -> bytes:
    """The document without its strings; an unterminated one extends to the end."""
    if len(raw) <= _MAX_SPLIT_BYTES and b"\\" not in raw:  # no quote in a string: splitting is faster
        return b"".join(raw.split(b'"')[::2])
    return _STRING.sub(b"", raw)


def _check(value: object, path: str, levels_left: int) -> None:
    """Refuse values that are not JSON, or that json.dumps would silently change; name the key path."""
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, str):
        if not value.isascii():
            _check_text(value, path)
    elif isinstance(value, int):
        if not -MAX_INT <= value <= MAX_INT:
            raise ValueError(f"{path or 'the value'} is an integer beyond 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path or 'the value'} is {value}, which JSON cannot hold")
    elif isinstance(value, dict | list | tuple):
        _check_items(value, path, levels_left)
    else:
        raise ValueError(f"{path or 'the value'} is a {type(value).__name__}, which JSON cannot hold")


def _check_items(value: dict[Any, Any] | list[Any] | tuple[Any, ...], path: str, levels_left: int) -> None:
    if levels_left == 0:
        raise ValueError(f"{path[:80]}... is nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path or 'the value'} has the key {key!r}; JSON allows text only")
            _check_text(key, path)
            _check(item, f"{path}.{key}" if path else key, levels_left - 1)
    else:
        for position, item in enumerate(value):
            if type(item) is int and -MAX_INT <= item <= MAX_INT:  # shapes and offsets: no path text for each
                continue
            _check(item, f"{path}[{position}]", levels_left - 1)


def _check_text(text: str, path: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{path or 'the value'} holds text that is not Unicode: {text[:40]!a}") from None


def _deeper_than(brackets: bytes, max_depth: int) -> bool:
    """Whether [ and ] nest deeper than that, or do not match. Checked before a parser recurses into them.

    The parser's own recursion limit does not suffice: a program may have raised it, and then C stacks
    overflow. Each round strips the innermost level, in C and in time linear in the document.
    """
    for _ in range(max_depth):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _int(text: str) -> int:
    if len(text.lstrip("-")) > _MAX_INT_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _spell(value: object) -> bytes:
    """Serialise a parsed JSON value (json.dumps would silently change other keys and values to text).

    ValueError, without a key path, for values that a parser accepts: numbers like 1e400, and broken Unicode.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def _fault(value: object, error: ValueError) -> ValueError:
    """The error with the key path, which the C encoder's error lacks."""
    try:
        _check(value, "", MAX_DEPTH)
    except ValueError as named:
        return named
    return error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
