"""The contract on S3, served by moto, and what only a store with requests and uploads can get wrong."""

from __future__ import annotations

import http.client
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from engine.directory import marks
from engine.directory.listing import list_checkpoints
from engine.errors import DamagedError, NotFoundError, StorageError, StorageUnavailableError
from engine.storage.base import WINDOW_BYTES, Heads, Storage
from engine.storage.open import open_storage
from engine.storage.remote import FsspecStorage
from engine.storage.retry import Retry
from engine.storage.s3 import S3Multipart
from engine.storage.transport import RefusedError, Transport
from tests.services.moto import BUCKET, S3Server, moto_server
from tests.storage.buffers import pattern, source
from tests.storage.contract import SEVERAL_WINDOWS, StorageContract, read_all
from tests.support.tiny_checkpoint import write_checkpoint

botocore = pytest.importorskip("botocore")
pytest.importorskip("botocore.auth")


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


@pytest.mark.parametrize("moment", ["window", "put_part", "complete"])
def test_failed_upload_leaves_no_parts(
    s3_server: S3Server, storage: Storage, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Parts of an upload that was given up cost money for ever, and no listing shows them."""

    def fail(*_: object) -> None:
        raise ValueError("mine")

    if moment != "window":
        monkeypatch.setattr(S3Multipart, moment, fail)
    expected = ValueError if moment == "window" else Exception
    broken_off = source(pattern(SEVERAL_WINDOWS), lambda begin, _: fail() if begin else None)
    with pytest.raises(expected, match="mine"):
        storage.write_shard("shard", broken_off if moment == "window" else source(pattern(SEVERAL_WINDOWS)))
    assert not storage.exists("shard")
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=BUCKET)


def begin_upload(server: S3Server, key: str) -> None:
    """What a process leaves behind that is killed in the middle of an upload."""
    client = server.client()
    upload = client.create_multipart_upload(Bucket=BUCKET, Key=key)["UploadId"]
    client.upload_part(Bucket=BUCKET, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * 1000)


def test_orphans_are_found_and_removed(s3_server: S3Server, storage: Storage, uri: str) -> None:
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    for name in ("step-1/shard-0", "step-1/shard-1", "step-10/shard-0"):
        begin_upload(s3_server, f"{prefix}/{name}")
    begin_upload(s3_server, f"{prefix}-of-another/step-1/shard-0")
    storage.write_file("step-1/shard-2", b"1")
    assert sorted(storage.unfinished_uploads()) == ["step-1/shard-0", "step-1/shard-1", "step-10/shard-0"]
    storage.delete_tree("step-1")
    assert storage.unfinished_uploads() == ["step-10/shard-0"]
    assert storage.list_tree() == {"": {}}
    storage.abort_uploads("step-10")
    storage.abort_uploads("step-10")
    assert storage.unfinished_uploads() == []
    (left,) = s3_server.client().list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert left["Key"] == f"{prefix}-of-another/step-1/shard-0"
    s3_server.client().abort_multipart_upload(Bucket=BUCKET, Key=left["Key"], UploadId=left["UploadId"])


def test_a_store_without_signed_addresses_is_served_by_the_client(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Slower, and said once."""
    refusals: list[str] = []

    def refuse(*_: object) -> None:
        refusals.append("refused")
        raise RefusedError("the store answered 403")

    monkeypatch.setattr(Transport, "put", refuse)
    monkeypatch.setattr(Transport, "get", refuse)
    data = pattern(SEVERAL_WINDOWS)
    with caplog.at_level("WARNING"):
        storage.write_shard("shard", source(data))
        assert read_all(storage, "shard") == data
    assert 1 <= len(refusals) <= 3
    assert caplog.text.count("does not take signed addresses") == 1


def test_addresses_are_signed_in_the_present_way(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Left alone, botocore signs those of old regions as of 2006; and Ceph refuses the signature of other
    services, which moto does not look at."""
    used: list[type] = []

    def noting(kind: Any) -> Any:
        real = kind.add_auth
        return lambda self, request: (used.append(kind), real(self, request))[1]

    for kind in (botocore.auth.HmacV1QueryAuth, botocore.auth.SigV4QueryAuth, botocore.auth.S3SigV4QueryAuth):
        monkeypatch.setattr(kind, "add_auth", noting(kind))
    data = pattern(SEVERAL_WINDOWS)
    storage.write_shard("shard", source(data))
    assert read_all(storage, "shard") == data
    assert used[0] is botocore.auth.S3SigV4QueryAuth
    assert botocore.auth.HmacV1QueryAuth not in used


def test_a_read_that_is_refused_for_good_says_why(storage: Storage, s3_server: S3Server) -> None:
    data = pattern(100_000)
    storage.write_shard("shard", source(data))
    with storage.open_reader("shard") as reader:
        storage.delete_file("shard")
        with pytest.raises(NotFoundError, match="shard"):
            reader.read_into(0, memoryview(bytearray(10)))
        storage.write_file("shard", b"short")
        with pytest.raises(DamagedError, match="truncated"):
            reader.read_into(0, memoryview(bytearray(10)))


def test_no_signature_in_any_text(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A signed address is as good as a password while it lasts."""
    data = pattern(SEVERAL_WINDOWS)
    storage.write_shard("shard", source(data))
    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", lambda self: 1 / 0)
    with caplog.at_level("DEBUG", "engine"), pytest.raises(StorageError) as raised:
        storage.read_into("shard", 0, memoryview(bytearray(10)))
    shown = caplog.text + "".join(traceback.format_exception(raised.value))
    assert "Signature" not in shown
    assert "test-access-key" not in shown


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
        storage = FsspecStorage(f"s3://{BUCKET}/run", options, retry=Retry(attempts=3, sleep=pauses.append))
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
            lambda: storage.write_shard("b", source(b"1")),
            lambda: storage.delete_file("a"),
            lambda: storage.delete_tree("step"),
            lambda: storage.make_dir(),
        ):
            pauses.clear()
            with pytest.raises(StorageUnavailableError, match="gave up after 3 tries"):
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


def test_upload_is_completed_once(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    put, parts = Transport.put, []

    def counted(transport: Transport, url: str, view: memoryview, stop: threading.Event) -> str:
        parts.append(len(view))
        return put(transport, url, view, stop)

    monkeypatch.setattr(Transport, "put", counted)
    with counted_requests(storage) as requests:
        storage.write_shard("shard", source(pattern(SEVERAL_WINDOWS)))
    upload = [name for name in requests if name not in ("HeadObject", "ListObjectsV2")]
    assert upload == ["CreateMultipartUpload", "CompleteMultipartUpload"]
    assert sorted(parts) == [12_345, WINDOW_BYTES, WINDOW_BYTES]
    with counted_requests(storage) as requests:
        storage.write_shard("small", source(b"x"))
    assert [name for name in requests if name not in ("HeadObject", "ListObjectsV2")] == ["PutObject"]


def test_a_listing_leaves_the_shards_out(storage: Storage) -> None:
    ids = [write_checkpoint(storage, sequence=sequence, world_size=3) for sequence in range(1, 6)]
    with counted_requests(storage) as requests:
        listed = list_checkpoints(storage)
    assert [(item.id, item.status) for item in listed] == [(id, "committed") for id in ids]
    assert Counter(requests) == {"ListObjectsV2": 1, "GetObject": 5}
    marks.hold(storage, ids[1])
    marks.mark_damaged(storage, ids[3], "block 7")
    storage.write_file("step-00000999-00000999/shard-00000.safetensors", b"12345")
    again = {item.id: item for item in list_checkpoints(storage)}
    assert [item.on_hold for item in again.values()] == [False, True, False, False, False, False]
    assert (again[ids[3]].status, again[ids[3]].reason) == ("damaged", "block 7")
    partial = again["step-00000999-00000999"]
    assert (partial.status, partial.bytes) == ("partial", 5)


def test_a_store_that_groups_by_slashes_only_is_listed_in_full(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_file("step-1/manifest.json", b"{}")
    storage.write_file("step-1/shard-00000.json", b"1")
    assert storage.list_heads() == Heads({"": {}, "step-1": {"manifest.json": 2}}, whole=False)
    monkeypatch.setattr(S3Multipart, "names", lambda self, root: None)
    whole = {"": {}, "step-1": {"manifest.json": 2, "shard-00000.json": 1}}
    assert storage.list_heads() == Heads(whole, whole=True)
