"""List the objects below a prefix of a store, detect changes, and delete them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from engine.errors import NotFoundError, StorageError
from engine.storage.base import Cleared, Entry
from engine.storage.client import StoreClient
from engine.storage.remote_failures import NoBucketError

_TAGS = ("ETag", "etag", "generation", "LastModified", "last_modified", "created", "mtime")
"""Fields of a store's listing that change when an object is written again."""


def entries(client: StoreClient, path: str) -> list[Entry]:
    """The names directly below a path. NotFoundError if there are none, but for a prefix never written to."""
    full = client.full(path)
    try:
        found = client.do("list", path, lambda: client.listing("ls", full))
    except NoBucketError:
        raise
    except NotFoundError:
        if path or not client.is_object_store:
            raise
        return []  # nothing was stored under this prefix yet
    known = (_entry(info, full) for info in found)
    return sorted((entry for entry in known if entry is not None), key=lambda entry: entry.name)


def files(client: StoreClient, path: str) -> list[tuple[str, int]]:
    """(name relative to `path`, bytes) of every file below it; empty if there is none."""
    if not client.is_object_store:
        return _files_by_walking(client, path)
    full = client.full(path)
    # Not for other file systems: fsspec's general find() skips what it fails to list.
    try:
        found = client.do("list", path, lambda: client.listing("find", full))
    except NoBucketError:
        raise
    except NotFoundError:
        return []
    prefix = full + "/"
    return [
        (name[len(prefix) :], int(info["size"]))
        for name, info in found.items()
        if name.startswith(prefix) and not name.endswith("/")
    ]


def versions(client: StoreClient, path: str) -> dict[str, str]:
    """For each file of a directory, its size and the store's fields that change with each write."""
    full = client.full(path)
    found = client.do("list", path, lambda: client.listing("ls", full))
    return {_last(info): _version(info) for info in found if info.get("type") == "file"}


def remove(client: StoreClient, names: Iterable[str]) -> None:
    """Delete objects by their full names. Some may be left: `require_gone` checks."""
    plain = []
    for name in names:
        if any(character in name for character in "*?["):  # rm() would take these for patterns
            client.call("rm_file", name)
        else:
            plain.append(name)
    with contextlib.suppress(FileNotFoundError):  # an earlier try, or another process, has deleted it
        if plain:
            client.call("rm", plain)


def require_gone(client: StoreClient, path: str, names: Collection[str] | None = None) -> None:
    """StorageError if any of `names` is left; None: if anything is. A bulk delete never answers for each."""
    left = [name for name, _ in files(client, path) if names is None or name in names]
    if left:
        raise StorageError(
            f"could not delete {client.describe(path)}: {len(left)} objects are left, such as {left[0]!r}:"
            " check that the credentials allow deleting"
        )


def clear(client: StoreClient, path: str, ours: Callable[[str], bool]) -> Cleared:
    """See `Storage.clear_dir`. The caller aborts unfinished uploads."""
    full = client.full(path)
    if client.is_object_store:
        found = [name for name, _ in files(client, path)]
    else:
        try:
            listed = client.do("list", path, lambda: client.listing("ls", full))
        except NotFoundError:
            return Cleared(0, (), gone=True)
        # The slash keeps links and directories from being taken for files of that name.
        found = sorted(_last(info) + "/" * (info.get("type") != "file") for info in listed)
    mine = [name for name in found if "/" not in name and ours(name)]
    left = tuple(sorted(set(found) - set(mine)))
    if mine:
        client.do("delete", path, lambda: remove(client, [f"{full}/{name}" for name in mine]))
    if client.is_object_store:
        require_gone(client, path, mine)
    elif not left:
        with contextlib.suppress(NotFoundError):
            client.do("delete", path, lambda: client.fs.rmdir(full))
    return Cleared(len(mine), left, gone=not left)


def _files_by_walking(client: StoreClient, path: str) -> list[tuple[str, int]]:
    """The same, two levels deep, by listing directory after directory."""
    found: list[tuple[str, int]] = []
    for entry in entries(client, path):
        if not entry.is_dir:
            found.append((entry.name, entry.bytes or 0))
            continue
        with contextlib.suppress(NotFoundError):  # removed meanwhile
            inner = entries(client, f"{path}/{entry.name}" if path else entry.name)
            found += [(f"{entry.name}/{item.name}", item.bytes or 0) for item in inner if not item.is_dir]
    return found


def _last(info: Mapping[str, Any]) -> str:
    return str(info["name"]).rstrip("/").rpartition("/")[2]


def _version(info: Mapping[str, Any]) -> str:
    return "-".join([str(info.get("size")), *(str(info[tag]) for tag in _TAGS if info.get(tag) is not None)])


def _entry(info: Mapping[str, Any], parent: str) -> Entry | None:
    """The entry of a listing below `parent`; None for the parent's own placeholder."""
    full = str(info["name"]).rstrip("/")
    name = full[len(parent) :].lstrip("/") if full.startswith(parent + "/") else ""
    if not name or "/" in name:
        return None
    if info.get("type") == "directory":
        return Entry(name, None, is_dir=True)
    return Entry(name, int(info["size"]), is_dir=False)
