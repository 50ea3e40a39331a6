"""A real S3 server for the tests in this folder: one per worker of pytest-xdist, with a bucket per test."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The tiny dataset and the undisturbed runs to compare with are those of the end-to-end tests.
from tests.e2e.conftest import (  # noqa: F401
    data,
    undisturbed_1,
    undisturbed_2,
    undisturbed_2_no_dropout,
)
from tests.services.packages import need
from tests.services.proxy import FaultProxy
from tests.services.rgw import OWNER, PROGRAMS, Gateway
from tests.services.runs import StoreRun
from tests.services.s3 import Bucket

pytest.register_assert_rewrite("tests.storage.contract")


def started(store: str) -> Gateway:
    """A gateway that answers; skips the test, by name, where it cannot be installed."""
    pytest.importorskip("s3fs")
    pytest.importorskip("boto3")
    need(PROGRAMS)
    # Not below pytest's own folder: the names of its sockets may have 107 bytes.
    gateway = Gateway(Path(tempfile.mkdtemp(prefix="hf-rgw-")), store)
    try:
        gateway.start()
    except BaseException:
        gateway.stop()
        raise
    return gateway


@pytest.fixture(scope="session")
def rgw() -> Iterator[Gateway]:
    """A server that all tests of this process share. Its data is in memory: leave it running."""
    gateway = started("memstore")
    yield gateway
    gateway.stop()


@pytest.fixture(scope="session")
def mortal_rgw() -> Iterator[Gateway]:
    """A server whose data survives: `kill()` it and `start()` it again."""
    gateway = started("bluestore")
    yield gateway
    gateway.stop()


def new_bucket(gateway: Gateway) -> Bucket:
    return Bucket(gateway.endpoint, f"bucket-{uuid.uuid4().hex[:12]}", OWNER).create()


@pytest.fixture
def bucket(rgw: Gateway) -> Iterator[Bucket]:
    """An empty bucket of the shared server."""
    made = new_bucket(rgw)
    yield made
    made.remove()


@pytest.fixture
def proxy(rgw: Gateway) -> Iterator[FaultProxy]:
    """A faultless way to the shared server, until the test sets `faults`."""
    with FaultProxy(rgw.port) as made:
        yield made


@pytest.fixture
def new_run(tmp_path: Path, data: Path, bucket: Bucket) -> Callable[[str], StoreRun]:  # noqa: F811
    """A fresh run whose checkpoints go to the test's bucket."""
    return lambda name: StoreRun(tmp_path / name, data, bucket)
