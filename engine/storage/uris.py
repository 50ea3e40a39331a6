"""Split an address into a storage and the name of one checkpoint in it."""

from __future__ import annotations

import os

from engine.errors import ConfigError
from engine.storage.redact import redact_uri


def is_uri(target: str) -> bool:
    """Whether it is addressed by a scheme ("s3://...") rather than a path of this machine."""
    scheme, separator, _ = target.partition("://")
    return bool(separator) and scheme.replace("+", "").replace("-", "").replace(":", "").isalnum()


def split_uri(target: str | os.PathLike[str]) -> tuple[str, str]:
    """(address of the parent, last name) of a path or URI: "s3://b/run/step-1" -> ("s3://b/run", "step-1").

    ConfigError if there is no name to take off, as in "/" or "s3://bucket".
    """
    text = os.fspath(target).rstrip("/")
    if not is_uri(text):
        parent, name = os.path.split(os.path.abspath(os.path.expanduser(text)) if text else "/")
        if not name:
            raise ConfigError(f"{os.fspath(target)!r} does not name a checkpoint: give the path of one")
        return parent, name
    scheme, _, rest = text.partition("://")
    parent, _, name = rest.rpartition("/")
    if not name or (not parent and scheme != "file"):
        raise ConfigError(f"{redact_uri(text)} does not name a checkpoint: give the URI of one")
    return f"{scheme}://{parent or '/'}", name


def join_uri(parent: str, name: str) -> str:
    """The inverse of `split_uri`."""
    return f"{parent}{name}" if parent.endswith("/") else f"{parent}/{name}"
