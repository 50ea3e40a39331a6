"""urllib3's connections, abandoned when no data moves.

The library limits connecting and waiting, but not a transfer, since a slow line is not an error. Here a
transfer ends when no byte has moved for `stall_secs`.
"""

from __future__ import annotations

import fcntl
import http.client
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.response import HTTPResponse

STALL_SECS = 60.0
LEAST_BYTES_PER_SEC = 2 << 10
"""A slower transfer counts as stalled, however regularly single bytes arrive."""

SEND_BYTES = int(STALL_SECS) * LEAST_BYTES_PER_SEC
"""Bytes per `sendall`, whose time limit covers all of them."""


class StoppedError(Exception):
    """The caller has set `stop`."""


class StaleError(Exception):
    """A connection broke that had carried another request: the store may have closed it while it was idle."""


def _readable(sock: socket.socket, secs: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(secs * 1000))


def _unsent_bytes(sock: socket.socket) -> int:
    """Bytes that the kernel holds for sending or for acknowledgement; see SIOCOUTQ in tcp(7)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits for a stalled transfer and for connecting, and the checks against them."""

    stall_secs: float = STALL_SECS
    connect_secs: float = 10.0
    clock: Callable[[], float] = time.monotonic
    readable: Callable[[socket.socket, float], bool] = _readable
    unsent: Callable[[socket.socket], int] = _unsent_bytes

    def deadline(self, size: int) -> float:
        """The time by which a transfer of that many bytes, begun now, must have ended."""
        return self.clock() + self.stall_secs + size / LEAST_BYTES_PER_SEC

    def check(self, deadline: float) -> None:
        """TimeoutError after the deadline."""
        if self.clock() > deadline:
            raise TimeoutError


class Body:
    """A request's body: the caller's memory itself, piece by piece. StoppedError once `stop` is set."""

    def __init__(self, view: memoryview, stop: threading.Event, limits: Limits) -> None:
        self._view = view
        self._stop = stop
        self._deadline = limits.deadline(len(view))
        self.limits = limits

    def __iter__(self) -> Iterator[memoryview]:
        for begin in range(0, len(self._view), SEND_BYTES):
            yield self._view[begin : begin + SEND_BYTES]
            if self._stop.is_set():
                raise StoppedError("another part has failed")
            self.limits.check(self._deadline)

    def wait_for_answer(self, sock: socket.socket) -> None:
        """Wait while the kernel sends its buffered bytes: as long as their number shrinks, bytes move.

        The library's time limit begins when the last byte is in the kernel, which takes megabytes: a slow
        line needs minutes for them.
        """
        left = self.limits.unsent(sock)
        while left:
            if self.limits.readable(sock, self.limits.stall_secs):
                return
            before, left = left, self.limits.unsent(sock)
            if left >= before:
                raise TimeoutError
            self.limits.check(self._deadline)


class Connection(HTTPConnection):
    """Sends within the time limit for silence, not the one for connecting; its answers are read in place."""

    raw: http.client.HTTPResponse
    """The answer below urllib3's own, whose `readinto` reads a copy first: 0.86 x as fast."""

    _body: Body | None = None
    _used = _kept = False

    def response_class(self, *args: Any, **options: Any) -> http.client.HTTPResponse:  # type: ignore[override]
        self.raw = http.client.HTTPResponse(*args, **options)
        return self.raw

    def connect(self) -> None:
        self._used = False
        super().connect()

    def request(
        self, method: str, url: str, body: Any = None, headers: Any = None, **options: Any
    ) -> None:
        if self.is_closed:
            self.connect()
        self._kept, self._used = self._used, True
        self._body = body if isinstance(body, Body) else None
        if self._body is not None:
            self.timeout = self._body.limits.stall_secs
        super().request(method, url, body, headers, **options)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        try:
            if self._body is not None:
                self._body.wait_for_answer(self.sock)
            return super().getresponse()
        except ConnectionError as error:
            if self._kept:
                raise StaleError from error
            raise


class _TLSConnection(Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = Connection


class _TLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


POOLS = {"http": _Pool, "https": _TLSPool}
"""For a manager's `pool_classes_by_scheme`."""
