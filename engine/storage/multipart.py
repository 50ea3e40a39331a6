"""One kind of store's interface beyond fsspec: multipart uploads, reads in place, listings without shards."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from engine.storage.base import WINDOW_BYTES

MAX_PARTS = 9_000
"""Parts of one object; S3 and Google allow 10,000 of 5 MiB to 5 GiB, Azure 50,000 of at most 4000 MiB."""

COPIES_BYTES = 32 << 20
"""Memory that the parts in flight may take where a client wants copies of them."""

DIRECT_AT_ONCE = 8
"""Parts in flight where none is copied: a single connection to a real store carries 50 to 100 MB/s."""


SHARD = "/shard-"
"""Listing with this delimiter, all shard files of a directory become one entry."""


def part_bytes(file_bytes: int) -> int:
    """Size of the parts of an upload: a window, or as many windows as keep the parts below the limit."""
    per_part = -(-file_bytes // MAX_PARTS)
    return max(1, -(-per_part // WINDOW_BYTES)) * WINDOW_BYTES


@dataclass(frozen=True, slots=True)
class Names:
    """A listing that left the shard files out.

    files: name relative to the root -> bytes. directories: those that hold shard files.
    """

    files: dict[str, int] = field(default_factory=dict)
    directories: frozenset[str] = frozenset()


class Multipart(ABC):
    """One kind of store. Paths are the file system's full ones. Raises whatever the client raises.

    Parts of an upload are put in any order and by several threads; putting one again replaces it. Nothing
    is visible before `complete`.
    """

    @abstractmethod
    def begin(self, full: str, file_bytes: int) -> str:
        """Start an upload; returns its id."""

    @abstractmethod
    def put_part(
        self, full: str, upload: str, number: int, view: memoryview, stop: threading.Event
    ) -> str:
        """Store part `number`, counted from 1; returns what `complete` needs for it.

        May stop with any error once `stop` is set.
        """

    @abstractmethod
    def complete(self, full: str, upload: str, tokens: list[str]) -> None:
        """Make the object of these parts, in order, appear."""

    @abstractmethod
    def abort(self, full: str, upload: str) -> None:
        """Abort an upload and delete all its parts."""

    def unfinished(self, prefix: str) -> list[tuple[str, str]]:
        """(full path, id) of uploads below a prefix that were neither completed nor aborted.

        Empty for a store that removes such uploads by itself.
        """
        return []

    def at_once(self, size: int) -> int:
        """How many parts of `size` bytes may be in flight."""
        return max(1, COPIES_BYTES // size)

    @property
    def reads_at_once(self) -> int:
        """How many ranged reads may be in flight."""
        return 4

    def fetch(self, full: str, offset: int, view: memoryview) -> bool:
        """Fill `view` from byte `offset` of an object; False if only fsspec can read it."""
        return False

    def names(self, root: str) -> Names | None:
        """Everything below the root except shard files, in few requests; None if the store cannot do this."""
        return None
