"""The storage contract on a real S3 server, and what only a real one can show."""

from __future__ import annotations

import pytest

from engine.storage.base import Storage
from engine.storage.open import open_storage
from tests.services.s3 import Bucket
from tests.storage.contract import StorageContract

pytestmark = pytest.mark.service


class TestRGW(StorageContract):
    @pytest.fixture
    def storage(self, bucket: Bucket) -> Storage:
        return open_storage(bucket.uri(), bucket.options, create=True)

    @pytest.fixture
    def again(self, bucket: Bucket) -> Storage:
        return open_storage(bucket.uri(), bucket.options)
