"""The contract on a local directory, by path and by file:// URI, with and without direct I/O."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from engine.storage.base import Storage
from engine.storage.local import LocalStorage
from engine.storage.open import open_storage
from engine.storage.system import System
from tests.storage.contract import StorageContract


class TestLocal(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(tmp_path / "some/where", create=True)

    @pytest.fixture
    def again(self, tmp_path: Path) -> Storage:
        return open_storage(tmp_path / "some/where")


class TestFileUri(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(f"file://{tmp_path}/some/where", create=True)

    @pytest.fixture
    def again(self, tmp_path: Path) -> Storage:
        return open_storage(f"file://{tmp_path}/some/where")


class NoDirectSystem(System):
    """A file system without O_DIRECT."""

    def set_direct(self, fd: int, on: bool) -> None:
        if on:
            raise OSError(errno.EINVAL, "no O_DIRECT here")


class TestWithoutDirectIO(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path, system=NoDirectSystem())

    @pytest.fixture
    def again(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path, system=NoDirectSystem())
