"""A file of the staging buffer as what a storage writes from, while the snapshot is still being copied."""

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
from engine.save.filling import Filling
from engine.save.staging_buffer import Arena, FileSlot
from engine.storage.source import Window, spans

DIGEST_SLICE_BYTES = 1 << 20 if kernels.library is None else 16 << 20
"""How much is digested at a time, about 0.1 or 1.2 ms: Python's loop holds the GIL for as long."""

DIGEST_NICENESS = 8
"""How far the digesting thread stands back behind training, where the copy has left digests to make: they are
made while a core has nothing else to do. Further back, a busy machine would delay the save."""


class StagedFile:
    """One shard file; its windows become ready as the copy reaches them. See `ShardSource`."""

    def __init__(
        self,
        buffer: Arena,
        slot: FileSlot,
        filling: Filling,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = slot.layout
        self.file_bytes = slot.layout.file_bytes
        self._memory = buffer.padded(slot)
        self._begin = slot.begin
        # Not from the first byte on: see DECISIONS 30.
        self._least = buffer.file_bytes // 2
        self._filling = filling
        self._clock = clock
        self._digests = b""
        self.digest_secs = 0.0

    def windows(self, window_bytes: int) -> Generator[Window]:
        stop = threading.Event()
        # Not in the write loop: digesting holds the GIL, and while the snapshot is still being copied the
        # training thread needs it between copies.
        with ThreadPoolExecutor(1, thread_name_prefix="holdfast-digest") as pool:
            digesting = pool.submit(self._digest, stop)
            try:
                for begin, end in spans(self.file_bytes, window_bytes):
                    self._filling.wait_until(max(self._begin + end, self._least))
                    yield Window(begin, end, self._memory[begin:])
            except BaseException:  # the writer's, too: it closes this generator
                stop.set()
                raise
            self._digests = digesting.result()

    def digests(self) -> bytes:
        return self._digests

    def _digest(self, stop: threading.Event) -> bytes:
        """Packed digests of the whole file once the buffer holds it."""
        _stand_back()
        self._filling.wait_until(self._begin + self.file_bytes)
        noted = self._filling.digests_of(self.layout.file)
        if noted is not None:
            return noted
        started = self._clock()
        packed = []
        for begin, end in spans(self.file_bytes, DIGEST_SLICE_BYTES):
            if stop.is_set():
                break
            packed.append(block_digests(self._memory[begin:end]))
            # Gives the GIL away for a moment, if it was held. A thread that only asks for it gets it after
            # 5 ms, and training asks for it at every operation.
            time.sleep(0)
        self.digest_secs = self._clock() - started
        return b"".join(packed)


def staged_files(
    buffer: Arena | None, filling: Filling, *, clock: Callable[[], float] = time.monotonic
) -> list[StagedFile]:
    """All files of a snapshot; none where this rank writes nothing."""
    if buffer is None:
        return []
    return [StagedFile(buffer, slot, filling, clock=clock) for slot in buffer.slots]


def _stand_back() -> None:
    """Lower the priority of this thread, which ends with its file. Linux has one for each thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, thread) + DIGEST_NICENESS
            os.setpriority(os.PRIO_PROCESS, thread, min(19, nice))
