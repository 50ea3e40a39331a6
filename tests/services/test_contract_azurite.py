"""The storage contract on an Azure Blob Storage server."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.directory.verify import verify_checkpoint
from engine.errors import NotFoundError, StorageDeniedError
from engine.restore.choice import choose_checkpoint
from engine.storage.base import Storage
from engine.storage.open import open_storage
from tests.services.azurite import KEY, Azurite
from tests.storage.contract import StorageContract
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.service

WRONG_KEY = base64.b64encode(b"a key that no text may show").decode()


@pytest.fixture(scope="module")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    folder: Path = tmp_path_factory.mktemp("azurite")
    server = Azurite(folder)
    yield server
    server.stop()


@pytest.fixture
def container(azurite: Azurite) -> Iterator[str]:
    name = f"container-{uuid.uuid4().hex[:12]}"
    with azurite.client() as client:
        client.create_container(name)
        yield name
        client.delete_container(name)


@pytest.fixture
def storage(azurite: Azurite, container: str) -> Storage:
    return open_storage(f"az://{container}/run", azurite.options, create=True)


@pytest.fixture
def again(azurite: Azurite, container: str) -> Storage:
    return open_storage(f"az://{container}/run", azurite.options)


class TestAzurite(StorageContract):
    ODD_NAME = "b[1]*"  # adlfs cuts names off at a question mark


def test_the_store_honours_create_only(storage: Storage) -> None:
    assert storage.supports_exclusive_create


def test_a_checkpoint_is_found_and_read_back(storage: Storage) -> None:
    ids = [write_checkpoint(storage, sequence=n, world_size=2) for n in (1, 2)]
    choice = choose_checkpoint(storage, "latest")
    assert choice is not None
    assert choice.record.id == ids[1]
    assert verify_checkpoint(storage, ids[1]).ok


def test_a_missing_container_and_a_wrong_key_are_said(azurite: Azurite, container: str) -> None:
    with pytest.raises(NotFoundError, match=r"az://nowhere-at-all/run: the bucket does not exist"):
        open_storage("az://nowhere-at-all/run", azurite.options, create=True)
    wrong = {"connection_string": str(azurite.options["connection_string"]).replace(KEY, WRONG_KEY)}
    with pytest.raises(StorageDeniedError, match=rf"az://{container}/run: access was denied") as raised:
        open_storage(f"az://{container}/run", wrong, create=True)
    assert WRONG_KEY not in str(raised.value)
