"""Convert storage options from what users write to what the clients take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.errors import ConfigError

_CREDENTIALS = ("key", "secret", "token", "password", "username", "user", "account")

_S3_DEADLINES = {
    "connect_timeout": 10,
    "read_timeout": 60,
    # Only `storage.retry` retries: nested retries would multiply.
    "retries": {"mode": "standard", "total_max_attempts": 1},
    # Manifests are read side by side.
    "max_pool_connections": 32,
}


def client_options(scheme: str, options: Mapping[str, object]) -> dict[str, Any]:
    """Keyword arguments for fsspec's file system of that scheme.

    Text is converted where it is unmistakable: "true", "false", whole numbers, and JSON objects or arrays.
    Whatever is named like a credential stays text. A dot descends: "client_kwargs.region_name" sets a
    key of the mapping `client_kwargs`. Every request gets a deadline unless the options set one.
    """
    converted: dict[str, Any] = {}
    for name, value in options.items():
        *parents, last = name.split(".")
        target = converted
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ConfigError(f"the storage option {name!r} descends into {parent!r}, not a mapping")
        target[last] = _convert(last, value)
    if scheme in ("s3", "s3a"):
        converted["config_kwargs"] = {**_S3_DEADLINES, **converted.get("config_kwargs", {})}
    # A cached listing hides what other ranks wrote.
    return {**converted, "use_listings_cache": False}


def _convert(name: str, value: object) -> object:
    if not isinstance(value, str) or any(part in name.lower() for part in _CREDENTIALS):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if value[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            raise ConfigError(f"the storage option {name!r} looks like JSON but is not valid") from None
    return value
