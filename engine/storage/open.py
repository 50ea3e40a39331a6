"""Opens a storage by its address."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from engine.errors import ConfigError
from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.redact import redact_uri
from engine.storage.uris import is_uri

_ONE_SLASH = re.compile(r"(?:s3a?|gc?s|az|abfss?|file|memory):/(?!/)")
"""A typo that would otherwise create a local directory of that name."""

_LOCAL_SCHEMES = ("file", "local")


def open_storage(
    directory_or_uri: str | os.PathLike[str],
    options: Mapping[str, object] | None = None,
    *,
    create: bool = False,
) -> Storage:
    """The storage at a path of this machine or an fsspec URI ("s3://bucket/run").

    `options` are the store's (endpoint, credentials, ...), as text or in the client's types.
    `create` creates a missing local directory; stores need none. Otherwise nothing is contacted.
    ConfigError for an invalid address or option, StorageError if creating fails.
    """
    address = os.fspath(directory_or_uri)
    if not address:
        raise ConfigError("the checkpoint directory is empty: give a path or a URI")
    scheme, _, rest = address.partition("://")
    if _ONE_SLASH.match(address):
        meant = redact_uri(address.replace(":/", "://", 1))
        raise ConfigError(f"a slash is missing in the address: write {meant}")
    if not is_uri(address):
        storage: Storage = LocalStorage(address)
    elif scheme in _LOCAL_SCHEMES:
        if not rest.startswith("/"):
            raise ConfigError(f"{redact_uri(address)} names a host: write {scheme}:///path instead")
        storage = LocalStorage(rest)
    else:
        # Local import: fsspec loads slowly, and most directories are local.
        from engine.storage.remote import FsspecStorage

        storage = FsspecStorage(address, options or {})
    if create:
        storage.make_dir()
    return storage
