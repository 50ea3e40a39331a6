"""A proxy on loopback that does to S3 requests what networks and overloaded servers do.

It runs in a thread of the tests, which change `faults` and read the counters while it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from tests.services.framing import Head, Requests

CHUNK_BYTES = 1 << 17

_BODY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>injected</Message></Error>'
_SLOW_DOWN = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n" % len(_BODY)
)


@dataclass(frozen=True)
class Faults:
    """What goes wrong. Probabilities are per request, drawn from the proxy's seeded dice.

    Attributes:
        latency_secs: added to every request.
        bytes_per_sec: for both directions and all connections together; 0 is unlimited.
        answer_503: probability that a request is answered 503 SlowDown and goes no further.
        reset: probability that the connection is reset in the middle of a request or of its answer.
        reset_after_bytes: reset a connection once a request's body is so long; 0 never does.
        reject: reset every connection, old and new.
        blackhole: take everything, pass nothing on, answer nothing; goes on where it was when lifted.
        hold_at_bytes: turn into a blackhole by itself, once so many bytes of bodies went up; 0 never does.
        methods: the requests that are meant, ("PUT", "POST"); empty means all.
    """

    latency_secs: float = 0.0
    bytes_per_sec: float = 0.0
    answer_503: float = 0.0
    reset: float = 0.0
    reset_after_bytes: int = 0
    reject: bool = False
    blackhole: bool = False
    hold_at_bytes: int = 0
    methods: tuple[str, ...] = ()


class FaultProxy:
    """Passes connections from its own port on to `upstream_port`, both of 127.0.0.1.

    Attributes:
        requests, refused, resets: how many came, were answered 503, met a reset.
        bytes_up: of request bodies passed on since `faults` were set.
        holding: set when `hold_at_bytes` was reached.

    Args:
        clock, sleep: what the cap on bytes a second goes by; those of the event loop if not given.
    """

    def __init__(
        self,
        upstream_port: int,
        *,
        seed: int = 0,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._upstream_port = upstream_port
        self._dice = random.Random(seed)
        self._faults = Faults()
        self._free_at = 0.0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._clock, self._sleep = clock or self._loop.time, sleep
        self._changed = asyncio.Event()
        self.requests = self.refused = self.resets = self.bytes_up = 0
        self.holding = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self._server = self._call(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def faults(self) -> Faults:
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        async def change() -> None:
            self._faults = faults
            self.bytes_up = 0
            self.holding.clear()
            self._wake()
            if faults.reject:
                for writer in list(self._writers):
                    _reset(writer)

        self._call(change())

    def close(self) -> None:
        """Stop listening and drop every connection."""

        async def finish() -> None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._call(finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30.0)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._faults.reject:
            _reset(writer)
            return
        try:
            there = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        except OSError:
            _reset(writer)  # the server is down
            return
        connection = _Connection(self, writer, there[1])
        self._writers |= {writer, there[1]}
        try:
            await asyncio.gather(connection.upwards(reader), connection.downwards(there[0]))
        except (OSError, asyncio.CancelledError):
            _reset(writer)  # as the server did, or the client; or the proxy is closed
        finally:
            for one in (writer, there[1]):
                self._writers.discard(one)
                one.close()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def meant(self, method: str) -> bool:
        return not self._faults.methods or method in self._faults.methods

    def happens(self, probability: float) -> bool:
        return probability > 0 and self._dice.random() < probability

    def pick(self, *places: int) -> int:
        """One of these numbers of bytes."""
        return self._dice.choice(places)

    async def passage(self, size: int) -> None:
        """Wait until `size` bytes may pass."""
        while self._faults.blackhole:
            await self._changed.wait()
        if rate := self._faults.bytes_per_sec:
            now = self._clock()
            self._free_at = max(now, self._free_at) + size / rate
            await self._sleep(self._free_at - now)

    def count_up(self, size: int) -> None:
        self.bytes_up += size
        if 0 < self._faults.hold_at_bytes <= self.bytes_up:
            self._faults = replace(self._faults, blackhole=True, hold_at_bytes=0)
            self.holding.set()


class _Connection:
    """One client's connection and its other half to the server."""

    def __init__(self, proxy: FaultProxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._method = ""
        self._up_bytes = self._down_bytes = 0
        self._reset_up: int | None = None
        self._reset_down: int | None = None
        self._answered = False

    async def upwards(self, reader: asyncio.StreamReader) -> None:
        """What the client sends."""
        requests = Requests()
        while data := await reader.read(CHUNK_BYTES):
            for part in requests.feed(data):
                if isinstance(part, Head):
                    if not await self._begin(part):
                        await self._swallow(reader)
                        return
                    await self._proxy.passage(len(part.raw))
                    self._server.write(part.raw)
                elif not await self._body(part):
                    return
                await self._server.drain()
        if self._server.can_write_eof():
            self._server.write_eof()

    async def downwards(self, reader: asyncio.StreamReader) -> None:
        """What the server answers."""
        while data := await reader.read(CHUNK_BYTES):
            await self._proxy.passage(len(data))
            self._down_bytes += len(data)
            if self._reset_down is not None and self._down_bytes > self._reset_down:
                self._reset()
                return
            self._client.write(data)
            await self._client.drain()
        if not self._answered:
            self._client.close()

    def _reset(self) -> None:
        self._proxy.resets += 1
        for writer in (self._client, self._server):
            _reset(writer)

    async def _begin(self, head: Head) -> bool:
        """Decide what becomes of a request; False when it has been answered already."""
        proxy, faults = self._proxy, self._proxy.faults
        proxy.requests += 1
        self._method, self._up_bytes, self._down_bytes = head.method, 0, 0
        self._reset_up = self._reset_down = None
        if not proxy.meant(head.method):
            return True
        if faults.latency_secs:
            await asyncio.sleep(faults.latency_secs)
        if proxy.happens(faults.answer_503):
            proxy.refused += 1
            self._answered = True
            # HEAD is answered without a body, or the client finds the answer broken, not the server busy.
            self._client.write(_SLOW_DOWN + (b"" if head.method == "HEAD" else _BODY))
            self._client.write_eof()
            return False
        if proxy.happens(faults.reset):
            # Whichever place is reached first: a short request arrives, and its answer is lost.
            self._reset_up, self._reset_down = proxy.pick(0, 10_000, 1_000_000), proxy.pick(0, 100)
        return True

    async def _body(self, piece: bytes) -> bool:
        """Pass a piece of a body on; False when the connection is gone."""
        await self._proxy.passage(len(piece))
        self._up_bytes += len(piece)
        if self._proxy.meant(self._method):
            after = self._proxy.faults.reset_after_bytes
            limit = min(n for n in (self._reset_up, after or None, 1 << 62) if n is not None)
            if self._up_bytes > limit:
                self._reset()
                return False
            self._proxy.count_up(len(piece))
        self._server.write(piece)
        return True

    async def _swallow(self, reader: asyncio.StreamReader) -> None:
        """Read what the client still sends: closing before would turn the answer into a reset."""
        self._server.close()
        while await reader.read(CHUNK_BYTES):
            pass


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):  # closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
