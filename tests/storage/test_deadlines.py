"""Every call of a client has a deadline: an asynchronous one would otherwise wait for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.exceptions import FSTimeoutError

from engine.errors import StorageUnavailableError
from engine.storage import deadlines
from engine.storage.remote_failures import classify


class Hanging(AsyncFileSystem):
    """A client that never gets an answer."""

    cachable = False

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError


@pytest.mark.parametrize("module", ["s3fs.core", "gcsfs.core", "adlfs.spec"])
def test_a_call_without_an_answer_ends(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As an outage, so that it is tried again."""
    monkeypatch.setattr(Hanging, "__module__", module)
    monkeypatch.setattr(deadlines, "CALL_SECS", 0.01)
    with pytest.raises(FSTimeoutError) as raised:
        deadlines.call(Hanging(), "info", "bucket/x")
    assert classify(raised.value) is StorageUnavailableError


@pytest.mark.parametrize(
    ("moving_bytes", "secs"), [(0, 150.0), (16 << 20, 150.0 + 1024.0), (256 << 20, 150.0 + 16384.0)]
)
def test_a_call_that_moves_data_gets_the_time_of_a_slow_line(
    monkeypatch: pytest.MonkeyPatch, moving_bytes: int, secs: float
) -> None:
    limits: list[float] = []

    def sync(loop: object, method: object, *args: object, timeout: float, **kwargs: object) -> None:
        limits.append(timeout)

    monkeypatch.setattr(Hanging, "__module__", "s3fs.core")
    monkeypatch.setattr(deadlines, "sync", sync)
    deadlines.call(Hanging(), "info", "bucket/x", moving_bytes=moving_bytes)
    assert limits == [secs]
