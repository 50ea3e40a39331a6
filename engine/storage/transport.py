"""HTTP requests that carry shards: a body goes out of the caller's memory, an answer into it.

urllib3 keeps the connections, uses proxies and checks certificates; `connections` adds when to give up.
"""

from __future__ import annotations

import http.client
import logging
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

import urllib3
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError
from urllib3.response import BaseHTTPResponse

from engine.storage.connections import POOLS, Body, Connection, Limits, StaleError

MOST_IDLE = 16
"""Connections to one host that are kept for the next request."""

_RECEIVE_BYTES = 1 << 20
_ANSWER_BYTES = 1 << 16
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})

T = TypeVar("T")


class RefusedError(Exception):
    """The store answered but refused. The client's own request for the same object tells why."""


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

    def __init__(self, manager: urllib3.PoolManager | None = None, limits: Limits | None = None) -> None:
        self._manager = manager or urllib3.PoolManager(maxsize=MOST_IDLE)
        self._manager.pool_classes_by_scheme = POOLS
        self._limits = limits or Limits()

    def put(self, url: str, view: memoryview, stop: threading.Event) -> str:
        """PUT the bytes of `view`; returns the answer's ETag. StoppedError soon after `stop` is set."""

        def send() -> str:
            length = {"Content-Length": str(len(view))}
            answer = self._open("PUT", url, length, Body(view, stop, self._limits))
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
                self._fill(view, answer)
            except BaseException:
                answer.close()
                raise
            answer.release_conn()

        self._run(receive)

    def _open(
        self, method: str, url: str, headers: Mapping[str, str], body: Body | None = None
    ) -> BaseHTTPResponse:
        return self._manager.urlopen(
            method,
            url,
            headers=headers,
            body=body,
            timeout=urllib3.Timeout(connect=self._limits.connect_secs, read=self._limits.stall_secs),
            retries=False,  # nor are redirects followed
            preload_content=False,
            decode_content=False,
        )

    def _fill(self, view: memoryview, answer: BaseHTTPResponse) -> None:
        assert isinstance(answer.connection, Connection)
        deadline, raw, position = self._limits.deadline(len(view)), answer.connection.raw, 0
        while position < len(view):
            count = raw.readinto(view[position : position + _RECEIVE_BYTES])
            if not count:
                raise ConnectionError(f"the answer ended after {position} of {len(view)} bytes")
            position += count
            self._limits.check(deadline)

    def _run(self, request: Callable[[], T]) -> T:
        try:
            try:
                return request()
            except StaleError:
                return request()
        except Exception as error:
            raise self._worded(error) from None

    def _worded(self, error: Exception) -> Exception:
        """The error without secrets: the library's own text may quote the address."""
        cause = _cause(error)
        if isinstance(cause, ConnectTimeoutError) and not isinstance(cause, NewConnectionError):
            return TimeoutError(f"no connection within {self._limits.connect_secs:.0f} s")
        if isinstance(cause, (TimeoutError, ReadTimeoutError)):
            return TimeoutError(f"no data moved for {self._limits.stall_secs:.0f} s")
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RefusedError(f"its certificate was not accepted: {cause.verify_message}")
        if isinstance(cause, (OSError, http.client.HTTPException, HTTPError, StaleError)):
            return ConnectionError(f"the connection broke ({type(cause).__name__})")
        return error


class _NoSignatures(logging.Filter):
    """urllib3 logs every address for debugging; the query of a signed one is as good as a password."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_without_signature(value) for value in record.args)
        return True


logging.getLogger("urllib3.connectionpool").addFilter(_NoSignatures())


def _without_signature(value: object) -> object:
    return f"{value.partition('?')[0]}?***" if isinstance(value, str) and "Signature=" in value else value


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
