"""Bulk data over HTTP: a request's body goes out of the caller's memory, an answer's into it, with no copy.

The clients' own calls copy each part, hash it in Python's process and run in one thread. Here the client
only signs the address; the bytes pass from the socket to the buffer in as many threads as there are parts.

A transfer has no fixed time limit, since a slow line is no fault. What ends it is silence: no byte moved
for `stall_secs`.
"""

from __future__ import annotations

import fcntl
import http.client
import select
import socket
import ssl
import struct
import termios
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

STALL_SECS = 60.0
"""How long a transfer may stand still."""

CONNECT_SECS = 10.0
LEAST_BYTES_PER_SEC = 2 << 10
"""A transfer slower than this counts as standing still, however regularly a byte drips in."""

_PIECE_BYTES = 1 << 20
_MAX_IDLE = 16
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")
Place = tuple[str, str]
"""Scheme, and host with port."""


class StoppedError(Exception):
    """The caller has set `stop`."""


class RefusedError(Exception):
    """The store answered, but did not do as told. Whoever asks again through the client learns why."""


class BusyError(Exception):
    """The store answered that it cannot just now; `status` says in which words."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the store answered {status}")
        self.status = status


class Wire:
    """Connections to stores, kept open between requests. For any number of threads.

    Raises: RefusedError, BusyError; TimeoutError when nothing moves; ConnectionError for everything else
    that the network does. No text names the address: a signed one is as good as a password for a while.
    """

    def __init__(
        self,
        *,
        context: ssl.SSLContext | None = None,
        stall_secs: float = STALL_SECS,
        connect_secs: float = CONNECT_SECS,
        clock: Callable[[], float] = time.monotonic,
        readable: Callable[[socket.socket, float], bool] | None = None,
        unsent: Callable[[socket.socket], int] | None = None,
    ) -> None:
        self._context = context
        self._stall_secs = stall_secs
        self._connect_secs = connect_secs
        self._clock = clock
        self._readable = readable or _readable
        self._unsent = unsent or _unsent_bytes
        self._idle: dict[Place, list[http.client.HTTPConnection]] = {}
        self._lock = threading.Lock()

    def put(self, url: str, view: memoryview, stop: threading.Event) -> str:
        """PUT the bytes of `view`; returns the answer's ETag. Gives up at the next MiB once `stop` is set."""

        def talk(connection: http.client.HTTPConnection, target: str) -> str:
            answer = self._send(connection, target, view, stop)
            etag = answer.headers.get("ETag")
            if answer.status not in (200, 201) or not etag:
                raise RefusedError(f"the store answered {answer.status} to a part")
            return etag

        return self._run(url, talk)

    def get(self, url: str, offset: int, view: memoryview) -> None:
        """GET the bytes from `offset` into all of `view`."""
        self._run(url, lambda connection, target: self._receive(connection, target, offset, view))

    def _run(self, url: str, talk: Callable[[http.client.HTTPConnection, str], T]) -> T:
        parts = urlsplit(url)
        place = parts.scheme, parts.netloc
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path
        connection = self._take(place)
        if connection is not None:
            try:
                return self._talk(place, connection, target, talk)
            except ConnectionError:
                pass  # closed by the other side while it was idle: no failure of this request
        return self._talk(place, self._new(place), target, talk)

    def _talk(
        self,
        place: Place,
        connection: http.client.HTTPConnection,
        target: str,
        talk: Callable[[http.client.HTTPConnection, str], T],
    ) -> T:
        try:
            result = talk(connection, target)
        except BaseException as error:
            connection.close()
            raise _worded(error, self._stall_secs) from None
        self._keep(place, connection)
        return result

    def _send(
        self, connection: http.client.HTTPConnection, target: str, view: memoryview, stop: threading.Event
    ) -> http.client.HTTPResponse:
        connection.putrequest("PUT", target, skip_accept_encoding=True)
        connection.putheader("Content-Length", str(len(view)))
        deadline = self._deadline(len(view))
        try:
            connection.endheaders()
            position = 0
            while position < len(view):
                # send, not sendall, whose time limit is for all of it.
                position += connection.sock.send(view[position : position + _PIECE_BYTES])
                if stop.is_set():
                    raise StoppedError("another part has failed")
                self._check(deadline)
            self._await_answer(connection.sock, deadline)
        except (BrokenPipeError, ConnectionResetError):
            # The store may have said why before it hung up.
            with_answer = _last_words(connection)
            if with_answer is None:
                raise
            return with_answer
        return _answer(connection)

    def _receive(
        self, connection: http.client.HTTPConnection, target: str, offset: int, view: memoryview
    ) -> None:
        connection.putrequest("GET", target, skip_accept_encoding=True)
        connection.putheader("Range", f"bytes={offset}-{offset + len(view) - 1}")
        connection.endheaders()
        answer = connection.getresponse()
        if answer.status != 206 or answer.length != len(view):
            _drained(answer)
            _raise_if_busy(answer.status)
            raise RefusedError(f"the store answered {answer.status}, {answer.length} of {len(view)} bytes")
        deadline = self._deadline(len(view))
        position = 0
        while position < len(view):
            count = answer.readinto(view[position : position + _PIECE_BYTES])
            if not count:
                raise ConnectionError(f"the answer ended after {position} of {len(view)} bytes")
            position += count
            self._check(deadline)

    def _await_answer(self, sock: socket.socket, deadline: float) -> None:
        """Wait while the kernel still sends what it took: as long as that shrinks, bytes move."""
        left = self._unsent(sock)
        while left:
            if self._readable(sock, self._stall_secs):
                return
            before, left = left, self._unsent(sock)
            if left >= before:
                raise TimeoutError
            self._check(deadline)

    def _deadline(self, size: int) -> float:
        return self._clock() + self._stall_secs + size / LEAST_BYTES_PER_SEC

    def _check(self, deadline: float) -> None:
        if self._clock() > deadline:
            raise TimeoutError

    def _take(self, place: Place) -> http.client.HTTPConnection | None:
        with self._lock:
            idle = self._idle.get(place)
            return idle.pop() if idle else None

    def _keep(self, place: Place, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            idle = self._idle.setdefault(place, [])
            if connection.sock is not None and len(idle) < _MAX_IDLE:
                idle.append(connection)
                return
        connection.close()

    def _new(self, place: Place) -> http.client.HTTPConnection:
        scheme, netloc = place
        if scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                netloc, timeout=self._connect_secs, context=self._context
            )
        else:
            connection = http.client.HTTPConnection(netloc, timeout=self._connect_secs)
        try:
            connection.connect()
        except OSError as error:
            raise _worded(error, self._connect_secs) from None
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sock.settimeout(self._stall_secs)
        return connection


def _answer(connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
    answer = connection.getresponse()
    if not _drained(answer):
        connection.close()
    _raise_if_busy(answer.status)
    return answer


def _last_words(connection: http.client.HTTPConnection) -> http.client.HTTPResponse | None:
    """The answer that came before the connection broke, if one did; it cannot be used any more."""
    try:
        answer = _answer(connection)
    except (OSError, http.client.HTTPException):
        return None
    connection.close()
    return answer


def _drained(answer: http.client.HTTPResponse) -> bool:
    """Read what else was said; False if that is long, and the connection of no more use."""
    answer.read(1 << 16)
    return answer.isclosed()


def _raise_if_busy(status: int) -> None:
    if status in _TRANSIENT:
        raise BusyError(status)


def _worded(error: BaseException, stall_secs: float) -> BaseException:
    """The error in words that give nothing away: the library's own may quote the request."""
    if isinstance(error, TimeoutError):
        return TimeoutError(f"no data moved for {stall_secs:.0f} s")
    if isinstance(error, ssl.SSLCertVerificationError):
        return RefusedError(f"its certificate was not accepted: {error.verify_message}")
    if isinstance(error, (OSError, http.client.HTTPException)):
        return ConnectionError(f"the connection broke ({type(error).__name__})")
    return error


def _readable(sock: socket.socket, secs: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(secs * 1000))


def _unsent_bytes(sock: socket.socket) -> int:
    """Bytes that the kernel holds for sending or for acknowledgement; see SIOCOUTQ in tcp(7)."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0\0\0\0"))[0])
