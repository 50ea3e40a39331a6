"""The storage contract on a real S3 server, and what only a real one can show."""

from __future__ import annotations

import pytest

from engine.restore.choice import choose_checkpoint
from engine.storage.base import Storage
from engine.storage.open import open_storage
from tests.services.proxy import FaultProxy
from tests.services.s3 import Bucket
from tests.storage.contract import StorageContract
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.service


class TestRGW(StorageContract):
    @pytest.fixture
    def storage(self, bucket: Bucket) -> Storage:
        return open_storage(bucket.uri(), bucket.options, create=True)

    @pytest.fixture
    def again(self, bucket: Bucket) -> Storage:
        return open_storage(bucket.uri(), bucket.options)


def test_latest_costs_one_listing_and_each_manifest_once(bucket: Bucket, proxy: FaultProxy) -> None:
    """As the server counts them, whatever the client does on its own."""
    writer = open_storage(bucket.uri(), bucket.options, create=True)
    ids = [write_checkpoint(writer, sequence=n, world_size=3, rows=3) for n in range(1, 13)]
    storage = open_storage(bucket.uri(), bucket.at(proxy.endpoint).options)
    storage.list_heads()  # whatever connecting takes
    before = proxy.requests
    choice = choose_checkpoint(storage, "latest")
    assert choice is not None
    assert choice.record.id == ids[-1]
    assert proxy.requests - before == 1 + len(ids)
    assert choose_checkpoint(storage, ids[3]) is not None
    assert proxy.requests - before == 1 + len(ids) + 2
