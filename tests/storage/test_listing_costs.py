"""What listing costs on a store that hands out names by the thousand: every page is a request."""

from __future__ import annotations

import dataclasses
import threading
import uuid
from collections import Counter
from typing import Any

import pytest

from engine.directory.listing import list_checkpoints
from engine.format.manifest import Manifest
from engine.restore.choice import choose_checkpoint
from engine.storage.remote import FsspecStorage
from engine.storage.s3 import S3Multipart
from tests.support.tiny_checkpoint import write_checkpoint

PAGE = 1000


class PagedStore:
    """S3's listing over the objects of fsspec's memory://."""

    def __init__(self, fs: Any, requests: Counter[str]) -> None:
        self._fs = fs
        self._requests = requests

    def split_path(self, full: str) -> tuple[str, str, None]:
        bucket, _, key = full.strip("/").partition("/")
        return bucket, key, None

    def call_s3(
        self, method: str, *, Bucket: str, Prefix: str, Delimiter: str = "", ContinuationToken: str = ""
    ) -> dict[str, Any]:
        if method == "list_multipart_uploads":
            return {}
        assert method == "list_objects_v2"
        self._requests["list"] += 1
        rows: dict[str, dict[str, Any]] = {}
        for name, stored in self._fs.store.items():
            key = name.removeprefix(f"/{Bucket}/")
            if key == name or not key.startswith(Prefix):
                continue
            head, found, _ = key[len(Prefix) :].partition(Delimiter)
            if found:
                rows[Prefix + head + Delimiter] = {"Prefix": Prefix + head + Delimiter}
            else:
                rows[key] = {"Key": key, "Size": stored.size}
        names = sorted(name for name in rows if name > ContinuationToken)
        page = [rows[name] for name in names[:PAGE]]
        more = len(names) > PAGE
        return {
            "Contents": [row for row in page if "Key" in row],
            "CommonPrefixes": [row for row in page if "Prefix" in row],
            "IsTruncated": more,
            **({"NextContinuationToken": names[PAGE - 1]} if more else {}),
        }


@pytest.fixture
def requests() -> Counter[str]:
    return Counter()


@pytest.fixture
def storage(requests: Counter[str], monkeypatch: pytest.MonkeyPatch) -> FsspecStorage:
    storage = FsspecStorage(f"memory://{uuid.uuid4()}/run", {"skip_instance_cache": True})
    storage._client.multipart = S3Multipart(PagedStore(storage._fs, requests))
    lock = threading.Lock()
    for method in ("ls", "find", "info", "cat_file"):
        real = getattr(storage._fs, method)

        def counted(*args: Any, method: str = method, real: Any = real, **kwargs: Any) -> Any:
            with lock:  # manifests are read side by side
                requests[method] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(storage._fs, method, counted)
    return storage


def write_many(storage: FsspecStorage, checkpoints: int, ranks: int) -> None:
    """Manifests of one rank beside the names of many: only names cost anything here."""
    first = write_checkpoint(storage, sequence=1, rows=1)
    root = storage._client.full("")
    raw = storage.read_bytes(f"{first}/manifest.json", max_bytes=1 << 20)
    manifest = Manifest.from_bytes(raw, what="manifest.json")
    storage.delete_tree(first)
    for sequence in range(1, checkpoints + 1):
        id = f"step-{sequence * 10:08d}-{sequence:08x}"
        changed = dataclasses.replace(manifest, id=id, sequence=sequence, step=sequence * 10)
        storage._fs.pipe_file(f"{root}/{id}/manifest.json", changed.to_bytes())
        for rank in range(ranks):
            storage._fs.pipe_file(f"{root}/{id}/shard-{rank:05d}.safetensors", b"1")
            storage._fs.pipe_file(f"{root}/{id}/shard-{rank:05d}.json", b"1")


def test_a_hundred_checkpoints_of_64_ranks(storage: FsspecStorage, requests: Counter[str]) -> None:
    """12,900 objects: their plain listing has 13 pages."""
    write_many(storage, 100, 64)
    requests.clear()
    listed = list_checkpoints(storage)
    assert [item.status for item in listed] == ["committed"] * 100
    assert [item.record.sequence for item in listed if item.record] == list(range(1, 101))
    assert requests == {"list": 1, "cat_file": 100}


def test_more_than_a_page(storage: FsspecStorage, requests: Counter[str]) -> None:
    write_many(storage, 700, 1)
    requests.clear()
    assert len(list_checkpoints(storage)) == 700
    assert requests == {"list": 2, "cat_file": 700}


def test_an_unfinished_attempt_costs_one_more(storage: FsspecStorage, requests: Counter[str]) -> None:
    """For its size, which no manifest tells."""
    write_many(storage, 3, 2)
    storage.write_file("step-00000999-00000999/shard-00000.safetensors", b"12345")
    requests.clear()
    assert [item.bytes for item in list_checkpoints(storage) if item.status == "partial"] == [5]
    assert requests == {"list": 1, "ls": 1, "cat_file": 3}


def test_latest_costs_a_page_and_each_manifest_once(storage: FsspecStorage, requests: Counter[str]) -> None:
    """Nothing for the chosen one again, for its size, or for what somebody is writing."""
    write_many(storage, 100, 64)
    storage.write_file("step-00009999-00009999/shard-00000.safetensors", b"12345")
    requests.clear()
    choice = choose_checkpoint(storage, "latest")
    assert choice is not None
    assert choice.manifest.sequence == 100
    assert requests == {"list": 1, "cat_file": 100}
    requests.clear()
    for selector in (choice.record.id, "step:500"):
        assert choose_checkpoint(storage, selector) is not None
    assert requests == {"list": 2, "cat_file": 2}
