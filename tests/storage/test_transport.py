"""Bulk data over HTTP, against a small server that does as it is told."""

from __future__ import annotations

import itertools
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from engine.storage.connections import SEND_BYTES, Limits, StoppedError
from engine.storage.transport import BusyError, RefusedError, Transport
from tests.storage.buffers import pattern

SECRET = "X-Signature=hunter2"
NEVER = threading.Event()


class Server(ThreadingHTTPServer):
    """Keeps what is put; `script` may answer a request in its own way."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.connections: set[Any] = set()
        self.script: Callable[[Handler], bool] = lambda handler: False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # several tests hang up
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/bucket/key?{SECRET}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_PUT(self) -> None:
        self.server.connections.add(self.client_address)
        if self.server.script(self):
            return
        self.server.objects[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, {"ETag": '"tag"'})

    def do_GET(self) -> None:
        self.server.connections.add(self.client_address)
        if self.server.script(self):
            return
        first, last = (int(number) for number in self.headers["Range"].removeprefix("bytes=").split("-"))
        self.answer(206, {}, self.server.objects[self.path][first : last + 1])

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def hang_up(self) -> bool:
        self.close_connection = True
        self.connection.close()
        return True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def put(transport: Transport, server: Server, data: bytes, stop: threading.Event = NEVER) -> str:
    return transport.put(server.url, memoryview(data), stop)


@pytest.mark.parametrize("size", [1, 4096, (3 << 20) + 17])
def test_bytes_go_and_come(server: Server, size: int) -> None:
    transport, data = Transport(), pattern(size)
    assert put(transport, server, data) == '"tag"'
    target = bytearray(size)
    transport.get(server.url, 0, memoryview(target))
    assert target == data
    part = bytearray(size // 2 + 1)
    transport.get(server.url, size // 3, memoryview(part)[: size - size // 3])
    assert part.startswith(data[size // 3 : size // 3 + min(len(part), size - size // 3)])


def test_a_connection_is_used_again(server: Server) -> None:
    transport = Transport()
    for _ in range(5):
        put(transport, server, b"x")
        transport.get(server.url, 0, memoryview(bytearray(1)))
    assert len(server.connections) == 1


def test_a_connection_that_was_closed_while_idle_is_replaced(server: Server) -> None:
    """Servers close what is idle: the request has not failed, and is not counted as a try."""
    transport, calls = Transport(), itertools.count(1)
    put(transport, server, b"x")
    server.script = lambda handler: next(calls) == 1 and handler.hang_up()
    assert put(transport, server, b"y") == '"tag"'
    assert len(server.connections) == 2


def test_a_new_connection_that_breaks_is_a_failure(server: Server) -> None:
    server.script = Handler.hang_up
    with pytest.raises(ConnectionError) as raised:
        put(Transport(), server, b"x")
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_told_apart(server: Server, status: int) -> None:
    def busy(handler: Handler) -> bool:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        handler.answer(status, {}, b"<Error/>")
        return True

    server.script = busy
    transport = Transport()
    with pytest.raises(BusyError) as raised:
        put(transport, server, b"x")
    assert raised.value.status == status
    with pytest.raises(BusyError):
        transport.get(server.url, 0, memoryview(bytearray(5)))


@pytest.mark.parametrize("status", [301, 400, 403, 404])
def test_what_will_not_pass_is_told_apart(server: Server, status: int) -> None:
    def refuse(handler: Handler) -> bool:
        handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
        handler.answer(status, {"Location": "/elsewhere"}, b"<Error/>")
        return True

    server.script = refuse
    transport = Transport()
    with pytest.raises(RefusedError, match=str(status)):
        put(transport, server, b"x")
    with pytest.raises(RefusedError, match=str(status)):
        transport.get(server.url, 0, memoryview(bytearray(5)))


def test_an_answer_that_came_before_the_end_of_the_request_counts(server: Server) -> None:
    """A store that is over its quota says so at once and hangs up: that is no broken connection."""

    def refuse_early(handler: Handler) -> bool:
        handler.answer(403, {}, b"QuotaExceeded")
        handler.connection.shutdown(socket.SHUT_WR)
        handler.rfile.read(1 << 20)
        return handler.hang_up()

    server.script = refuse_early
    with pytest.raises((RefusedError, ConnectionError)):  # a reset may overtake the answer
        put(Transport(), server, pattern(8 << 20))


@pytest.mark.parametrize("body", [b"", b"1234", b"123456"])
def test_an_answer_of_another_length_is_refused(server: Server, body: bytes) -> None:
    def short(handler: Handler) -> bool:
        handler.answer(206, {}, body)
        return True

    server.script = short
    with pytest.raises(RefusedError):
        Transport().get(server.url, 0, memoryview(bytearray(5)))


def test_an_answer_that_ends_early_is_a_broken_connection(server: Server) -> None:
    def cut(handler: Handler) -> bool:
        handler.send_response(206)
        handler.send_header("Content-Length", "5")
        handler.end_headers()
        handler.wfile.write(b"123")
        handler.wfile.flush()
        return handler.hang_up()

    server.script = cut
    with pytest.raises(ConnectionError, match=r"3 of 5|broke"):
        Transport().get(server.url, 0, memoryview(bytearray(5)))


def test_a_server_that_does_not_read_is_a_stall(server: Server) -> None:
    done = threading.Event()
    server.script = lambda handler: done.wait() and handler.hang_up()
    with pytest.raises(TimeoutError, match="no data moved"):
        put(Transport(limits=Limits(stall_secs=0.05, connect_secs=300.0)), server, pattern(64 << 20))
    done.set()


def test_a_server_that_does_not_answer_is_a_stall(server: Server) -> None:
    done = threading.Event()
    server.script = lambda handler: done.wait() and handler.hang_up()
    for ask in (
        lambda: put(Transport(limits=Limits(stall_secs=0.05)), server, b"x"),
        lambda: Transport(limits=Limits(stall_secs=0.05)).get(server.url, 0, memoryview(bytearray(5))),
    ):
        with pytest.raises(TimeoutError, match="no data moved"):
            ask()
    done.set()


@pytest.mark.parametrize(("queued", "fails"), [([9, 9], True), ([9, 5, 5], True), ([9, 5, 1, 0], False)])
def test_what_the_kernel_still_sends_is_movement(server: Server, queued: list[int], fails: bool) -> None:
    """On a slow line, minutes can pass between the last byte handed over and the answer."""
    left = iter(queued)
    transport = Transport(limits=Limits(readable=lambda sock, secs: False, unsent=lambda sock: next(left)))
    if fails:
        with pytest.raises(TimeoutError):
            put(transport, server, b"x")
    else:
        assert put(transport, server, b"x") == '"tag"'


def test_slow_is_no_stall_and_dripping_is(server: Server) -> None:
    size = 8 << 20
    for secs_a_mib, fails in ((100.0, False), (1000.0, True)):
        ticks, step = itertools.count(), secs_a_mib * SEND_BYTES / (1 << 20)
        clock = lambda ticks=ticks, step=step: next(ticks) * step  # noqa: E731
        transport = Transport(limits=Limits(stall_secs=60.0, clock=clock))
        if fails:
            with pytest.raises(TimeoutError):
                put(transport, server, pattern(size))
        else:
            assert put(transport, server, pattern(size)) == '"tag"'


def test_a_put_can_be_stopped(server: Server) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StoppedError):
        put(Transport(), server, b"x", stop)


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        port = taken.getsockname()[1]
        with pytest.raises(ConnectionError) as raised:
            Transport().get(f"http://127.0.0.1:{port}/k?{SECRET}", 0, memoryview(bytearray(1)))
    assert "hunter2" not in str(raised.value)
