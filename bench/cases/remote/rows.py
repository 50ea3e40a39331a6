"""What is compared: ways to move a shard between a buffer and an S3 store.

Every row runs in a process of its own, where nothing else has taken memory before.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.storage.source import BufferSource

Move = Callable[[str, memoryview], object]
"""Moves a whole shard between the object of that name and the buffer; the result is dropped."""

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Row:
    """`make(uri, options)` returns the move. `peer`: whose way it is; empty for Holdfast's own."""

    name: str
    verb: str
    make: Callable[[str, dict[str, str]], Move]
    peer: str = ""


def holdfast_upload(uri: str, options: dict[str, str], *, signed: bool = True) -> Move:
    """`Storage.write_shard`, which saves a rank's staging buffer."""
    storage = _storage(uri, options, signed)

    def move(name: str, buffer: memoryview) -> None:
        storage.delete_file(name)
        storage.write_shard(name, BufferSource(buffer))

    return move


def holdfast_download(uri: str, options: dict[str, str], *, signed: bool = True) -> Move:
    """`Reader.read_into`, which a restore reads with."""
    storage = _storage(uri, options, signed)

    def move(name: str, buffer: memoryview) -> None:
        with storage.open_reader(name) as reader:
            reader.read_into(0, buffer)

    return move


def obstore_put(uri: str, options: dict[str, str], *, part_mib: int, at_once: int) -> Move:
    """obstore's multipart put, straight from the buffer."""
    import obstore

    put = partial(obstore.put, use_multipart=True, chunk_size=part_mib * _MIB, max_concurrency=at_once)
    store = _obstore(uri, options)
    return lambda name, buffer: put(store, name, buffer)


def obstore_ranges(uri: str, options: dict[str, str], *, part_mib: int, at_once: int) -> Move:
    """obstore's ranged get in threads, copied into the buffer as a restore needs it."""
    import obstore

    store = _obstore(uri, options)
    pool = ThreadPoolExecutor(at_once)

    def move(name: str, buffer: memoryview) -> None:
        def read(begin: int) -> None:
            end = min(begin + part_mib * _MIB, len(buffer))
            buffer[begin:end] = memoryview(obstore.get_range(store, name, start=begin, end=end))

        list(pool.map(read, range(0, len(buffer), part_mib * _MIB)))

    return move


def obstore_get(uri: str, options: dict[str, str]) -> Move:
    """obstore's plain get: one request, into memory of its own."""
    import obstore

    store = _obstore(uri, options)
    return lambda name, buffer: obstore.get(store, name).bytes()


def s3fs_pipe(uri: str, options: dict[str, str]) -> Move:
    """s3fs's pipe_file. It takes bytes: the copy that it needs is part of its price."""
    fs, root = _s3fs(uri, options)
    return lambda name, buffer: fs.pipe_file(f"{root}/{name}", bytes(buffer))


def s3fs_cat(uri: str, options: dict[str, str]) -> Move:
    """s3fs's cat_file, into memory of its own."""
    fs, root = _s3fs(uri, options)
    return lambda name, buffer: fs.cat_file(f"{root}/{name}")


def s3fs_ranges(uri: str, options: dict[str, str]) -> Move:
    """s3fs's cat_ranges, 8 MiB each."""
    fs, root = _s3fs(uri, options)

    def move(name: str, buffer: memoryview) -> object:
        starts = list(range(0, len(buffer), 8 * _MIB))
        ends = [min(start + 8 * _MIB, len(buffer)) for start in starts]
        return fs.cat_ranges([f"{root}/{name}"] * len(starts), starts, ends, on_error="raise")

    return move


def _rows(verb: str, ways: dict[str, tuple[str, Callable[..., Move]]]) -> list[Row]:
    return [Row(name, verb, make, peer) for name, (peer, make) in ways.items()]


ROWS = (
    *_rows(
        "upload",
        {
            "Holdfast upload": ("", holdfast_upload),
            "Holdfast upload, all by s3fs": ("s3fs", partial(holdfast_upload, signed=False)),
            "obstore multipart put, 64 MiB x 4": ("obstore", partial(obstore_put, part_mib=64, at_once=4)),
            "obstore multipart put, 16 MiB x 8": ("obstore", partial(obstore_put, part_mib=16, at_once=8)),
            "s3fs pipe_file": ("s3fs", s3fs_pipe),
        },
    ),
    *_rows(
        "download",
        {
            "Holdfast download": ("", holdfast_download),
            "Holdfast download, all by s3fs": ("s3fs", partial(holdfast_download, signed=False)),
            "obstore ranged get, 8 MiB x 8": ("obstore", partial(obstore_ranges, part_mib=8, at_once=8)),
            "obstore ranged get, 64 MiB x 4": ("obstore", partial(obstore_ranges, part_mib=64, at_once=4)),
            "obstore get": ("obstore", obstore_get),
            "s3fs cat_file": ("s3fs", s3fs_cat),
            "s3fs cat_ranges, 8 MiB": ("s3fs", s3fs_ranges),
        },
    ),
)


def _storage(uri: str, options: dict[str, str], signed: bool) -> Any:
    from engine.storage.remote import FsspecStorage

    storage = FsspecStorage(uri, options)
    if not signed:
        # What remains of the S3 route where a store refuses signed addresses.
        storage._client.multipart._direct = False  # type: ignore[union-attr]
    return storage


def _s3fs(uri: str, options: dict[str, str]) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    from engine.storage.options import client_options

    # The same connection settings as Holdfast's, and a file system of its own.
    fs, root = url_to_fs(uri, **client_options("s3", options), skip_instance_cache=True)
    return fs, str(root)


def _obstore(uri: str, options: dict[str, str]) -> Any:
    from obstore.store import S3Store

    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    names = {
        "key": "access_key_id",
        "secret": "secret_access_key",
        "token": "session_token",
        "endpoint_url": "endpoint",
        "client_kwargs.region_name": "region",
    }
    given = {names[name]: value for name, value in options.items() if name in names}
    # Its own limit for a request is 30 s; on a busy machine a part of 64 MiB can take longer.
    client = {"allow_http": True, "timeout": "300s"}
    return S3Store(bucket, prefix=prefix, config=given, client_options=client)
