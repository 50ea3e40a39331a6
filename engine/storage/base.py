"""The interface that the rest of the engine sees of a storage, whatever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from engine.native.kernels import Place
from engine.storage.source import Source

WINDOW_BYTES = 16 << 20
"""Bytes of a shard that are written at a time; a multiple of every block and page size in use."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a directory; `bytes` is None for directories."""

    name: str
    bytes: int | None
    is_dir: bool


@dataclass(frozen=True, slots=True)
class Heads:
    """The small files of every top-level directory, which tell what the directory is.

    tree: as of `list_tree`; a directory that holds nothing else is there, empty.
    whole: whether shard files are in it as well; where not, nothing is known about them.
    """

    tree: dict[str, dict[str, int]]
    whole: bool


@dataclass(frozen=True, slots=True)
class Cleared:
    """What clearing a directory did: how many entries went, names of what stays, whether it went itself."""

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
    """An open file. Reads from several threads at once are fine; closing while one reads is not."""

    @property
    @abstractmethod
    def file_bytes(self) -> int:
        """Size of the file in bytes."""

    @abstractmethod
    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` (writable, contiguous bytes) from byte `offset`.

        DamagedError if the file ends before; StorageError if it cannot be read.
        """

    def read_at_hand(self, offset: int, places: Sequence[Place], block_bytes: int) -> tuple[int, bytes]:
        """Fill the `places`, all of them somewhere, one after the other from byte `offset` with what needs no
        waiting.

        Returns the number of bytes filled, 0 where nothing is at hand or where there is no telling, and the
        packed digests of the blocks that they make up, counted from `offset`. What lies behind them in the
        places is undefined. StorageError if the file cannot be read.
        """
        return 0, b""

    def close(self) -> None:  # noqa: B027 - a store's reader has nothing to let go of
        """Let go of the file. May be called twice."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Storage(ABC):
    """A directory, or a prefix in an object store, that holds checkpoints.

    Paths are relative to it, "/"-separated, and refused by `format.names.safe_relative` if they would
    leave it. "" is the storage itself where a directory is asked for. All methods may be called from any
    thread, and raise a StorageError: NotFoundError, AlreadyExistsError, StorageFullError,
    StorageDeniedError, StorageUnavailableError (worth trying again), or plain.
    """

    uri: str
    """Printable address, without secrets."""

    is_local: bool
    """Whether it is a directory of this machine's file systems (network mounts included)."""

    durability: str
    """One sentence: what a write that returned survives."""

    @property
    @abstractmethod
    def supports_exclusive_create(self) -> bool:
        """Whether `publish(exclusive=True)` has one winner among any number of racing callers.

        Object stores are asked once, with a probe object; raises what the probe met, if it was not an answer.
        """

    @abstractmethod
    def list_dir(self, path: str = "") -> list[Entry]:
        """What is in a directory, by name. NotFoundError if there is none; an outage is never an empty list.

        An object store has no empty directories: there, only the storage itself lists as empty.
        """

    @abstractmethod
    def list_tree(self) -> dict[str, dict[str, int]]:
        """Sizes in bytes of all files of all top-level directories: {directory: {file: bytes}}.

        Files at the top are under "". One level deep, one pass. NotFoundError as `list_dir("")`.
        """

    def list_heads(self) -> Heads:
        """As `list_tree`, but shard files may be left out where that saves requests.

        A store hands out names a page at a time, and almost all of them are those of shards.
        """
        return Heads(self.list_tree(), whole=True)

    def unfinished_uploads(self) -> list[str]:
        """Paths of uploads that were begun and neither finished nor aborted. They cost money, and no listing
        shows them.

        Empty where there is no such thing, and where the store does not tell.
        """
        return []

    def abort_uploads(self, path: str) -> None:  # noqa: B027 - a local directory has none
        """Throw away all unfinished uploads below a directory. `delete_tree` does this, too."""

    @abstractmethod
    def size(self, path: str) -> int:
        """Size of a file in bytes. NotFoundError if there is none, also if a directory has that name."""

    @abstractmethod
    def exists(self, path: str) -> bool:
        """Whether a file or directory has that name. False only on a definite no; anything else raises."""

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
        """Write a small file that nobody waits for by name. Whole and on disk when it returns.

        Its directory entry is durable after `sync_dir`. An older file of that name is replaced.
        """

    @abstractmethod
    def publish(self, path: str, data: bytes, *, exclusive: bool) -> None:
        """Make a small file appear at once, whole and durable: other readers see all of it or nothing.

        With `exclusive`, AlreadyExistsError if the name is taken; see `supports_exclusive_create`. After
        another StorageError it may have appeared nevertheless.
        """

    @abstractmethod
    def write_shard(self, path: str, source: Source) -> WriteStats:
        """Write a source as a new file; on disk when it returns.

        For direct I/O its windows lie on page boundaries, and memory up to the next one follows the last.
        Anything else is written through the page cache. A window is released once it was written, in a store
        once it was acknowledged. AlreadyExistsError if the name is taken. After any error, the source's own
        included, nothing is left under the name.
        """

    @abstractmethod
    def make_dir(self, path: str = "") -> None:
        """Create a directory with its parents, durably. Existing ones are fine."""

    @abstractmethod
    def sync_dir(self, path: str = "") -> None:
        """Make the directory's entries durable. Stores need nothing."""

    @abstractmethod
    def rename(self, src: str, dst: str) -> bool:
        """Rename a directory, durably, and return True; False where the storage cannot, and nothing changed.

        AlreadyExistsError if `dst` is taken.
        """

    @abstractmethod
    def delete_file(self, path: str) -> None:
        """Delete a file; a missing one is fine."""

    @abstractmethod
    def delete_tree(self, path: str) -> None:
        """Delete a directory with all that is in it; a missing one is fine. Links are not followed."""

    @abstractmethod
    def clear_dir(self, path: str, ours: Callable[[str], bool]) -> Cleared:
        """Delete a directory's regular files whose names are `ours`, empty directories in it, then itself.

        Everything else stays, and the directory with it: links, mounts, what lies in further directories. A
        missing directory is fine. NotOursError, with nothing changed, for a link or a mount.
        """

    def link_target(self, path: str) -> str | None:
        """Where a symbolic link leads: a name in this directory, or an absolute path. None if it is none."""
        return None

    def why_not_ours(self, path: str) -> str:
        """Why a directory must not be changed (it "is a symbolic link: ..."); "" where it may be."""
        return ""

    def versions(self, path: str) -> dict[str, str]:
        """By file of a directory, a text of sizes, times or tags that changes whenever the file may have.

        Opaque, and comparable on the same storage only. NotFoundError if there is no such directory.
        """
        return {entry.name: str(entry.bytes) for entry in self.list_dir(path) if not entry.is_dir}

    def last_change(self, path: str) -> float | None:
        """When a file, or anything in a directory, last changed: seconds on the storage's own clock.

        For comparisons with other times of the same storage, never with this machine's clock. None where the
        storage cannot tell. NotFoundError if there is nothing of that name.
        """
        return None

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Bytes that an ordinary user can still write, or None where there is no such number."""

    def describe(self, path: str) -> str:
        """Printable address of a path, without secrets."""
        return f"{self.uri.rstrip('/')}/{path}" if path else self.uri

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r})"
