"""What is compared: one way each of moving a shard between a buffer and an S3 store.

Every row runs in a process of its own, where nothing else has taken memory before.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from engine.storage.source import BufferSource

Move = Callable[[str, memoryview], object]
"""Moves a whole shard between the object of that name and the buffer; what it returns is dropped."""


@dataclass(frozen=True, slots=True)
class Row:
    """`make(uri, options)` returns the move. `in_place`: a download that ends in the buffer."""

    name: str
    verb: str
    make: Callable[[str, dict[str, str]], Move]
    peer: str = ""
    """Whose way it is; empty for Holdfast's own."""


def holdfast_upload(uri: str, options: dict[str, str], *, direct: bool = True) -> Move:
    """`Storage.write_shard`, by which a rank's arena is saved."""
    storage = _storage(uri, options, direct)

    def move(name: str, buffer: memoryview) -> None:
        storage.delete_file(name)
        storage.write_shard(name, BufferSource(buffer))

    return move


def holdfast_download(uri: str, options: dict[str, str], *, direct: bool = True) -> Move:
    """`Reader.read_into`, by which a restore reads."""
    storage = _storage(uri, options, direct)

    def move(name: str, buffer: memoryview) -> None:
        with storage.open_reader(name) as reader:
            reader.read_into(0, buffer)

    return move


def obstore_upload(uri: str, options: dict[str, str], *, part_bytes: int, at_once: int) -> Move:
    """obstore's multipart put, straight from the buffer."""
    import obstore

    store = _obstore(uri, options)

    def move(name: str, buffer: memoryview) -> None:
        obstore.put(store, name, buffer, use_multipart=True, chunk_size=part_bytes, max_concurrency=at_once)

    return move


def obstore_ranges(uri: str, options: dict[str, str], *, part_bytes: int, at_once: int) -> Move:
    """obstore's ranged get, in threads, copied into the buffer as a restore needs it."""
    import obstore

    store = _obstore(uri, options)
    pool = ThreadPoolExecutor(at_once)

    def move(name: str, buffer: memoryview) -> None:
        def read(begin: int) -> None:
            end = min(begin + part_bytes, len(buffer))
            buffer[begin:end] = memoryview(obstore.get_range(store, name, start=begin, end=end))

        list(pool.map(read, range(0, len(buffer), part_bytes)))

    return move


def obstore_get(uri: str, options: dict[str, str]) -> Move:
    """obstore's plain get: one request, memory of its own."""
    import obstore

    store = _obstore(uri, options)
    return lambda name, buffer: obstore.get(store, name).bytes()


def s3fs_pipe(uri: str, options: dict[str, str]) -> Move:
    """s3fs's pipe_file, which takes bytes: the copy that it needs is part of the price."""
    fs, root = _s3fs(uri, options)
    return lambda name, buffer: fs.pipe_file(f"{root}/{name}", bytes(buffer))


def s3fs_cat(uri: str, options: dict[str, str]) -> Move:
    """s3fs's cat_file: memory of its own."""
    fs, root = _s3fs(uri, options)
    return lambda name, buffer: fs.cat_file(f"{root}/{name}")


def s3fs_ranges(uri: str, options: dict[str, str]) -> Move:
    """s3fs's cat_ranges, 8 MiB each."""
    fs, root = _s3fs(uri, options)

    def move(name: str, buffer: memoryview) -> object:
        starts = list(range(0, len(buffer), 8 << 20))
        ends = [min(start + (8 << 20), len(buffer)) for start in starts]
        return fs.cat_ranges([f"{root}/{name}"] * len(starts), starts, ends, on_error="raise")

    return move


ROWS = (
    Row("Holdfast upload", "upload", holdfast_upload),
    Row(
        "Holdfast upload, all by s3fs",
        "upload",
        lambda uri, options: holdfast_upload(uri, options, direct=False),
        "s3fs",
    ),
    Row(
        "obstore multipart put, 64 MiB x 4",
        "upload",
        lambda uri, options: obstore_upload(uri, options, part_bytes=64 << 20, at_once=4),
        "obstore",
    ),
    Row(
        "obstore multipart put, 16 MiB x 8",
        "upload",
        lambda uri, options: obstore_upload(uri, options, part_bytes=16 << 20, at_once=8),
        "obstore",
    ),
    Row("s3fs pipe_file", "upload", s3fs_pipe, "s3fs"),
    Row("Holdfast download", "download", holdfast_download),
    Row(
        "Holdfast download, all by s3fs",
        "download",
        lambda uri, options: holdfast_download(uri, options, direct=False),
        "s3fs",
    ),
    Row(
        "obstore ranged get, 8 MiB x 8",
        "download",
        lambda uri, options: obstore_ranges(uri, options, part_bytes=8 << 20, at_once=8),
        "obstore",
    ),
    Row(
        "obstore ranged get, 64 MiB x 4",
        "download",
        lambda uri, options: obstore_ranges(uri, options, part_bytes=64 << 20, at_once=4),
        "obstore",
    ),
    Row("obstore get", "download", obstore_get, "obstore"),
    Row("s3fs cat_file", "download", s3fs_cat, "s3fs"),
    Row("s3fs cat_ranges, 8 MiB", "download", s3fs_ranges, "s3fs"),
)


def _storage(uri: str, options: dict[str, str], direct: bool) -> Any:
    from engine.storage.remote import FsspecStorage

    storage = FsspecStorage(uri, options)
    if not direct:
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
    # 30 s, its own limit for a request, is less than a part of 64 MiB may take on a busy machine.
    client = {"allow_http": True, "timeout": "300s"}
    return S3Store(bucket, prefix=prefix, config=given, client_options=client)
