"""HTTP requests that carry shards: a body goes out of the caller's memory, an answer into it.

urllib3 keeps the connections, uses proxies and checks certificates. What is added to it is when to give up.
A transfer has no fixed time limit, since a slow line is no fault. Silence ends it: no byte moved for
`stall_secs`.
"""

from __future__ import annotations

import fcntl
import http.client
import logging
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError
from urllib3.response import BaseHTTPResponse, HTTPResponse

STALL_SECS = 60.0
"""How long a transfer may stand still."""

CONNECT_SECS = 10.0
LEAST_BYTES_PER_SEC = 2 << 10
"""A transfer slower than this counts as standing still, however regularly a byte drips in."""

MOST_IDLE = 16
"""Connections to one host that are kept for the next request."""

SEND_BYTES = int(STALL_SECS) * LEAST_BYTES_PER_SEC
"""Bytes for one `sendall`, whose time limit is for all of them."""

_RECEIVE_BYTES = 1 << 20
_ANSWER_BYTES = 1 << 16
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


class StoppedError(Exception):
    """The caller has set `stop`."""


class RefusedError(Exception):
    """The store answered, but did not do as told. The client's own request for the same tells why."""


class BusyError(Exception):
    """The store answered that it cannot serve the request now."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the store answered {status}")
        self.status = status


class Transport:
    """PUT and GET of shards. For any number of threads.

    Raises: RefusedError, BusyError; TimeoutError when nothing moves; ConnectionError for everything else
    that the network does. No text names the address: whoever has a signed one can use it for a while.
    """

    def __init__(
        self,
        manager: urllib3.PoolManager | None = None,
        *,
        stall_secs: float = STALL_SECS,
        connect_secs: float = CONNECT_SECS,
        clock: Callable[[], float] = time.monotonic,
        readable: Callable[[socket.socket, float], bool] | None = None,
        unsent: Callable[[socket.socket], int] | None = None,
    ) -> None:
        self._manager = manager or urllib3.PoolManager(maxsize=MOST_IDLE)
        self._manager.pool_classes_by_scheme = {"http": _Pool, "https": _TLSPool}
        self._timeout = urllib3.Timeout(connect=connect_secs, read=stall_secs)
        self._stall_secs = stall_secs
        self._connect_secs = connect_secs
        self._clock = clock
        self._readable = readable or _readable
        self._unsent = unsent or _unsent_bytes

    def put(self, url: str, view: memoryview, stop: threading.Event) -> str:
        """PUT the bytes of `view`; returns the answer's ETag. Gives up after a few KiB once `stop` is set."""

        def send() -> str:
            body = _Body(view, stop, self._watch(len(view)))
            answer = self._open("PUT", url, {"Content-Length": str(len(view))}, body)
            _finish(answer)
            etag = answer.headers.get("ETag")
            if answer.status not in (200, 201) or not etag:
                raise RefusedError(f"the store answered {answer.status} to a part")
            return etag

        return self._run(send)

    def get(self, url: str, offset: int, view: memoryview) -> None:
        """GET the bytes from `offset` into all of `view`."""

        def receive() -> None:
            wanted = {"Range": f"bytes={offset}-{offset + len(view) - 1}"}
            answer = self._open("GET", url, wanted)
            length = answer.length_remaining
            if answer.status != 206 or length != len(view):
                _finish(answer)
                raise RefusedError(f"the store answered {answer.status}, {length} of {len(view)} bytes")
            try:
                _fill(view, answer, self._watch(len(view)))
            except BaseException:
                answer.close()
                raise

        self._run(receive)

    def _watch(self, size: int) -> _Watch:
        deadline = self._clock() + self._stall_secs + size / LEAST_BYTES_PER_SEC
        return _Watch(self._stall_secs, deadline, self._clock, self._readable, self._unsent)

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: _Body | None = None
    ) -> BaseHTTPResponse:
        return self._manager.urlopen(
            method,
            url,
            headers=headers,
            body=body,
            timeout=self._timeout,
            retries=False,  # nor are redirects followed
            preload_content=False,
            decode_content=False,
        )

    def _run(self, request: Callable[[], T]) -> T:
        try:
            try:
                return request()
            except _StaleError:
                return request()
        except Exception as error:
            raise self._worded(error) from None

    def _worded(self, error: Exception) -> Exception:
        """The error in words that give nothing away: the library's own may quote the address."""
        cause = _cause(error)
        if isinstance(cause, ConnectTimeoutError) and not isinstance(cause, NewConnectionError):
            return TimeoutError(f"no connection within {self._connect_secs:.0f} s")
        if isinstance(cause, (TimeoutError, ReadTimeoutError)):
            return TimeoutError(f"no data moved for {self._stall_secs:.0f} s")
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RefusedError(f"its certificate was not accepted: {cause.verify_message}")
        if isinstance(cause, (OSError, http.client.HTTPException, HTTPError, _StaleError)):
            return ConnectionError(f"the connection broke ({type(cause).__name__})")
        return error


@dataclass(frozen=True, slots=True)
class _Watch:
    """Tells a transfer that stands still from a slow one."""

    stall_secs: float
    deadline: float
    clock: Callable[[], float]
    readable: Callable[[socket.socket, float], bool]
    unsent: Callable[[socket.socket], int]

    def check(self) -> None:
        """TimeoutError if the transfer has been too slow for too long."""
        if self.clock() > self.deadline:
            raise TimeoutError

    def wait_for_answer(self, sock: socket.socket) -> None:
        """Wait while the kernel still sends what it took: as long as that shrinks, bytes move.

        The library's time limit begins when the last byte is in the kernel, which takes megabytes: a slow
        line needs minutes for them.
        """
        left = self.unsent(sock)
        while left:
            if self.readable(sock, self.stall_secs):
                return
            before, left = left, self.unsent(sock)
            if left >= before:
                raise TimeoutError
            self.check()


@dataclass(frozen=True, slots=True)
class _Body:
    """A request's body: the caller's memory itself, piece by piece."""

    view: memoryview
    stop: threading.Event
    watch: _Watch

    def __iter__(self) -> Iterator[memoryview]:
        for begin in range(0, len(self.view), SEND_BYTES):
            yield self.view[begin : begin + SEND_BYTES]
            if self.stop.is_set():
                raise StoppedError("another part has failed")
            self.watch.check()


class _StaleError(Exception):
    """A connection broke that had carried another request: the store may have closed it while it was idle."""


class _Connection(HTTPConnection):
    """Sends within the time limit for silence, not the one for connecting; its answers are read in place."""

    raw: http.client.HTTPResponse
    """The answer below urllib3's own, whose `readinto` reads a copy first: 0.8 x as fast."""

    _body: _Body | None = None
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
        self._body = body if isinstance(body, _Body) else None
        if self._body is not None:
            self.timeout = self._body.watch.stall_secs
        super().request(method, url, body, headers, **options)

    def getresponse(self) -> HTTPResponse:  # type: ignore[override]
        try:
            if self._body is not None:
                self._body.watch.wait_for_answer(self.sock)
            return super().getresponse()
        except ConnectionError as error:
            if self._kept:
                raise _StaleError from error
            raise


class _TLSConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TLSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TLSConnection


class _NoSignatures(logging.Filter):
    """urllib3 logs every address for debugging; the query of a signed one is as good as a password."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_without_signature(value) for value in record.args)
        return True


logging.getLogger("urllib3.connectionpool").addFilter(_NoSignatures())


def _without_signature(value: object) -> object:
    return f"{value.partition('?')[0]}?***" if isinstance(value, str) and "Signature=" in value else value


def _fill(view: memoryview, answer: BaseHTTPResponse, watch: _Watch) -> None:
    assert isinstance(answer.connection, _Connection)
    raw, position = answer.connection.raw, 0
    while position < len(view):
        count = raw.readinto(view[position : position + _RECEIVE_BYTES])
        if not count:
            raise ConnectionError(f"the answer ended after {position} of {len(view)} bytes")
        position += count
        watch.check()
    answer.release_conn()


def _finish(answer: BaseHTTPResponse) -> None:
    """Read the rest of an answer, so that the connection can be used again; BusyError if it says so."""
    answer.read(_ANSWER_BYTES)
    if not answer.closed:
        answer.close()
    if answer.status in _TRANSIENT:
        raise BusyError(answer.status)


def _cause(error: BaseException) -> BaseException:
    """What one of urllib3's errors was made from."""
    inner = [argument for argument in error.args if isinstance(argument, BaseException)]
    return _cause(inner[-1]) if isinstance(error, HTTPError) and inner else error


def _readable(sock: socket.socket, secs: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(secs * 1000))


def _unsent_bytes(sock: socket.socket) -> int:
    """Bytes that the kernel holds for sending or for acknowledgement; see SIOCOUTQ in tcp(7)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])
