"""The contract on S3, served by moto, and what only a store with requests and uploads can get wrong."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from engine.errors import NotFoundError, StorageUnavailableError
from engine.storage.base import Storage
from engine.storage.open import open_storage
from engine.storage.remote import FsspecStorage
from engine.storage.retry import Retry
from tests.services.moto import BUCKET, S3Server, moto_server
from tests.storage.buffers import padded, pattern
from tests.storage.contract import SEVERAL_WINDOWS, StorageContract

pytestmark = pytest.mark.service


@pytest.fixture
def uri() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4()}/run"


@pytest.fixture
def storage(s3_server: S3Server, uri: str) -> Storage:
    return open_storage(uri, s3_server.options, create=True)


@pytest.fixture
def again(s3_server: S3Server, uri: str) -> Storage:
    return open_storage(uri, s3_server.options)


class TestS3(StorageContract):
    pass


@pytest.mark.parametrize("moment", ["window", "close", "commit"])
def test_failed_upload_leaves_no_parts(
    s3_server: S3Server, storage: Storage, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Parts of an upload that was given up cost money for ever, and no listing shows them."""
    import s3fs.core

    def fail(*_: object) -> None:
        raise ValueError("mine")

    if moment != "window":
        monkeypatch.setattr(s3fs.core.S3File, moment, fail)
    expected = ValueError if moment == "window" else Exception
    with pytest.raises(expected, match="mine"):
        storage.write_shard(
            "shard",
            padded(pattern(SEVERAL_WINDOWS)),
            SEVERAL_WINDOWS,
            on_window=lambda begin, end: fail() if moment == "window" and begin else None,
        )
    assert not storage.exists("shard")
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=BUCKET)


def test_a_missing_bucket_is_an_error_at_once(s3_server: S3Server) -> None:
    for use in (
        lambda: open_storage("s3://no-such-bucket/run", s3_server.options, create=True),
        lambda: open_storage("s3://no-such-bucket/run", s3_server.options).list_dir(),
        lambda: open_storage("s3://no-such-bucket/run", s3_server.options).list_tree(),
    ):
        with pytest.raises(NotFoundError, match="s3://no-such-bucket/run: the bucket does not exist"):
            use()


def test_a_missing_bucket_is_not_created(s3_server: S3Server) -> None:
    """s3fs makes buckets when asked for a directory."""
    storage = open_storage("s3://no-such-bucket/run", s3_server.options)
    storage.make_dir("step")
    names = [bucket["Name"] for bucket in s3_server.client().list_buckets()["Buckets"]]
    assert "no-such-bucket" not in names


def test_an_outage_is_never_an_empty_listing() -> None:
    with moto_server() as server:
        pauses: list[float] = []
        options = {**server.options, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        storage = FsspecStorage(
            f"s3://{BUCKET}/run", options, retry=Retry(attempts=3, sleep=pauses.append)
        )
        storage.write_file("a", b"1")
        server.process.kill()
        server.process.wait()
        for use in (
            lambda: storage.list_dir(),
            lambda: storage.list_dir("step"),
            lambda: storage.list_tree(),
            lambda: storage.exists("a"),
            lambda: storage.exists("b"),
            lambda: storage.size("a"),
            lambda: storage.read_bytes("a", max_bytes=10),
            lambda: storage.publish("b", b"1", exclusive=False),
            lambda: storage.publish("b", b"1", exclusive=True),
            lambda: storage.supports_exclusive_create,
            lambda: storage.write_shard("b", padded(b"1"), 1),
            lambda: storage.delete_file("a"),
            lambda: storage.delete_tree("step"),
            lambda: storage.make_dir(),
        ):
            pauses.clear()
            with pytest.raises(StorageUnavailableError, match="given up after 3 tries"):
                use()
            assert len(pauses) == 2


@contextmanager
def counted_requests(storage: Storage) -> Iterator[list[str]]:
    """The names of the requests that the block sends."""
    assert isinstance(storage, FsspecStorage)
    storage.exists("x")  # connects
    sent: list[str] = []
    events = storage._fs.s3.meta.events
    events.register("before-call.s3", lambda model, **_: sent.append(model.name), unique_id="counted")
    try:
        yield sent
    finally:
        events.unregister("before-call.s3", unique_id="counted")


def test_one_listing_request_for_a_tree(s3_server: S3Server, storage: Storage) -> None:
    for step in range(5):
        for name in ("manifest.json", "shard-00000.json"):
            storage.write_file(f"step-{step}/{name}", b"{}")
    with counted_requests(storage) as requests:
        assert len(storage.list_tree()) == 6
    assert requests == ["ListObjectsV2"]
    with counted_requests(storage) as requests:
        storage.read_bytes("step-0/manifest.json", max_bytes=100)
    assert requests == ["GetObject"]


def test_upload_is_completed_once(storage: Storage) -> None:
    with counted_requests(storage) as requests:
        storage.write_shard("shard", padded(pattern(SEVERAL_WINDOWS)), SEVERAL_WINDOWS)
    upload = [name for name in requests if name not in ("HeadObject", "ListObjectsV2")]
    assert upload == ["CreateMultipartUpload", *["UploadPart"] * 3, "CompleteMultipartUpload"]
    with counted_requests(storage) as requests:
        storage.write_shard("small", padded(b"x"), 1)
    assert [name for name in requests if name not in ("HeadObject", "ListObjectsV2")] == ["PutObject"]
