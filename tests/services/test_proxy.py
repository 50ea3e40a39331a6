"""The fault proxy itself: each fault is what it says, and none is the default."""

from __future__ import annotations

import asyncio
import http.client
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_only_the_answer_to_head_has_no_body(proxy: FaultProxy, method: str) -> None:
    proxy.faults = Faults(answer_503=1.0)
    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
        client.sendall(f"{method} /x HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Slow Down")
    assert (b"SlowDown" in body) == (method == "GET")


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


class Time:
    """A clock that only the proxy's own sleeping moves, to the end of the latest sleep."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, secs: float) -> None:
        self.pauses.append(secs)
        until = self.now + secs
        await asyncio.sleep(0)
        self.now = max(self.now, until)


def test_bytes_pass_at_the_rate_given(upstream: int) -> None:
    """Both directions count, heads too; the pauses make up the whole time that they may take."""
    time = Time()
    with FaultProxy(upstream, clock=time.clock, sleep=time.sleep) as proxy:
        assert put(proxy, 3_000_000) == (200, b"3000000")
        assert time.pauses == [], "no rate, no pause"
        proxy.faults = Faults(bytes_per_sec=5e6)
        assert put(proxy, 3_000_000) == (200, b"3000000")
        passed = (time.now - 100.0) * 5e6
        assert 3_005_000 < passed < 3_006_000, "body, answer of 5,007 bytes, and two heads"
        assert sum(time.pauses) == pytest.approx(time.now - 100.0)
        assert len(time.pauses) > 20, "in pieces: one pause for all of it would look like a hang"


def test_all_connections_share_the_rate(upstream: int) -> None:
    time = Time()
    with FaultProxy(upstream, clock=time.clock, sleep=time.sleep) as proxy:
        proxy.faults = Faults(bytes_per_sec=1e6)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: put(proxy, 1_000_000), range(4)))
    assert answers == [(200, b"1000000")] * 4
    assert 4.02 < time.now - 100.0 < 4.03, "four times as many bytes, four times as long"


def test_time_without_traffic_is_not_saved_up(upstream: int) -> None:
    time = Time()
    with FaultProxy(upstream, clock=time.clock, sleep=time.sleep) as proxy:
        proxy.faults = Faults(bytes_per_sec=1e6)
        put(proxy, 1_000_000)
        first = time.now - 100.0
        time.now += 1000.0
        put(proxy, 1_000_000)
        assert time.now - 1100.0 - first == pytest.approx(first, rel=1e-3)


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
