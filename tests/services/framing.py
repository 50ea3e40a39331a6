"""Where requests begin and end in what a client sends over one connection (HTTP/1.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_HEAD_END = b"\r\n\r\n"
MAX_HEAD_BYTES = 1 << 20


@dataclass(frozen=True)
class Head:
    """The first bytes of a request, up to its empty line."""

    raw: bytes
    method: str


@dataclass
class Requests:
    """Cuts a client's bytes into heads and pieces of bodies, whatever the packets were."""

    _buffer: bytes = b""
    _body_bytes: int = 0
    _in_chunks: bool = False

    def feed(self, data: bytes) -> Iterator[Head | bytes]:
        """The heads and pieces of bodies that `data` completes, in order."""
        self._buffer += data
        while self._buffer:
            if self._body_bytes:
                piece = self._buffer[: self._body_bytes]
                self._buffer = self._buffer[len(piece) :]
                self._body_bytes -= len(piece)
                yield piece
            elif self._in_chunks:
                piece = self._chunk()
                if not piece:
                    return
                yield piece
            else:
                head = self._head()
                if head is None:
                    return
                yield head

    def _head(self) -> Head | None:
        raw, end, rest = self._buffer.partition(_HEAD_END)
        if not end:
            if len(raw) > MAX_HEAD_BYTES:
                raise ValueError("no end of a request's head in sight")
            return None
        self._buffer = rest
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in raw.split(b"\r\n")[1:])
        }
        self._body_bytes = int(fields.get(b"content-length", b"0"))
        self._in_chunks = fields.get(b"transfer-encoding", b"").lower() == b"chunked"
        return Head(raw + end, raw.split(b" ", 1)[0].decode("ascii"))

    def _chunk(self) -> bytes:
        """The line that opens a chunk; what follows it is counted like a body. Empty: more is needed."""
        line, end, rest = self._buffer.partition(b"\r\n")
        if not end:
            return b""
        size = int(line.partition(b";")[0], 16)
        if size == 0:
            trailer, empty, after = rest.partition(b"\r\n")
            if not empty:
                return b""
            # Trailers are lines up to an empty one.
            while trailer:
                line += end + trailer
                trailer, empty, after = after.partition(b"\r\n")
                if not empty:
                    return b""
            self._in_chunks = False
            self._buffer = after
            return line + end + empty
        self._buffer = rest
        self._body_bytes = size + 2
        return line + end
