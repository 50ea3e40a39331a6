"""Choose by scheme the interface that Holdfast uses beyond fsspec."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from engine.storage.multipart import Multipart


def multipart_for(scheme: str, fs: Any) -> Multipart | None:
    """The multipart interface of a file system, by its scheme; None if it has none.

    The modules are imported here because each needs its store's packages, and most users install one.
    """
    if scheme in ("s3", "s3a"):
        from engine.storage.s3 import S3Multipart

        return S3Multipart(fs)
    if scheme in ("gs", "gcs"):
        from engine.storage.gcs import GcsMultipart

        return GcsMultipart(fs)
    if scheme in ("az", "abfs", "abfss"):
        from engine.storage.azure import AzureMultipart

        return AzureMultipart(fs)
    return None


def settings_check(scheme: str, fs: Any, uri: str) -> Callable[[], None] | None:
    """A check to call before the first request: ConfigError if settings name something that is missing."""
    if scheme in ("s3", "s3a"):
        from engine.storage.s3_network import check

        return functools.partial(check, fs, uri)
    return None
