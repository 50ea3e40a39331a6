"""The fault proxy itself: each fault is what it says, and none is the default."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.services.framing import Head, Requests
from tests.services.proxy import FaultProxy, Faults


class _Counter(BaseHTTPRequestHandler):
    """Answers with the number of bytes that a request's body had."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        said = str(len(body)).encode() + b" " * 5000
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Counter)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def proxy(upstream: int) -> Iterator[FaultProxy]:
    with FaultProxy(upstream) as made:
        yield made


def put(proxy: FaultProxy, size: int = 10, *, timeout: float = 30.0) -> tuple[int, bytes]:
    """One PUT on a connection of its own: status and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=timeout)
    try:
        connection.request("PUT", "/x", body=b"P" * size)
        answer = connection.getresponse()
        return answer.status, answer.read().strip()
    finally:
        connection.close()


def test_without_faults_everything_passes(proxy: FaultProxy) -> None:
    assert put(proxy, 3_000_000) == (200, b"3000000")
    assert (proxy.requests, proxy.refused, proxy.resets) == (1, 0, 0)


def test_several_requests_on_one_connection(proxy: FaultProxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port)
    for size in (0, 1, 200_000):
        # A body that looks like a request is none.
        connection.request("PUT", "/x", body=(b"PUT / HTTP/1.1\r\n\r\n" * 20_000)[:size])
        assert connection.getresponse().read().strip() == str(size).encode()
    connection.close()
    assert proxy.requests == 3


def test_503_is_answered_with_the_probability_given(proxy: FaultProxy) -> None:
    proxy.faults = Faults(answer_503=0.5)
    answered = [put(proxy, 300_000)[0] for _ in range(40)]
    assert set(answered) == {200, 503}
    assert answered.count(503) == proxy.refused
    dice = random.Random(0)
    assert answered == [503 if dice.random() < 0.5 else 200 for _ in range(40)], "the dice are seeded"


@pytest.mark.parametrize("faults", [Faults(reset=1.0), Faults(reset_after_bytes=1000), Faults(reject=True)])
def test_a_reset_is_a_reset(proxy: FaultProxy, faults: Faults) -> None:
    proxy.faults = faults
    for _ in range(5):
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            put(proxy, 2_000_000)
    proxy.faults = Faults()
    assert put(proxy, 10) == (200, b"10")


def test_faults_for_other_methods_do_not_touch_this_one(proxy: FaultProxy) -> None:
    proxy.faults = Faults(answer_503=1.0, methods=("GET",))
    assert put(proxy)[0] == 200
    proxy.faults = Faults(answer_503=1.0, methods=("PUT",))
    assert put(proxy)[0] == 503


def test_a_held_connection_goes_on_where_it_was(proxy: FaultProxy) -> None:
    proxy.faults = Faults(hold_at_bytes=500_000)
    answers: list[tuple[int, bytes]] = []
    thread = threading.Thread(target=lambda: answers.append(put(proxy, 2_000_000)))
    thread.start()
    assert proxy.holding.wait(30.0)
    assert 500_000 <= proxy.bytes_up < 2_000_000
    with pytest.raises(TimeoutError):
        put(proxy, timeout=0.01)
    proxy.faults = Faults()
    thread.join(30.0)
    assert answers == [(200, b"2000000")]


def test_a_server_that_is_down_resets() -> None:
    with FaultProxy(1) as nowhere, pytest.raises(ConnectionResetError):
        put(nowhere)


def test_requests_are_found_whatever_the_packets_were() -> None:
    sent = (
        b"PUT /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nGET /"
        b"PUT /b HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n4\r\nPUT \r\n"
        b"10;x=y\r\n0123456789abcdef\r\n0\r\nt: u\r\n\r\n"
        b"GET /c HTTP/1.1\r\nHost: x\r\n\r\n"
        b"PUT /d HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        b"DELETE /e HTTP/1.1\r\n\r\n"
    )
    for size in (1, 2, 7, 50, len(sent)):
        requests = Requests()
        parts = [part for at in range(0, len(sent), size) for part in requests.feed(sent[at : at + size])]
        assert [part.method for part in parts if isinstance(part, Head)] == [
            "PUT",
            "PUT",
            "GET",
            "PUT",
            "DELETE",
        ]
        assert b"".join(part.raw if isinstance(part, Head) else part for part in parts) == sent
