"""A moto server, S3 in Python, as a subprocess on a free loopback port."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

BUCKET = "checkpoints"


@dataclass(frozen=True)
class S3Server:
    """A running server; `process` may be killed to play an outage."""

    endpoint: str
    process: subprocess.Popen[str]

    @property
    def options(self) -> dict[str, object]:
        """Storage options that reach it; moto does not look at the credentials."""
        return {
            "endpoint_url": self.endpoint,
            "key": "test-access-key",
            "secret": "test-secret-key",
            "client_kwargs.region_name": "us-east-1",
        }

    def client(self) -> Any:
        """A boto3 client, to look at the bucket past everything that is under test."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="test-access-key",
            aws_secret_access_key="test-secret-key",
            region_name="us-east-1",
        )


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """Start a server with one empty bucket; skips the test, by name, where moto or s3fs is not installed."""
    for package in ("s3fs", "moto", "flask", "boto3"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install s3fs 'moto[server]'")
    bypass = ",".join(part for part in (os.environ.get("NO_PROXY"), "127.0.0.1") if part)
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NO_PROXY": bypass},
    )
    try:
        server = S3Server(_address(process), process)
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    """The address that the server announces: it picks a free port itself, so none is taken in between."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
            # Keep reading, or the server would block once the pipe is full of its request log.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return found[1]
    pytest.fail("the moto server did not start: " + "".join(seen[-20:]))
