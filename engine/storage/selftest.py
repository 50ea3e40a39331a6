"""Whether a storage keeps the promises that an atomic commit rests on, tried out on the storage itself.

Works in a directory of its own below the target, and removes it. A check that fails names what to expect
of the storage: most of them are properties that a mount option or a gateway has taken away.
"""

from __future__ import annotations

import contextlib
import mmap
import secrets
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.errors import AlreadyExistsError, HoldfastError, NotFoundError, StorageError
from engine.format.digest import bytes_digest
from engine.storage.base import Storage
from engine.storage.source import BufferSource, Window
from engine.text import readable_rate

RACERS = 8
SPEED_BYTES = 64 << 20
SYNCS = 8


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one: `ok` is None where the storage is allowed either answer. `sentence` says which."""

    name: str
    ok: bool | None
    sentence: str
    secs: float


class _Failed(Exception):
    """A check has seen what it must not see."""


@dataclass(frozen=True, slots=True)
class _Bench:
    storage: Storage
    folder: str
    speed_bytes: int

    def at(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def create(self) -> str:
        """A small file is there, whole, as soon as its creation returns."""
        self.storage.make_dir(self.folder)
        self.storage.publish(self.at("one"), b"first", exclusive=False)
        _expect(self._read("one") == b"first", "a file does not read back as it was written")
        return "a file reads back as written"

    def list_after_write(self) -> str:
        names = {entry.name: entry.bytes for entry in self.storage.list_dir(self.folder)}
        _expect(names == {"one": 5}, f"the listing after a write shows {names or 'nothing'}")
        return "a listing shows what was just written, and nothing else"

    def replace(self) -> str:
        self.storage.publish(self.at("one"), b"second", exclusive=False)
        _expect(self._read("one") == b"second", "a replaced file still reads as the older one")
        return "replacing a file is seen at once"

    def sync(self) -> str:
        """Files and their names can be made durable; some mounts refuse to sync a directory."""
        begun = time.monotonic()
        for number in range(SYNCS):
            self.storage.publish(self.at("synced"), str(number).encode(), exclusive=False)
            self.storage.sync_dir(self.folder)
        each_ms = (time.monotonic() - begun) / SYNCS * 1e3
        _expect(self._read("synced") == str(SYNCS - 1).encode(), "a synced file reads back as an older one")
        self.storage.delete_file(self.at("synced"))
        return f"files and their names can be synced; {each_ms:.1f} ms until a small file is durable"

    def exclusive_create(self) -> str | None:
        if not self.storage.supports_exclusive_create:
            return None
        self._refuses_a_second("one")

        def race(number: int) -> bool:
            try:
                self.storage.publish(self.at("race"), str(number).encode(), exclusive=True)
            except AlreadyExistsError:
                return False
            return True

        with ThreadPoolExecutor(RACERS) as pool:
            won = [number for number, wins in enumerate(pool.map(race, range(RACERS))) if wins]
        _expect(len(won) == 1, f"{len(won)} of {RACERS} racing writers were told that they created a file")
        _expect(self._read("race") == str(won[0]).encode(), "the winner's file holds another writer's bytes")
        return f"of {RACERS} racing writers, one creates the file"

    def partial_upload(self) -> str:
        """A write that breaks off leaves nothing under the name."""

        buffer, size = _buffer(min(self.speed_bytes, 48 << 20))
        with contextlib.suppress(_Stop):
            self.storage.write_shard(self.at("partial"), _BreaksOff(buffer, size))
        names = [entry.name for entry in self.storage.list_dir(self.folder)]
        _expect("partial" not in names, "a write that broke off is listed")
        _expect(not self.storage.exists(self.at("partial")), "a write that broke off can be opened")
        return "a write that breaks off leaves nothing behind"

    def rename(self) -> str | None:
        self.storage.make_dir(self.at("from"))
        self.storage.publish(self.at("from/inside"), b"x", exclusive=False)
        if not self.storage.rename(self.at("from"), self.at("to")):
            return None
        _expect(self._read("to/inside") == b"x", "a renamed directory lost its file")
        _expect(not self.storage.exists(self.at("from/inside")), "a renamed directory keeps its old name")
        return "a directory is renamed in one step"

    def speed(self) -> str:
        buffer, size = _buffer(self.speed_bytes)
        begun = time.monotonic()
        stats = self.storage.write_shard(self.at("large"), BufferSource(buffer, size))
        written = time.monotonic()
        self.storage.sync_dir(self.folder)
        back = bytearray(size)
        reading = time.monotonic()
        self.storage.read_into(self.at("large"), 0, memoryview(back))
        read = time.monotonic()
        _expect(bytes_digest(back) == bytes_digest(buffer[:size]), "a large file reads back changed")
        rates = [readable_rate(size, secs) for secs in (written - begun, read - reading)]
        return f"{rates[0]} written ({stats.method}, until durable), {rates[1]} read"

    def delete(self) -> str:
        self.storage.delete_file(self.at("one"))
        _expect(not self.storage.exists(self.at("one")), "a deleted file is still there")
        try:
            self._read("one")
        except NotFoundError:
            return "a deleted file is gone at once"
        raise _Failed("a deleted file can still be read")

    def _refuses_a_second(self, name: str) -> None:
        try:
            self.storage.publish(self.at(name), b"third", exclusive=True)
        except AlreadyExistsError:
            _expect(self._read(name) == b"second", "a refused creation has changed the file")
            return
        raise _Failed("an exclusive creation replaced an existing file")

    def _read(self, name: str) -> bytes:
        return self.storage.read_bytes(self.at(name), max_bytes=1 << 20)


class _BreaksOff(BufferSource):
    """Raises in place of its second window."""

    def windows(self, window_bytes: int) -> Generator[Window]:
        for window in super().windows(window_bytes):
            if window.begin:
                raise _Stop
            yield window


class _Stop(Exception):
    """Breaks a write off."""


_EITHER = {
    "exclusive create": "this store cannot create exclusively: never let two runs share the directory",
    "rename": "this store does not rename; Holdfast does without",
}


def selftest(storage: Storage, *, speed_bytes: int = SPEED_BYTES) -> Iterator[Check]:
    """Try everything, one after the other; yields each outcome as soon as it is known. Cleans up at the end.

    Raises: StorageError when the working directory cannot be removed again.
    """
    bench = _Bench(storage, f"selftest-{secrets.token_hex(4)}", speed_bytes)
    steps: list[tuple[str, Callable[[], str | None]]] = [
        ("create", bench.create),
        ("list after write", bench.list_after_write),
        ("replace", bench.replace),
        ("sync", bench.sync),
        ("exclusive create", bench.exclusive_create),
        ("partial upload", bench.partial_upload),
        ("rename", bench.rename),
        ("speed", bench.speed),
        ("delete", bench.delete),
    ]
    try:
        for name, step in steps:
            yield _try(name, step)
    finally:
        storage.delete_tree(bench.folder)
    left = storage.exists(bench.folder)
    yield Check("clean up", not left, f"{bench.folder} is still there" if left else "nothing is left", 0.0)


def _try(name: str, step: Callable[[], str | None]) -> Check:
    begun = time.monotonic()
    ok: bool | None = True
    try:
        said = step()
        if said is None:
            ok, said = None, _EITHER[name]
    except _Failed as error:
        ok, said = False, str(error)
    except (StorageError, HoldfastError) as error:
        ok, said = False, str(error)
    return Check(name, ok, said, time.monotonic() - begun)


def _buffer(size: int) -> tuple[memoryview, int]:
    """Aligned memory for direct I/O, and how much of it is to be written: an odd size, padded."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.write(secrets.token_bytes(1 << 16) * (size >> 16))
    return memoryview(pages), size - 1000


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Failed(otherwise)
