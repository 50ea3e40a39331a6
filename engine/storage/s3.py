"""S3 and what speaks its protocol: multipart uploads, reads by signed addresses, listings without shards."""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from typing import Any

from engine.storage.connections import Limits
from engine.storage.deadlines import call
from engine.storage.multipart import DIRECT_AT_ONCE, SHARD, Multipart, Names
from engine.storage.s3_network import pool_manager
from engine.storage.transport import RefusedError, Transport

log = logging.getLogger(__name__)

SIGNED_SECS = 3600
"""How long a signed address is valid."""

_ADDRESS_SECS = 60.0
"""How long one is used: temporary credentials, and with them the address, may end long before its time."""

_MOST_ADDRESSES = 256


class S3Multipart(Multipart):
    """S3 through s3fs, the bytes of shards past it.

    s3fs and botocore do all that needs an account: they find credentials and regions, and sign addresses.
    `Transport` moves the bytes of parts and ranges. Where a store refuses signed addresses, s3fs moves them.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._transport: Transport | None = None
        self._direct: bool | None = None
        self._addresses: dict[str, tuple[str, float]] = {}
        self._lock = threading.Lock()

    def begin(self, full: str, file_bytes: int) -> str:
        answer = self._call("create_multipart_upload", full)
        return str(answer["UploadId"])

    def put_part(
        self, full: str, upload: str, number: int, view: memoryview, stop: threading.Event
    ) -> str:
        names = {"UploadId": upload, "PartNumber": number}
        if (transport := self._ready(full)) is None:
            return self._put_by_client(full, view, names)
        try:
            return transport.put(self._sign("upload_part", full, **names), view, stop)
        except RefusedError as refusal:
            etag = self._put_by_client(full, view, names)  # or the error that explains it
            self._turn_off(full, refusal)
            return etag

    def complete(self, full: str, upload: str, tokens: list[str]) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(tokens, 1)]
        self._call("complete_multipart_upload", full, UploadId=upload, MultipartUpload={"Parts": parts})

    def abort(self, full: str, upload: str) -> None:
        self._call("abort_multipart_upload", full, UploadId=upload)

    def unfinished(self, prefix: str) -> list[tuple[str, str]]:
        bucket, key, _ = self._fs.split_path(prefix)
        found: list[tuple[str, str]] = []
        more: dict[str, Any] = {}
        while True:
            page = call(
                self._fs,
                "call_s3",
                "list_multipart_uploads",
                Bucket=bucket,
                Prefix=f"{key}/" if key else "",
                **more,
            )
            found += [(f"{bucket}/{item['Key']}", item["UploadId"]) for item in page.get("Uploads", ())]
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def at_once(self, size: int) -> int:
        # Without the transport the client reads a part a little at a time, so that this holds for any size.
        return DIRECT_AT_ONCE

    @property
    def reads_at_once(self) -> int:
        return DIRECT_AT_ONCE if self._direct is not False else 4

    def fetch(self, full: str, offset: int, view: memoryview) -> bool:
        if (transport := self._ready(full)) is None:
            return False
        try:
            transport.get(self._address(full), offset, view)
        except RefusedError as refusal:
            data = call(self._fs, "cat_file", full, start=offset, end=offset + len(view))
            if len(data) != len(view):
                return False  # it is the object that is shorter than it was
            view[:] = data
            self._turn_off(full, refusal)
        return True

    def names(self, root: str) -> Names | None:
        bucket, key, _ = self._fs.split_path(root)
        prefix = f"{key}/" if key else ""
        files: dict[str, int] = {}
        directories: set[str] = set()
        more: dict[str, Any] = {}
        while True:
            page = call(
                self._fs,
                "call_s3",
                "list_objects_v2",
                Bucket=bucket,
                Prefix=prefix,
                Delimiter=SHARD,
                **more,
            )
            groups = [str(item["Prefix"]) for item in page.get("CommonPrefixes", ())]
            if not all(group.endswith(SHARD) for group in groups):
                return None  # a store that groups by "/" alone: this says nothing about the manifests
            directories |= {group[len(prefix) : -len(SHARD)] for group in groups}
            files |= {str(item["Key"])[len(prefix) :]: int(item["Size"]) for item in page.get("Contents", ())}
            if not page.get("IsTruncated"):
                return Names(files, frozenset(directories))
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _call(self, name: str, full: str, **arguments: Any) -> Any:
        bucket, key, _ = self._fs.split_path(full)
        return call(self._fs, "call_s3", name, Bucket=bucket, Key=key, **arguments)

    def _put_by_client(self, full: str, view: memoryview, names: dict[str, Any]) -> str:
        bucket, key, _ = self._fs.split_path(full)
        answer = call(
            self._fs,
            "call_s3",
            "upload_part",
            Bucket=bucket,
            Key=key,
            Body=ViewReader(view),
            moving_bytes=len(view),
            **names,
        )
        return str(answer["ETag"])

    def _sign(self, method: str, full: str, **names: Any) -> str:
        return str(call(self._fs, "url", full, expires=SIGNED_SECS, client_method=method, **names))

    def _address(self, full: str) -> str:
        """Where to read an object: the same for all its ranges, since signing takes a while (1 ms)."""
        address, until = self._addresses.get(full, ("", 0.0))
        now = time.monotonic()
        if now >= until:
            address = self._sign("get_object", full)
            if len(self._addresses) >= _MOST_ADDRESSES:
                self._addresses.clear()
            self._addresses[full] = address, now + _ADDRESS_SECS
        return address

    def _ready(self, full: str) -> Transport | None:
        """The transport, if it can serve this store."""
        with self._lock:
            if self._direct is None:
                self._direct = self._prepare(full)
            return self._transport if self._direct else None

    def _prepare(self, full: str) -> bool:
        fs = self._fs
        if fs.requester_pays or any(name.startswith("SSECustomer") for name in fs.s3_additional_kwargs):
            return False  # these travel in signed headers, which an address cannot carry
        if "proxies_config" in fs.config_kwargs:
            return False
        call(fs, "connect")
        # botocore still signs addresses of old regions the old way, which encrypted buckets refuse.
        fs.s3.meta.events.register_first("choose-signer.s3", _modern, unique_id="holdfast-signer")
        config = fs.s3.meta.config
        limits = Limits(float(config.read_timeout), float(config.connect_timeout))
        self._transport = Transport(pool_manager(fs, self._sign("get_object", full)), limits)
        return True

    def _turn_off(self, full: str, refusal: RefusedError) -> None:
        with self._lock:
            first, self._direct = self._direct, False
        if first:
            log.warning(
                "%s does not take signed addresses (%s): data goes through s3fs, which is slower",
                full.partition("/")[0],
                refusal,
            )


class ViewReader(io.RawIOBase):
    """A file over memory that is not copied, for clients that take only bytes or files."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._view)}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        piece = self._view[self._position : self._position + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)


def _modern(signature_version: object, **_: Any) -> str | None:
    """S3's own form of the present signature for addresses, where botocore would take that or the old one."""
    return "s3v4-query" if signature_version in ("v4-query", "s3v4-query") else None
