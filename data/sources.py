"""Finds the source text: the standard library, a file, a folder, a glob or any fsspec URI.

Files are sorted by name, so that a source gives the same dataset on every machine.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from data.errors import SourceError

STDLIB = "stdlib"

# The user name and password of a URL, and its query, where signed URLs carry their key.
_USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")
_QUERY = re.compile(r"(?<=\w)\?[^\s'\"]*")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of text. `size` is in bytes as stored (compressed), 0 if the file system does not tell."""

    name: str
    path: str
    size: int
    filesystem: Any
    named: bool
    """The user named this file, not a folder or glob that contains it."""

    @property
    def where(self) -> str:
        """The path without secrets, for messages."""
        return redact(self.path)

    @property
    def is_jsonl(self) -> bool:
        return self.name.removesuffix(".gz").endswith((".jsonl", ".ndjson"))

    @contextmanager
    def open(self) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        """(decompressed stream, stored stream); the position of the second tells how much has been read."""
        with self.filesystem.open(self.path, "rb") as stored:
            if not self.name.endswith(".gz"):
                # fsspec's files read a whole block for each line.
                yield io.BufferedReader(stored, 1 << 20), stored
                return
            with gzip.GzipFile(fileobj=stored, mode="rb") as plain:
                yield plain, stored  # type: ignore[misc]  # typeshed does not call GzipFile an IO[bytes]


def find_files(source: str) -> list[SourceFile]:
    """The files of `source`, sorted by name. SourceError if there are none or the listing fails."""
    try:
        if source == STDLIB:
            files = _stdlib()
        elif is_uri(source):
            files = _remote(source)
        else:
            files = _local(os.path.expanduser(source))
    except Exception as error:
        # fsspec lets its libraries' own exceptions through, such as botocore's and aiohttp's.
        raise source_error(f"cannot list the source {source}", error) from error
    if not files:
        raise SourceError(
            f"no files found at the source {redact(source)}: --source takes '{STDLIB}', a file, a folder, a "
            "quoted glob such as 'books/*.txt', or a URI such as s3://bucket/folder"
        )
    return sorted(files, key=lambda file: file.name)


def is_uri(source: str) -> bool:
    return "://" in source or "::" in source


def redact(text: str) -> str:
    """`text` without the passwords and signatures in its URIs."""
    return _QUERY.sub("", _USER_INFO.sub("", text)) if is_uri(text) else text


def source_error(what: str, error: Exception) -> SourceError:
    """A one-line SourceError that says what failed and why, without secrets."""
    if isinstance(error, SourceError):
        return error
    cause = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return SourceError(redact(f"{what}: {' '.join(cause.split())}"))


def _local(path: str) -> list[SourceFile]:
    filesystem = fsspec.filesystem("file")
    if os.path.isfile(path):
        return [SourceFile(os.path.basename(path), path, os.path.getsize(path), filesystem, named=True)]
    if os.path.isdir(path):
        return _local_folder(path)
    if not _has_magic(path):
        return []
    found = (str(match) for match in filesystem.glob(path))
    return [_in_folder(p, p, os.path.getsize(p), filesystem) for p in found if os.path.isfile(p)]


def _stdlib() -> list[SourceFile]:
    """The `.py` files of the running Python's standard library, without installed packages."""
    files = _local_folder(sysconfig.get_path("stdlib"), without=("site-packages", "dist-packages"))
    return [file for file in files if file.name.endswith(".py")]


def _local_folder(root: str, without: Sequence[str] = ()) -> list[SourceFile]:
    """All files below `root`, except hidden ones, caches and folders named in `without`."""
    filesystem = fsspec.filesystem("file")
    found = []
    # os.walk, because fsspec's find loops on circular links between folders.
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not _is_skipped(name) and name not in without]
        for name in names:
            path = os.path.join(folder, name)
            if not _is_skipped(name) and os.path.isfile(path):
                relative = os.path.relpath(path, root)
                found.append(_in_folder(relative, path, os.path.getsize(path), filesystem))
    return found


def _remote(uri: str) -> list[SourceFile]:
    filesystem, path = url_to_fs(uri)
    if filesystem.isfile(path):
        name = os.path.basename(path.split("?")[0])
        return [SourceFile(name, path, int(filesystem.size(path) or 0), filesystem, named=True)]
    if filesystem.isdir(path):
        root = path.rstrip("/") + "/"
        found = {name.removeprefix(root): info for name, info in filesystem.find(path, detail=True).items()}
        found = {name: info for name, info in found.items() if not any(map(_is_skipped, name.split("/")))}
    elif _has_magic(path):
        root, found = "", filesystem.glob(path, detail=True)
    else:
        return []
    return [
        _in_folder(name, root + name, int(info.get("size") or 0), filesystem)
        for name, info in found.items()
        if info.get("type") == "file"
    ]


def _in_folder(name: str, path: str, size: int, filesystem: Any) -> SourceFile:
    return SourceFile(name.replace(os.sep, "/"), path, size, filesystem, named=False)


def _has_magic(path: str) -> bool:
    return any(character in path for character in "*?[")


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _raise(error: OSError) -> None:
    raise error
