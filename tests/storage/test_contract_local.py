"""The contract on a local directory, by path and by file:// URI, with and without direct I/O, tmpfs, disk."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
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


def folder_on(wanted: str, *candidates: str) -> Path:
    """A fresh folder on a "tmpfs", or on a "disk"; skips the test where there is none."""
    for candidate in candidates:
        if os.access(candidate, os.W_OK) and (type_of_mount(candidate) == "tmpfs") == (wanted == "tmpfs"):
            return Path(tempfile.mkdtemp(prefix="holdfast-contract-", dir=candidate))
    pytest.skip(f"no {wanted} to write to among {', '.join(candidates)}")


def type_of_mount(path: str) -> str:
    """The type of the file system that holds a path, as the kernel names it."""
    real = os.path.realpath(path)
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    within = [(place, kind) for place, kind in mounts if Path(real).is_relative_to(place)]
    return max(enumerate(within), key=lambda item: (len(item[1][0]), item[0]))[1][1]


class OnFolder(StorageContract):
    @pytest.fixture
    def again(self, storage: Storage) -> Storage:
        return open_storage(storage.uri)


class TestTmpfs(OnFolder):
    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        folder = folder_on("tmpfs", "/dev/shm", "/run", tempfile.gettempdir())
        yield open_storage(folder)
        shutil.rmtree(folder)


class TestDisk(OnFolder):
    """A file system on a device, wherever pytest's own folders are."""

    @pytest.fixture
    def storage(self) -> Iterator[Storage]:
        folder = folder_on("disk", tempfile.gettempdir(), "/var/tmp", os.getcwd())
        yield open_storage(folder)
        shutil.rmtree(folder)
