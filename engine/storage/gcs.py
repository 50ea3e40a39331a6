"""Google Cloud Storage: multipart uploads of its XML interface, through gcsfs's session and credentials."""

from __future__ import annotations

import threading
import xml.etree.ElementTree as ElementTree
from typing import Any
from urllib.parse import quote

from engine.storage.deadlines import call
from engine.storage.multipart import SHARD, Multipart, Names

_JSON_BASE = "/storage/v1/"
"""What gcsfs appends to the server's address; the XML interface appends nothing."""


class GcsMultipart(Multipart):
    """gcsfs sends part after part in a resumable upload; the XML interface takes them side by side."""

    def __init__(self, fs: Any) -> None:
        self._fs = fs

    def begin(self, full: str, file_bytes: int) -> str:
        _, answer = self._call("POST", full, uploads="")
        upload = _texts(answer, "UploadId")
        if not upload:
            raise OSError("the answer to the start of an upload names no upload")
        return upload[0]

    def put_part(
        self, full: str, upload: str, number: int, view: memoryview, stop: threading.Event
    ) -> str:
        names = {"partNumber": str(number), "uploadId": upload}
        headers, _ = self._call("PUT", full, data=bytes(view), moving_bytes=len(view), **names)
        return str(headers["ETag"])

    def complete(self, full: str, upload: str, tokens: list[str]) -> None:
        root = ElementTree.Element("CompleteMultipartUpload")
        for number, etag in enumerate(tokens, 1):
            part = ElementTree.SubElement(root, "Part")
            ElementTree.SubElement(part, "PartNumber").text = str(number)
            ElementTree.SubElement(part, "ETag").text = etag
        self._call("POST", full, data=ElementTree.tostring(root), uploadId=upload)

    def abort(self, full: str, upload: str) -> None:
        self._call("DELETE", full, uploadId=upload)

    def unfinished(self, prefix: str) -> list[tuple[str, str]]:
        bucket, key, _ = self._fs.split_path(prefix)
        found: list[tuple[str, str]] = []
        more: dict[str, str] = {}
        while True:
            _, answer = self._call("GET", bucket, uploads="", prefix=f"{key}/" if key else "", **more)
            keys, ids = _texts(answer, "Key"), _texts(answer, "UploadId")
            found += [(f"{bucket}/{name}", id) for name, id in zip(keys, ids, strict=True)]
            if _texts(answer, "IsTruncated") != ["true"]:
                return found
            more = {
                "key-marker": _texts(answer, "NextKeyMarker")[0],
                "upload-id-marker": _texts(answer, "NextUploadIdMarker")[0],
            }

    def names(self, root: str) -> Names | None:
        bucket, key, _ = self._fs.split_path(root)
        prefix = f"{key}/" if key else ""
        files: dict[str, int] = {}
        directories: set[str] = set()
        token: str | None = None
        while True:
            page = call(
                self._fs,
                "call",
                "GET",
                "b/{}/o",
                bucket,
                json_out=True,
                prefix=prefix,
                delimiter=SHARD,
                pageToken=token,
            )
            groups = page.get("prefixes", ())
            if not all(group.endswith(SHARD) for group in groups):
                return None
            directories |= {group[len(prefix) : -len(SHARD)] for group in groups}
            files |= {item["name"][len(prefix) :]: int(item["size"]) for item in page.get("items", ())}
            token = page.get("nextPageToken")
            if token is None:
                return Names(files, frozenset(directories))

    def _call(self, method: str, full: str, **arguments: Any) -> Any:
        bucket, key, _ = self._fs.split_path(full)
        address = f"{self._fs.base.removesuffix(_JSON_BASE)}/{bucket}" + (f"/{quote(key)}" if key else "")
        return call(self._fs, "call", method, address, **arguments)


def _texts(raw: bytes, tag: str) -> list[str]:
    """The texts of all elements of that name, whatever their namespace."""
    found = ElementTree.fromstring(raw).iter()
    return [element.text or "" for element in found if element.tag.rpartition("}")[2] == tag]
