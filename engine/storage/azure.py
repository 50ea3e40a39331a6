"""Azure: blocks staged side by side and then committed, through adlfs's client."""

from __future__ import annotations

import secrets
import threading
from typing import Any

from fsspec.asyn import sync

from engine.storage.deadlines import CALL_SECS
from engine.storage.multipart import Multipart

_SLOWEST_BYTES_PER_SEC = 16 << 10


class AzureMultipart(Multipart):
    """Uncommitted blocks are invisible, and Azure deletes them after a week: nothing to abort."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def begin(self, full: str, file_bytes: int) -> str:
        return secrets.token_hex(4)

    def put_part(
        self, full: str, upload: str, number: int, view: memoryview, stop: threading.Event
    ) -> str:
        # All block ids of a blob must have the same length, including those of an earlier attempt.
        block = f"{upload}-{number:06d}"
        limit_secs = CALL_SECS + len(view) / _SLOWEST_BYTES_PER_SEC
        self._wait(self._blob(full).stage_block, limit_secs, block, bytes(view), length=len(view))
        return block

    def complete(self, full: str, upload: str, tokens: list[str]) -> None:
        from azure.storage.blob import BlobBlock

        self._wait(self._blob(full).commit_block_list, CALL_SECS, [BlobBlock(block) for block in tokens])

    def abort(self, full: str, upload: str) -> None:
        pass

    def _blob(self, full: str) -> Any:
        container, name, *_ = self._fs.split_path(full)
        return self._fs.service_client.get_blob_client(container=container, blob=name)

    def _wait(self, method: Any, limit_secs: float, *arguments: Any, **named: Any) -> Any:
        return sync(self._fs.loop, method, *arguments, timeout=limit_secs, **named)
