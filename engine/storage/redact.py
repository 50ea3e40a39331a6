"""Keep secrets out of every text: addresses, options and error messages of others.

What counts as a secret is decided by exclusion: an option is shown only if its name is on the short list
of harmless ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qsl, quote, unquote

HIDDEN = "***"

HARMLESS = frozenset(
    {
        "anon",
        "block_size",
        "cache_regions",
        "client_kwargs",
        "config_kwargs",
        "connect_timeout",
        "default_block_size",
        "endpoint_url",
        "max_concurrency",
        "max_attempts",
        "mode",
        "profile",
        "project",
        "read_timeout",
        "region",
        "region_name",
        "requester_pays",
        "retries",
        "s3",
        "addressing_style",
        "signature_version",
        "total_max_attempts",
        "use_ssl",
        "verify",
        "version_aware",
    }
)
"""Names of options whose values may be printed."""

SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_CONNECTION_STRING",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_CLIENT_SECRET",
    "GOOGLE_API_KEY",
)
"""Environment variables from which clients take their secrets."""

_SHORTEST_SECRET = 4
# With a colon up to the last "@", since secrets with a "/" or "@" in them get pasted as they are. Azure's
# container@account is an address, not a user.
_USERINFO = re.compile(r"(?<=://)(?:[^/@\s'\"]*:[^\s'\"]*|(?<!abfs://)(?<!abfss://)[^/@\s'\"]+)@")
_QUERY = re.compile(r"(?<=://)([^\s'\"?]*)\?[^\s'\"]*")


def redact_uri(uri: str) -> str:
    """The URI without user, password and query, any of which may carry a secret."""
    return _QUERY.sub(rf"\1?{HIDDEN}", _USERINFO.sub(f"{HIDDEN}@", uri))


def redact_options(options: Mapping[str, object]) -> dict[str, object]:
    """Options fit for printing: the values of all but the `HARMLESS` ones are hidden."""
    return {name: _shown(name, value) for name, value in options.items()}


class Redactor:
    """Removes the secrets of one storage from texts that others wrote, such as a client's error message."""

    def __init__(self, uri: str, options: Mapping[str, object]) -> None:
        found = {*_secrets_of_uri(uri), *_secrets_of_options(options)}
        found |= {os.environ[name] for name in SECRET_VARIABLES if os.environ.get(name)}
        spelled = {spelling for secret in found for spelling in (secret, quote(secret, safe=""))}
        # Longest first, so that a secret which contains another leaves nothing of itself behind.
        long_enough = (text for text in spelled if len(text) >= _SHORTEST_SECRET)
        self._secrets = sorted(long_enough, key=len, reverse=True)

    def scrub(self, text: str) -> str:
        """The text on one line, without any of the secrets and without credentials in URIs."""
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        return redact_uri(" ".join(text.split()))


def _shown(name: str, value: object) -> object:
    if name not in HARMLESS:
        return HIDDEN
    if isinstance(value, Mapping):
        return redact_options(value)
    return redact_uri(value) if isinstance(value, str) else value


def _secrets_of_uri(uri: str) -> Iterator[str]:
    for userinfo in _USERINFO.findall(uri):
        for part in userinfo.rstrip("@").split(":", 1):
            yield from {part, unquote(part)}
    for _, value in parse_qsl(uri.partition("?")[2]):
        yield value


def _secrets_of_options(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secrets_of_options(value)
        elif isinstance(value, str) and name not in HARMLESS:
            yield value
        elif isinstance(value, str):
            yield from _secrets_of_uri(value)
