"""The process of one row: moves shards when told to; says how long each took and what memory it needed."""

from __future__ import annotations

import mmap
import time
from multiprocessing.connection import Connection
from pathlib import Path

WARM_UP_BYTES = 20 << 20


def serve(
    pipe: Connection, number: int, uri: str, options: dict[str, str], shard_bytes: int, given: bytes
) -> None:
    """Answer (secs, most bytes of memory so far above those before the first shard) to each object's name.

    A downloaded shard must not differ from `given`, a stretch of it at the front. Ends when the pipe does,
    or with the error that a move raised, as text.
    """
    from bench.remoting.rows import ROWS

    row = ROWS[number]
    try:
        move = row.make(uri, options)
        buffer = memoryview(mmap.mmap(-1, shard_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        _fill(buffer, given if row.verb == "upload" else bytes(len(given)))
        move("warm-up", buffer[:WARM_UP_BYTES])  # modules, connections
        before = _status("VmRSS")
        pipe.send("ready")
        while True:
            name = pipe.recv()
            _reset_peak()
            begun = time.perf_counter()
            result = move(name, buffer)
            secs = time.perf_counter() - begun
            del result
            pipe.send((secs, _status("VmHWM") - before))
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


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")
