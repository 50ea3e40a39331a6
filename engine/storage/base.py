"""The storage interface that the rest of the engine uses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from engine.native.kernels import Place
from engine.storage.source import Source

WINDOW_BYTES = 16 << 20
"""Bytes per write of a shard; a multiple of every block and page size in use."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory; `bytes` is None for directories."""

    name: str
    bytes: int | None
    is_dir: bool


@dataclass(frozen=True, slots=True)
class Heads:
    """The small files of every top-level directory, which tell what the directory is.

    tree: as from `list_tree`; a directory without small files is in it, empty.
    whole: whether it includes shard files; if not, nothing is known about them.
    """

    tree: dict[str, dict[str, int]]
    whole: bool


@dataclass(frozen=True, slots=True)
class Cleared:
    """The result of clearing a directory: entries deleted, names left, whether the directory is gone."""

    removed: int
    left: tuple[str, ...]
    gone: bool


@dataclass(frozen=True, slots=True)
class WriteStats:
    """How a shard was written. Seconds are wall-clock; waiting for the source is part of writing."""

    bytes: int
    write_secs: float
    fsync_secs: float
    method: Literal["direct", "buffered", "upload"]


class Reader(ABC):
    """An open file. Several threads may read at once, but none may read while it is closed."""

    @property
    @abstractmethod
    def file_bytes(self) -> int:
        """Size of the file in bytes."""

    @abstractmethod
    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` (writable, contiguous bytes) from byte `offset`.

        DamagedError if the file ends early; StorageError if it cannot be read.
        """

    def read_cached(self, offset: int, places: Sequence[Place], block_bytes: int) -> tuple[int, bytes]:
        """Fill the `places` one after the other, from byte `offset`, with bytes that are cached.

        Returns the number of bytes filled (0 if nothing is cached or that is unknown), and the packed digests
        of their blocks, counted from `offset`. The rest of the places is undefined. StorageError if the file
        cannot be read.
        """
        return 0, b""

    def close(self) -> None:  # noqa: B027 - a store's reader has nothing to close
        """Close the file. May be called twice."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Storage(ABC):
    """A directory, or a prefix in an object store, that holds checkpoints.

    Paths are relative to it and "/"-separated; `format.names.safe_relative` refuses those that would leave
    it. As a directory, "" is the storage itself. All methods may be called from any thread, and raise a
    StorageError: NotFoundError, AlreadyExistsError, StorageFullError, StorageDeniedError,
    StorageUnavailableError (worth a retry), or plain.
    """

    uri: str
    """Printable address, without secrets."""

    is_local: bool
    """Whether it is a directory of this machine's file systems (network mounts included)."""

    durability: str
    """One sentence: what a completed write survives."""

    @property
    @abstractmethod
    def supports_exclusive_create(self) -> bool:
        """Whether `publish(exclusive=True)` has exactly one winner among racing callers.

        Object stores are probed once, with an object; raises the probe's error if it was inconclusive.
        """

    @abstractmethod
    def list_dir(self, path: str = "") -> list[Entry]:
        """A directory's entries, by name. NotFoundError if it is missing; an outage is never an empty list.

        An object store has no empty directories: there, only the storage itself lists as empty.
        """

    @abstractmethod
    def list_tree(self) -> dict[str, dict[str, int]]:
        """Sizes in bytes of all files of all top-level directories: {directory: {file: bytes}}.

        Files at the top are under "". One level deep, one pass. NotFoundError as `list_dir("")`.
        """

    def list_heads(self) -> Heads:
        """Like `list_tree`, but may omit shard files if that saves requests.

        A store lists names in pages, and almost all names are those of shards.
        """
        return Heads(self.list_tree(), whole=True)

    def unfinished_uploads(self) -> list[str]:
        """Paths of uploads that were started but neither finished nor aborted. They cost money, and listings
        do not show them.

        Empty if the storage has no such uploads or cannot list them.
        """
        return []

    def abort_uploads(self, path: str) -> None:  # noqa: B027 - a local directory has none
        """Abort all unfinished uploads below a directory. `delete_tree` does this, too."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Size of a file in bytes. NotFoundError if there is none, also if a directory has that name."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether a file or directory has that name. False only on a definite no; any doubt raises."""

    @abstractmethod
    def read_bytes(self, path: str, *, max_bytes: int) -> bytes:
        """A whole small file. DamagedError if it is larger than `max_bytes`; no more is read."""

    @abstractmethod
    def open_reader(self, path: str) -> Reader:
        """Open a file for reading ranges. A local file stays readable if it is deleted meanwhile."""

    def read_into(self, path: str, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` of a file; exact, or DamagedError. For one range of one file."""
        with self.open_reader(path) as reader:
            reader.read_into(offset, view)

    @abstractmethod
    def write_file(self, path: str, data: bytes) -> None:
        """Write a small file that no reader waits for. Complete and on disk when it returns.

        Its directory entry is durable after `sync_dir`. An older file of that name is replaced.
        """

    @abstractmethod
    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        """Write a small file atomically and durably: readers see all of it or nothing.

        With `exclusive`, AlreadyExistsError if the name is taken; see `supports_exclusive_create`. After
        another StorageError the file may still have appeared.
        """

    @abstractmethod
    def write_shard(self, path: str, source: Source) -> WriteStats:
        """Write a source as a new file; on disk when it returns.

        Windows on page boundaries, with padding up to the next one after the last, are written with direct
        I/O; others go through the page cache. A window is released once it is written, in a store once it is
        acknowledged. AlreadyExistsError if the name is taken. After any error, also one of the source,
        nothing is left under the name.
        """

    @abstractmethod
    def make_dir(self, path: str = "") -> None:
        """Create a directory with its parents, durably. Existing ones are fine."""

    @abstractmethod
    def sync_dir(self, path: str = "") -> None:
        """Make the directory's entries durable. Stores need nothing."""

    @abstractmethod
    def rename(self, src: str, dst: str) -> bool:
        """Rename a directory durably and return True; return False, unchanged, if the storage cannot rename.

        AlreadyExistsError if `dst` is taken.
        """

    @abstractmethod
    def delete_file(self, path: str) -> None:
        """Delete a file; a missing one is fine."""

    @abstractmethod
    def delete_tree(self, path: str) -> None:
        """Delete a directory with its contents; a missing one is fine. Links are not followed."""

    @abstractmethod
    def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
        """Delete a directory's regular files whose names are `ours`, empty directories in it, then itself.

        Everything else stays, and so does the directory then: links, mounts, files in subdirectories. A
        missing directory is fine. NotOursError, with nothing changed, for a link or a mount.
        """

    def link_target(self, path: str) -> str | None:
        """The target of a symbolic link: a name in this directory or an absolute path; None for no link."""
        return None

    def why_not_ours(self, path: str) -> str:
        """Why a directory must not be changed (it "is a symbolic link: ..."); "" if it may be."""
        return ""

    def versions(self, path: str) -> dict[str, str]:
        """File -> a text of sizes, times or tags that changes whenever the file may have changed.

        Opaque, and comparable only on the same storage. NotFoundError if there is no such directory.
        """
        return {entry.name: str(entry.bytes) for entry in self.list_dir(path) if not entry.is_dir}

    def last_change(self, path: str) -> float | None:
        """When a file, or anything in a directory, last changed: seconds on the storage's own clock.

        Compare it only with other times of the same storage, never with this machine's clock. None if the
        storage cannot tell. NotFoundError if there is no such file.
        """
        return None

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that an ordinary user can still write, or None if unknown."""

    def describe(self, path: str) -> str:
        """Printable address of a path, without secrets."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"
