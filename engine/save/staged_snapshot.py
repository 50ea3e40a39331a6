"""One snapshot in the staging buffer: training copies it in, and the storage writes it out.

Writing follows the copy: each file is a source whose windows become ready as the copy reaches them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from engine.format.digest import block_digests
from engine.native import kernels
from engine.save.staging_buffer import FileSlot, StagingBuffer
from engine.storage.source import Window, spans

DIGEST_SLICE_BYTES = 1 << 20 if kernels.library is None else 16 << 20
"""Bytes digested at a time, in about 0.1 or 1.2 ms: Python's loop holds the GIL that long."""

DIGEST_NICENESS = 8
"""Niceness of the digesting thread, if the copy has left digests to make: they are made on an idle core. With
more, a busy machine would delay the save."""


class StagedSnapshot:
    """Bytes [0, reached) of the staging buffer belong to the snapshot. The copying thread advances, the
    writing threads wait.

    Args:
        buffer: None if this rank writes nothing.
        settle: called by a waiting thread once the bytes are there; waits for a device's copies.
    """

    def __init__(
        self, buffer: StagingBuffer | None = None, settle: Callable[[], None] = lambda: None
    ) -> None:
        self._buffer = buffer
        self._changed = threading.Condition()
        self._settle = settle
        self._reached = 0
        self._error: BaseException | None = None
        self._digests: dict[str, bytes] = {}

    @property
    def slots(self) -> tuple[FileSlot, ...]:
        """Where each file lies in the buffer."""
        return self._buffer.slots if self._buffer is not None else ()

    @property
    def file_bytes(self) -> int:
        """Bytes of all files."""
        return self._buffer.file_bytes if self._buffer is not None else 0

    def files(self, *, clock: Callable[[], float] = time.monotonic) -> list[StagedFile]:
        """What the storage writes from."""
        if self._buffer is None:
            return []
        return [StagedFile(self, slot, self._buffer.padded(slot), clock) for slot in self.slots]

    def note_digests(self, file: str, packed: bytes) -> None:
        """Keep the digests of all blocks of a file, made during the copy. Before `advance` to its end."""
        self._digests[file] = packed

    def digests_of(self, file: str) -> bytes | None:
        """The digests noted for a file, or None. After `wait_until` its end."""
        return self._digests.get(file)

    def advance(self, reached_bytes: int) -> None:
        """All bytes before `reached_bytes` are copied, or their copy has started."""
        with self._changed:
            self._reached = max(self._reached, reached_bytes)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """The snapshot failed: every waiting thread raises the error."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def wait_until(self, end_bytes: int) -> None:
        """Wait until bytes [0, end_bytes) are there. Raises the error given to `fail`."""
        with self._changed:
            self._changed.wait_for(lambda: self._reached >= end_bytes or self._error is not None)
            if self._error is not None:
                raise self._error
        self._settle()


class StagedFile:
    """One shard file of a staged snapshot. See `ShardSource`."""

    def __init__(
        self, snapshot: StagedSnapshot, slot: FileSlot, memory: memoryview, clock: Callable[[], float]
    ) -> None:
        self.layout = slot.layout
        self.file_bytes = slot.layout.file_bytes
        self._snapshot = snapshot
        self._memory = memory
        self._begin = slot.begin
        self._clock = clock
        self._digests = b""
        self.digest_secs = 0.0

    def windows(self, window_bytes: int) -> Generator[Window]:
        stop = threading.Event()
        # Writing starts only once half of the buffer is filled: see DECISIONS 30.
        least = self._snapshot.file_bytes // 2
        # Not in the write loop: digesting holds the GIL, which the training thread needs between its copies.
        with ThreadPoolExecutor(1, thread_name_prefix="holdfast-digest") as pool:
            digesting = pool.submit(self._digest, stop)
            try:
                for begin, end in spans(self.file_bytes, window_bytes):
                    self._snapshot.wait_until(max(self._begin + end, least))
                    yield Window(begin, end, self._memory[begin:])
            except BaseException:  # includes the writer's failure, which closes this generator
                stop.set()
                raise
            self._digests = digesting.result()

    def digests(self) -> bytes:
        return self._digests

    def _digest(self, stop: threading.Event) -> bytes:
        """Packed digests of the whole file once the buffer holds it."""
        _stand_back()
        self._snapshot.wait_until(self._begin + self.file_bytes)
        noted = self._snapshot.digests_of(self.layout.file)
        if noted is not None:
            return noted
        started = self._clock()
        packed = []
        for begin, end in spans(self.file_bytes, DIGEST_SLICE_BYTES):
            if stop.is_set():
                break
            packed.append(block_digests(self._memory[begin:end]))
            # Release the GIL. A thread that requests it waits up to 5 ms, and training requests it at every
            # operation.
            time.sleep(0)
        self.digest_secs = self._clock() - started
        return b"".join(packed)


def _stand_back() -> None:
    """Lower the priority of this thread, which ends with its file. Linux has a priority per thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, thread) + DIGEST_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, min(19, nice))
