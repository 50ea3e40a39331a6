"""Uploads in parts, against stores that are played: what is sent, in which order, and what is thrown away."""

from __future__ import annotations

import threading
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import pytest

from engine.errors import StorageDeniedError, StorageError, StorageUnavailableError
from engine.storage.base import WINDOW_BYTES
from engine.storage.gcs import GcsMultipart
from engine.storage.multipart import MAX_PARTS, Multipart, Names, part_bytes
from engine.storage.remote import FsspecStorage
from engine.storage.retry import Retry
from tests.storage.buffers import pattern, source

SIZE = 5 * WINDOW_BYTES + 12_345


class Parts(Multipart):
    """A store with uploads in parts on top of memory://, that fails where it is told to."""

    def __init__(self, fs: Any) -> None:
        self.fs = fs
        self.parts: dict[str, dict[int, bytes]] = {}
        self.calls: list[str] = []
        self.fail: Callable[[str], None] = lambda what: None
        self.lock = threading.Lock()
        self.most_at_once = 0
        self.stop = threading.Event()
        self._now = 0

    def begin(self, full: str, file_bytes: int) -> str:
        self._note("begin")
        self.parts["id"] = {}
        return "id"

    def put_part(self, full: str, upload: str, number: int, view: memoryview, stop: threading.Event) -> str:
        self.stop = stop
        with self.lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            self._note(f"part {number}")
            with self.lock:
                self.parts[upload][number] = bytes(view)
        finally:
            with self.lock:
                self._now -= 1
        return str(number)

    def complete(self, full: str, upload: str, tokens: list[str]) -> None:
        if upload not in self.parts:
            raise FileNotFoundError("no such upload")
        parts = self.parts.pop(upload)
        self.fs.pipe_file(full, b"".join(parts[int(token)] for token in tokens))
        self._note("complete")

    def abort(self, full: str, upload: str) -> None:
        self.parts.pop(upload)
        self._note("abort")

    def _note(self, what: str) -> None:
        with self.lock:
            self.calls.append(what)
        self.fail(what)


@pytest.fixture
def storage() -> FsspecStorage:
    options = {"skip_instance_cache": True}
    return FsspecStorage(f"memory://{uuid.uuid4()}/run", options, retry=Retry(sleep=lambda _: None))


@pytest.fixture
def parts(storage: FsspecStorage) -> Parts:
    parts = Parts(storage._fs)
    storage._client.multipart = parts
    return parts


def failing(times: int, of: str, error: Exception) -> Callable[[str], None]:
    left = [times]

    def fail(what: str) -> None:
        if what == of and left[0]:
            left[0] -= 1
            raise error

    return fail


def test_every_byte_arrives_and_the_object_appears_last(storage: FsspecStorage, parts: Parts) -> None:
    storage.write_shard("shard", source(pattern(SIZE)))
    assert parts.calls[0] == "begin"
    assert sorted(parts.calls[1:-1]) == [f"part {number}" for number in range(1, 7)]
    assert parts.calls[-1] == "complete"
    back = bytearray(SIZE)
    storage.read_into("shard", 0, memoryview(back))
    assert back == pattern(SIZE)


def test_parts_in_flight_are_bounded(storage: FsspecStorage, parts: Parts) -> None:
    """Each holds a copy where the client wants one."""
    assert parts.at_once(WINDOW_BYTES) == 2
    storage.write_shard("shard", source(pattern(SIZE)))
    assert 1 <= parts.most_at_once <= 2


def test_small_objects_take_one_request(storage: FsspecStorage, parts: Parts) -> None:
    storage.write_shard("shard", source(pattern(WINDOW_BYTES)))
    assert parts.calls == []


@pytest.mark.parametrize("of", ["begin", "part 1", "part 4", "part 6"])
def test_what_fails_for_a_while_is_tried_again(storage: FsspecStorage, parts: Parts, of: str) -> None:
    parts.fail = failing(5, of, ConnectionResetError("reset"))
    storage.write_shard("shard", source(pattern(SIZE)))
    assert parts.calls.count(of) == 6
    assert storage.size("shard") == SIZE
    assert "abort" not in parts.calls


def test_a_completion_whose_answer_was_lost_has_completed(storage: FsspecStorage, parts: Parts) -> None:
    parts.fail = failing(1, "complete", ConnectionResetError("reset"))
    storage.write_shard("shard", source(pattern(SIZE)))
    assert storage.size("shard") == SIZE


@pytest.mark.parametrize("of", ["part 1", "part 5"])
@pytest.mark.parametrize(
    ("error", "kind"),
    [(PermissionError("403"), StorageDeniedError), (ConnectionResetError("reset"), StorageUnavailableError)],
)
def test_what_fails_for_good_is_thrown_away(
    storage: FsspecStorage, parts: Parts, of: str, error: Exception, kind: type[StorageError]
) -> None:
    parts.fail = failing(99, of, error)
    with pytest.raises(kind):
        storage.write_shard("shard", source(pattern(SIZE)))
    assert parts.calls[-1] == "abort"
    assert parts.parts == {}
    assert storage.list_tree() == {"": {}}
    tries = 1 if kind is StorageDeniedError else 8
    assert parts.calls.count(of) == tries


def test_an_upload_whose_abort_fails_reports_the_first_error(storage: FsspecStorage, parts: Parts) -> None:
    def fail(what: str) -> None:
        if what == "part 2":
            raise PermissionError("403")
        if what == "abort":
            raise ConnectionResetError("reset")

    parts.fail = fail
    with pytest.raises(StorageDeniedError):
        storage.write_shard("shard", source(pattern(SIZE)))
    assert parts.calls.count("abort") >= 1


def test_after_a_failure_no_further_part_is_begun(
    storage: FsspecStorage, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Parts, "at_once", lambda self, size: 1)
    parts.fail = failing(99, "part 2", PermissionError("403"))
    prepared: list[int] = []
    with pytest.raises(StorageDeniedError):
        storage.write_shard("shard", source(pattern(SIZE), lambda begin, end: prepared.append(begin)))
    assert "part 5" not in parts.calls
    assert len(prepared) <= 3, "it waited for parts of the staging buffer that nobody will send"


def test_after_a_failure_other_parts_are_not_tried_again(
    storage: FsspecStorage, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would go on for two minutes, and the save would wait for them to report what is known."""
    monkeypatch.setattr(Parts, "at_once", lambda self, size: 2)
    second_is_out = threading.Event()
    told: list[bool] = []

    def fail(what: str) -> None:
        if what == "part 1":
            assert second_is_out.wait(10.0)
            raise PermissionError("403")
        if what == "part 2":
            second_is_out.set()
            told.append(parts.stop.wait(10.0))
            raise ConnectionResetError("reset")

    parts.fail = fail
    with pytest.raises(StorageDeniedError):
        storage.write_shard("shard", source(pattern(SIZE)))
    assert told == [True]
    assert parts.calls.count("part 2") == 1


@pytest.mark.parametrize(
    ("file_bytes", "expected"),
    [
        (1, WINDOW_BYTES),
        (WINDOW_BYTES * MAX_PARTS, WINDOW_BYTES),
        (WINDOW_BYTES * MAX_PARTS + 1, 2 * WINDOW_BYTES),
        (5 << 40, 37 * WINDOW_BYTES),
    ],
)
def test_parts_stay_within_the_limits(file_bytes: int, expected: int) -> None:
    assert part_bytes(file_bytes) == expected
    assert -(-file_bytes // expected) <= MAX_PARTS
    assert 5 << 20 <= expected <= 5 << 30


class Google:
    """Google's XML interface as gcsfs's `call` reaches it."""

    base = "https://storage.googleapis.com/storage/v1/"

    def __init__(self) -> None:
        self.uploads: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, tuple[str, ...]]] = []

    def split_path(self, full: str) -> tuple[str, str, None]:
        bucket, _, key = full.partition("/")
        return bucket, key, None

    def call(self, method: str, address: str, data: bytes = b"", **params: str) -> Any:
        self.requests.append((method, address, tuple(sorted(params))))
        upload_id = params.get("uploadId", "")
        match method, sorted(params):
            case "POST", ["uploads"]:
                self.uploads["u&1"] = {}
                return (
                    {},
                    b"<Result xmlns='http://s3'><Bucket>b</Bucket><UploadId>u&amp;1</UploadId></Result>",
                )
            case "PUT", ["partNumber", "uploadId"]:
                self.uploads[upload_id][params["partNumber"]] = data
                return {"ETag": f'"{params["partNumber"]}"'}, b""
            case "POST", ["uploadId"]:
                found = [(part[0].text, part[1].text) for part in ElementTree.fromstring(data)]
                assert all(etag == f'"{number}"' for number, etag in found)
                held = self.uploads.pop(upload_id)
                self.objects[address] = b"".join(held[str(number)] for number, _ in found)
                return {}, b"<CompleteMultipartUploadResult/>"
            case "DELETE", ["uploadId"]:
                del self.uploads[upload_id]
                return {}, b""
            case "GET", [*_]:
                rows = [f"<Upload><Key>run/{key}</Key><UploadId>{key}</UploadId></Upload>" for key in "ab"]
                if "key-marker" not in params:
                    more = "<NextKeyMarker>run/a</NextKeyMarker><NextUploadIdMarker>a</NextUploadIdMarker>"
                    return {}, f"<L><IsTruncated>true</IsTruncated>{more}{rows[0]}</L>".encode()
                return {}, f"<L><IsTruncated>false</IsTruncated>{rows[1]}</L>".encode()
        raise AssertionError((method, address, params))


def test_google() -> None:
    store = Google()
    google, never = GcsMultipart(store), threading.Event()
    upload_id = google.begin("b/run/shard é", 30)
    tokens = [google.put_part("b/run/shard é", upload_id, n, memoryview(b"%d" % n), never) for n in (1, 2, 3)]
    google.complete("b/run/shard é", upload_id, tokens)
    assert store.objects == {"https://storage.googleapis.com/b/run/shard%20%C3%A9": b"123"}
    google.abort("b/run/other", google.begin("b/run/other", 30))
    assert store.uploads == {}
    assert google.unfinished("b/run") == [("b/run/a", "a"), ("b/run/b", "b")]


def test_google_lists_without_shards() -> None:
    asked: list[dict[str, Any]] = []

    class Listing(Google):
        def call(self, method: str, address: str, *args: str, **params: Any) -> Any:
            asked.append({"args": (method, address, *args), **params})
            if params["pageToken"] is None:
                rows = [{"name": "run/lease", "size": "3"}, {"name": "run/step-1/manifest.json", "size": "2"}]
                return {"items": rows, "nextPageToken": "next"}
            return {"prefixes": ["run/step-1/shard-", "run/step-2/shard-"]}

    names = GcsMultipart(Listing()).names("b/run")
    assert names == Names({"lease": 3, "step-1/manifest.json": 2}, frozenset({"step-1", "step-2"}))
    assert asked[0]["args"] == ("GET", "b/{}/o", "b")
    assert (asked[1]["prefix"], asked[1]["delimiter"], asked[1]["pageToken"]) == ("run/", "/shard-", "next")
