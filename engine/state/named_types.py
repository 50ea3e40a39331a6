"""Enums and named tuples: values whose class the checkpoint can only name.

A name from a checkpoint never causes an import. The class is looked up in the dictionaries of modules that
the program has imported itself (a module's `__getattr__` is code), and a value is made without calling the
class. A save looks it up in the same way and refuses the value when it is not found.
"""

from __future__ import annotations

import enum
import sys
from typing import Any

from engine.errors import DamagedError, StateMismatchError, UnsavableValueError

Json = Any

_FIELDS = {"$enum": {"type", "name"}, "$namedtuple": {"type", "fields", "items"}}


def type_name(value: object, path: str, instead: str) -> str:
    """The checkpoint's name for the value's class, "module:Class.Inner".

    Raises: UnsavableValueError, which proposes `instead`, when the class cannot be found by that name.
    """
    kind = type(value)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if find_class(name) is not kind:
        raise UnsavableValueError(
            f"{path}: the class {kind.__qualname__} is not found under its name in {kind.__module__}, so no "
            f"other process could rebuild the value; define it at a module's top level, or store {instead}"
        )
    return name


def encode_enum(value: enum.Enum, path: str) -> Json:
    """The form of an enum member. Raises: UnsavableValueError for a combination of members."""
    if type(value).__members__.get(value.name) is not value:
        raise UnsavableValueError(f"{path}: {value!r} combines members of an enum; store its .value")
    return {"$enum": {"type": type_name(value, path, "its .value"), "name": value.name}}


def decode_named(form: str, inner: Json, items: Any) -> Any:
    """The member or named tuple of a form; `items` are a tuple's values.

    Raises: StateMismatchError when the program has no such class; DamagedError.
    """
    kind = _named_class(form, inner)
    if form == "$enum":
        return kind.__members__[inner["name"]]
    return tuple.__new__(kind, items)


def missing_class(form: str, inner: Json) -> str:
    """Why a value cannot be made here, in a sentence; else ""."""
    try:
        _named_class(form, inner)
    except StateMismatchError as error:
        return str(error)
    return ""


def _named_class(form: str, inner: Json) -> Any:
    if not isinstance(inner, dict) or inner.keys() != _FIELDS[form] or not isinstance(inner["type"], str):
        raise DamagedError(f"a stored {form} is malformed: {str(inner)[:40]!a}")
    kind: Any = find_class(inner["type"])
    module, _, name = inner["type"].partition(":")
    if kind is None:
        raise StateMismatchError(
            f"a value of the class {name[:80]} was saved, and this program has no such class in "
            f"{module[:80]}: import that module before restoring"
        )
    if form == "$enum":
        fits = issubclass(kind, enum.Enum) and inner["name"] in kind.__members__
    else:
        fits = issubclass(kind, tuple) and list(vars(kind).get("_fields", ())) == inner["fields"]
    if not fits:
        what = inner["name"] if form == "$enum" else ", ".join(map(str, inner["fields"]))
        raise StateMismatchError(
            f"a value of {module[:80]}.{name[:80]} was saved with {what[:80]}, which the class here "
            "does not have"
        )
    return kind


def find_class(name: str) -> type | None:
    """The class of that name, "module:Class.Inner", if the program has imported it."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        if not hasattr(type(found), "__dict__") or not hasattr(found, "__dict__"):
            return None
        found = vars(found).get(part)
    return found if isinstance(found, type) else None
