"""metrics.jsonl: one JSON object a line, appended with one write each.

A reader always sees whole lines, except a torn last one after a crash, which the next run cuts off. Nothing
is rewritten: after a resume from an older step, the abandoned steps stay above the new ones.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import NotFoundError, StorageDeniedError, StorageError

log = logging.getLogger(__name__)

FILE_NAME = "metrics.jsonl"
_TAIL_BYTES = 65536

Event = Mapping[str, Any]
Write = Callable[[int, bytes], int]


def encode(event: Event) -> bytes:
    """One line with its newline. Floats keep every bit; NaN and infinities become strings."""
    return json.dumps(_plain(event), allow_nan=False, ensure_ascii=False, default=str).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class MetricsLog:
    """Appends events to `<directory>/metrics.jsonl`, from any thread.

    If a write fails, the event is lost and a message logged once: a full disk must not end the training.
    """

    def __init__(
        self, directory: str, *, clock: Callable[[], float] = time.time, write: Write = os.write
    ) -> None:
        """Raises StorageError when the directory or the file cannot be created or opened."""
        self.path = Path(directory) / FILE_NAME
        self._clock, self._write, self._failing = clock, write, False
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd: int | None = os.open(
                self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
            cut_torn_line(self._fd)
        except OSError as error:
            raise _refusal(error)(
                f"cannot write metrics to {self.path}: {error.strerror or error}; give another --log_dir"
            ) from error

    def append(self, event: Event) -> None:
        """Write one event and add `time` (Unix seconds)."""
        line = encode({**event, "time": self._clock()})
        with self._lock:
            if self._fd is None:
                return
            try:
                self._append(self._fd, line)
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.error("cannot write %s (%s): events are lost until it works again", self.path, error)
                self._failing = True

    def _append(self, fd: int, line: bytes) -> None:
        end = os.fstat(fd).st_size
        written = self._write(fd, line)
        if written != len(line):
            # Half a line would corrupt the next line, too.
            os.ftruncate(fd, end)
            raise OSError(f"only {written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Close the file; later events are dropped."""
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None


def cut_torn_line(fd: int) -> int:
    """Cut off the partial line that a killed writer left; returns the number of bytes cut."""
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        begin = max(0, end - _TAIL_BYTES)
        newline = os.pread(fd, end - begin, begin).rfind(b"\n")
        if newline >= 0:
            end = begin + newline + 1
            break
        end = begin
    if end < size:
        os.ftruncate(fd, end)
    return size - end


def _refusal(error: OSError) -> type[StorageError]:
    if isinstance(error, PermissionError):
        return StorageDeniedError
    return NotFoundError if isinstance(error, FileNotFoundError) else StorageError
