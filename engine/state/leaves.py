"""The forms of single values that JSON lacks: numbers, bytes, paths, times, and torch's own small types.

Every form is written by `encode_leaf` and read by `decode_leaf`; the table in `checkpoints/README.md` says
what each looks like. Reading one runs no code that the checkpoint names.
"""

from __future__ import annotations

import base64
import datetime
import math
import pathlib
import struct
import zoneinfo
from collections.abc import Callable
from typing import Any

import torch

from engine.errors import DamagedError, UnsavableValueError

Json = Any

_PATHS: dict[str, Callable[[str], pathlib.PurePath]] = {
    "PosixPath": pathlib.PosixPath,
    "PurePosixPath": pathlib.PurePosixPath,
    "PureWindowsPath": pathlib.PureWindowsPath,
}
_NAN = struct.pack(">d", math.nan)


def encode_leaf(value: object, path: str) -> Json | None:
    """The form of a value; None when this module has none for its type.

    Raises: UnsavableValueError for a value that the form of its type cannot hold.
    """
    make = _ENCODERS.get(type(value))
    if make is not None:
        return make(value, path)
    return None


def decode_leaf(form: str, inner: Json) -> Any:
    """The value of a form. Raises: DamagedError for a form that `encode_leaf` cannot have made."""
    try:
        return _DECODERS[form](inner)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
        raise DamagedError(f"a stored {form} holds {str(inner)[:40]!a}: {error}") from None


def is_leaf_form(form: str) -> bool:
    """Whether `decode_leaf` reads it."""
    return form in _DECODERS


def check_text(text: str, path: str) -> str:
    """The text itself. Raises: UnsavableValueError unless it can be encoded as UTF-8."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UnsavableValueError(f"{path}: {text[:40]!a} is not Unicode text") from None
    return text


def encode_float(value: float) -> Json:
    """A float, bit for bit. JSON has only finite ones; a NaN may carry a payload."""
    if math.isfinite(value):
        return value
    raw = struct.pack(">d", value)
    return {"$nan": raw.hex()} if value != value and raw != _NAN else {"$float": str(value)}


def decode_float(value: Json) -> float:
    """The inverse of `encode_float`."""
    if isinstance(value, dict) and len(value) == 1:
        ((form, inner),) = value.items()
        if form == "$float" and inner in ("nan", "inf", "-inf"):
            return float(inner)
        if form == "$nan":
            return _nan(inner)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return float(value)


def _nan(inner: Json) -> float:
    raw = bytes.fromhex(inner)
    value = struct.unpack(">d", raw)[0] if len(raw) == 8 else 0.0
    if value == value:
        raise ValueError("not a NaN")
    return float(value)


def encode_int(value: int) -> Json:
    """An integer; one beyond 64 bits as hexadecimal text (a PCG64 has two of 128 bits)."""
    return value if -(2**63) < value < 2**63 else {"$int": hex(value)}


def _int(inner: Json) -> int:
    value = int(inner, 16)
    if -(2**63) < value < 2**63 or hex(value) != inner:
        raise ValueError("not an integer beyond 64 bits")
    return value


def _encode_path(value: Any, path: str) -> Json:
    return {"$path": [type(value).__name__, check_text(str(value), path)]}


def _path(inner: Json) -> pathlib.PurePath:
    kind, text = inner
    if not isinstance(text, str):
        raise ValueError("not text")
    return _PATHS[kind](text)


def _encode_zone(zone: datetime.tzinfo | None, path: str) -> Json:
    if zone is None:
        return None
    if type(zone) is datetime.timezone:
        name = zone.tzname(None)
        plain = datetime.timezone(zone.utcoffset(None))
        offset = _parts(zone.utcoffset(None))
        return offset if plain.tzname(None) == name else [*offset, check_text(name, path)]
    if type(zone) is zoneinfo.ZoneInfo and zone.key:
        return zone.key
    raise UnsavableValueError(
        f"{path}: its time zone is a {type(zone).__module__}.{type(zone).__qualname__}; use "
        "datetime.timezone or zoneinfo.ZoneInfo, or store isoformat()"
    )


def _zone(inner: Json) -> datetime.tzinfo | None:
    if inner is None:
        return None
    if isinstance(inner, str):
        return zoneinfo.ZoneInfo(inner)
    offset = _delta(inner[:3])
    return datetime.timezone(offset, *inner[3:])


def _parts(delta: datetime.timedelta) -> list[int]:
    return [delta.days, delta.seconds, delta.microseconds]


def _delta(inner: Json) -> datetime.timedelta:
    days, secs, microseconds = inner
    return datetime.timedelta(days, secs, microseconds)


def _encode_moment(value: Any, path: str) -> Json:
    form = "$datetime" if type(value) is datetime.datetime else "$time"
    return {form: [value.replace(tzinfo=None).isoformat(), value.fold, _encode_zone(value.tzinfo, path)]}


def _datetime(inner: Json) -> datetime.datetime:
    text, fold, zone = inner
    return datetime.datetime.fromisoformat(text).replace(fold=fold, tzinfo=_zone(zone))


def _time(inner: Json) -> datetime.time:
    text, fold, zone = inner
    return datetime.time.fromisoformat(text).replace(fold=fold, tzinfo=_zone(zone))


def _dtype(inner: Json) -> torch.dtype:
    found = vars(torch).get(inner)
    if not isinstance(found, torch.dtype):
        raise ValueError("this torch has no such dtype")
    return found


def _complex(inner: Json) -> complex:
    real, imaginary = inner
    return complex(decode_float(real), decode_float(imaginary))


def _bytes(inner: Json) -> bytes:
    return base64.b64decode(inner.encode("ascii"), validate=True)


def _size(inner: Json) -> torch.Size:
    if not isinstance(inner, list) or any(type(extent) is not int for extent in inner):
        raise ValueError("not a shape")
    return torch.Size(inner)


def _text(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


_ENCODERS: dict[type, Callable[[Any, str], Json]] = {
    complex: lambda value, path: {"$complex": [encode_float(value.real), encode_float(value.imag)]},
    bytes: lambda value, path: {"$bytes": _text(value)},
    bytearray: lambda value, path: {"$bytearray": _text(value)},
    datetime.datetime: _encode_moment,
    datetime.time: _encode_moment,
    datetime.date: lambda value, path: {"$date": value.isoformat()},
    datetime.timedelta: lambda value, path: {"$timedelta": _parts(value)},
    datetime.timezone: lambda value, path: {"$timezone": _encode_zone(value, path)},
    zoneinfo.ZoneInfo: lambda value, path: {"$timezone": _encode_zone(value, path)},
    torch.dtype: lambda value, path: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value, path: {"$device": str(value)},
    torch.Size: lambda value, path: {"$size": [int(extent) for extent in value]},
    **dict.fromkeys((pathlib.PosixPath, pathlib.PurePosixPath, pathlib.PureWindowsPath), _encode_path),
}

_DECODERS: dict[str, Callable[[Json], Any]] = {
    "$nan": _nan,
    "$int": _int,
    "$complex": _complex,
    "$bytes": _bytes,
    "$bytearray": lambda inner: bytearray(_bytes(inner)),
    "$path": _path,
    "$date": datetime.date.fromisoformat,
    "$time": _time,
    "$datetime": _datetime,
    "$timedelta": _delta,
    "$timezone": _zone,
    "$dtype": _dtype,
    "$device": torch.device,
    "$size": _size,
}
