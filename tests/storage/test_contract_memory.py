"""The contract on fsspec's memory://, through the class that serves every remote store."""

from __future__ import annotations

import uuid

import pytest

from engine.storage.base import Storage
from engine.storage.open import open_storage
from tests.storage.contract import StorageContract


class TestMemory(StorageContract):
    @pytest.fixture
    def uri(self) -> str:
        return f"memory://{uuid.uuid4()}/run"

    @pytest.fixture
    def storage(self, uri: str) -> Storage:
        return open_storage(uri, create=True)

    @pytest.fixture
    def again(self, uri: str) -> Storage:
        return open_storage(uri)
