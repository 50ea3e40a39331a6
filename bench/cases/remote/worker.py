"""The process of one row: moves shards when told to, and reports the seconds and the memory of each."""

from __future__ import annotations

import mmap
import time
from multiprocessing.connection import Connection
from pathlib import Path

from bench.harness.resources import status_bytes

WARM_UP_BYTES = 20 << 20


def serve(
    pipe: Connection, number: int, uri: str, options: dict[str, str], shard_bytes: int, given: bytes
) -> None:
    """Answer the name of each object with (seconds, most bytes of memory so far above the warm-up's).

    A downloaded shard must begin with `given`. Ends with the pipe, or with the error of a move, as text.
    """
    from bench.cases.remote.rows import ROWS

    row = ROWS[number]
    try:
        move = row.make(uri, options)
        buffer = memoryview(mmap.mmap(-1, shard_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        _fill(buffer, given if row.verb == "upload" else bytes(len(given)))
        move("warm-up", buffer[:WARM_UP_BYTES])  # modules, connections
        before = status_bytes("VmRSS")
        pipe.send("ready")
        while True:
            name = pipe.recv()
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            begun = time.perf_counter()
            result = move(name, buffer)
            secs = time.perf_counter() - begun
            del result
            pipe.send((secs, status_bytes("VmHWM") - before))
            if row.verb == "download" and row.peer == "" and buffer[: len(given)] != given:
                raise ValueError(f"{name} came back changed")
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}"[:300])


def _fill(buffer: memoryview, given: bytes) -> None:
    for begin in range(0, len(buffer), len(given)):
        piece = buffer[begin : begin + len(given)]
        piece[:] = given[: len(piece)]
