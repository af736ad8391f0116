"""HTTP/1.1 as a proxy sees it: one end of a connection, and heads and bodies on their way from one end to the other."""

import asyncio
import random
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Self, cast
from urllib.parse import urlsplit

from aiokv.testing.faults import Bandwidth, Latency, LatencyAfter, Plan, SlowDrip, Truncate

LOOPBACK = "127.0.0.1"
BUFFER_BYTES = 256 * 1024
FIRST_FINAL_STATUS = 200
_PIECES_PER_SECOND = 20
_SHORT_BODY_BYTES = 64 * 1024
# On, 0 seconds: closing resets the connection, whatever is still to be sent.
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)
_LINE_END = b"\r\n"
_FRAMING_HEADERS = re.compile(rb"\r\n(content-length|transfer-encoding|connection|expect):[ \t]*([^\r\n]*)", re.IGNORECASE)
_BODILESS_STATUSES = frozenset({204, 304})


class NotHttpError(Exception):
    """The bytes that arrived are not HTTP."""


class Peer(asyncio.StreamReaderProtocol):
    """One end of a connection."""

    writer: asyncio.StreamWriter

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(limit=BUFFER_BYTES, loop=loop)
        super().__init__(self.reader, loop=loop)
        self._running_loop = loop
        self._when_left: Callable[[], None] | None = None
        self.left = False
        self.half_closed = False
        self.forget: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport; see `asyncio.Protocol`."""
        super().connection_made(transport)
        # Not checked: those of other event loops derive from a class of their own.
        self.writer = asyncio.StreamWriter(cast("asyncio.Transport", transport), self, self.reader, self._running_loop)

    def eof_received(self) -> bool | None:
        """Note that the other side has sent everything; see `asyncio.Protocol`."""
        stays_open = super().eof_received()
        self._leave()
        return stays_open

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the connection has ended; see `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._leave()
        if self.forget is not None:
            self.forget()

    def _leave(self) -> None:
        if not self.left:
            self.left = True
            if self._when_left is not None:
                self._when_left()

    def when_left(self, act: Callable[[], None] | None) -> None:
        """Call a function once the other side has sent everything, at once where it has already.

        Args:
            act: The function, in place of the one before; None for none.
        """
        self._when_left = act
        if self.left and act is not None:
            act()

    def half_close(self) -> None:
        """Send no more, and go on receiving."""
        if not (self.half_closed or self.writer.transport.is_closing()):
            self.half_closed = True
            self.writer.write_eof()

    def close(self) -> None:
        """Close the connection once everything is sent."""
        self.writer.close()

    def abort(self) -> None:
        """Close the connection at once."""
        self.writer.transport.abort()

    def reset(self) -> None:
        """Reset the connection."""
        if not self.writer.transport.is_closing():
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self.writer.transport.abort()


class Body(NamedTuple):
    """The length of a body."""

    length_bytes: int | None
    chunked: bool = False

    @property
    def is_short(self) -> bool:
        """Whether the body is small enough to be forwarded in one piece."""
        return self.length_bytes is not None and self.length_bytes <= _SHORT_BODY_BYTES


class RequestHead(NamedTuple):
    """The parts of a request's head that concern a proxy."""

    method: str
    path: str
    body: Body
    keeps_alive: bool
    expects_continue: bool

    @classmethod
    def parse(cls, head: bytes) -> Self:
        """Parse a request's head.

        Args:
            head: The head with the empty line at its end.

        Returns:
            The parts.

        Raises:
            NotHttpError: It is not HTTP/1.
        """
        words = head.partition(_LINE_END)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004 (method, path, version)
            raise NotHttpError
        length_bytes, encoding, connection, expect = _framing(head)
        if encoding and not encoding.endswith(b"chunked"):
            raise NotHttpError
        body = Body(None, chunked=True) if encoding else Body(length_bytes or 0)
        return cls(words[0], words[1], body, _keeps_alive(words[2], connection), expect == b"100-continue")


class AnswerHead(NamedTuple):
    """The parts of an answer's head that concern a proxy."""

    status: int
    body: Body
    keeps_alive: bool

    @classmethod
    def parse(cls, head: bytes, method: str) -> Self:
        """Parse an answer's head.

        Args:
            head: The head with the empty line at its end.
            method: The request's method.

        Returns:
            The parts.

        Raises:
            NotHttpError: It is not HTTP/1.
        """
        words = head.partition(_LINE_END)[0].decode("latin-1").split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():  # noqa: PLR2004 (version, status)
            raise NotHttpError
        status = int(words[1])
        length_bytes, encoding, connection, _ = _framing(head)
        if method == "HEAD" or status < FIRST_FINAL_STATUS or status in _BODILESS_STATUSES:
            body = Body(0)
        elif encoding.endswith(b"chunked"):
            body = Body(None, chunked=True)
        else:
            body = Body(None if encoding else length_bytes)
        lasts = body.chunked or body.length_bytes is not None
        return cls(status, body, lasts and _keeps_alive(words[0], connection))


def _framing(head: bytes) -> tuple[int | None, bytes, bytes, bytes]:
    """Return Content-Length, Transfer-Encoding, Connection and Expect."""
    length_bytes: int | None = None
    encoding = connection = expect = b""
    for name, value in _FRAMING_HEADERS.findall(head):
        text = value.strip().lower()
        match name.lower():
            case b"content-length":
                if not text.isdigit() or length_bytes not in {None, int(text)}:
                    raise NotHttpError
                length_bytes = int(text)
            case b"transfer-encoding":
                encoding = text
            case b"connection":
                connection = text
            case _:
                expect = text
    return length_bytes, encoding, connection, expect


def _keeps_alive(version: str, connection: bytes) -> bool:
    return b"keep-alive" in connection if version == "HTTP/1.0" else b"close" not in connection


Sink = Callable[[bytes, bool], Awaitable[None]]


async def discard(_piece: bytes, _is_payload: bool) -> None:  # noqa: FBT001 (as a sink is called)
    """Drop a piece of a body."""


async def read_body(reader: asyncio.StreamReader, body: Body, sink: Sink) -> None:
    """Pass each piece of a body to a function.

    Args:
        reader: Where the body comes from.
        body: Its length.
        sink: Called with each piece, and whether it is payload rather than the framing of chunks.

    Raises:
        NotHttpError: A chunk has no length.
    """
    if not body.chunked:
        await _read_length(reader, body.length_bytes, sink)
        return
    while True:
        line = await reader.readuntil(_LINE_END)
        try:
            length_bytes = int(line.partition(b";")[0], 16)
        except ValueError:
            raise NotHttpError from None
        await sink(line, False)
        if length_bytes == 0:
            break
        await _read_length(reader, length_bytes, sink)
        await sink(await reader.readexactly(len(_LINE_END)), False)
    # Trailers, if any, and an empty line.
    while line != _LINE_END:
        line = await reader.readuntil(_LINE_END)
        await sink(line, False)


async def _read_length(reader: asyncio.StreamReader, length_bytes: int | None, sink: Sink) -> None:
    left_bytes = length_bytes
    while left_bytes != 0:
        piece = await reader.read(BUFFER_BYTES if left_bytes is None else min(BUFFER_BYTES, left_bytes))
        if not piece:
            if left_bytes is None:
                return
            raise asyncio.IncompleteReadError(b"", left_bytes)
        if left_bytes is not None:
            left_bytes -= len(piece)
        await sink(piece, True)


class _CutError(Exception):
    """End a body where it is to be cut."""


class Pacer:
    """Writes that obey a plan's latency and pace.

    Args:
        sleep: Waits for a number of seconds.
        seed: The seed of the draws of jitter.
    """

    def __init__(self, sleep: Callable[[float], Awaitable[None]], seed: int) -> None:
        self._sleep = sleep
        self._jitter = random.Random(seed)  # noqa: S311 (repeatable on purpose, guards nothing)

    async def relay(self, client: Peer, upstream: Peer, body: Body, plan: Plan) -> bool:
        """Forward a body, up to where the plan cuts it.

        Args:
            client: The receiving end.
            upstream: The sending end.
            body: The body's length.
            plan: The faults of the request.

        Returns:
            Whether the whole body was forwarded.
        """
        left_bytes = plan.terminal.kept_bytes if isinstance(plan.terminal, Truncate) else None

        async def forward(piece: bytes, is_payload: bool) -> None:  # noqa: FBT001 (of this module alone)
            nonlocal left_bytes
            if left_bytes is not None and is_payload:
                if len(piece) > left_bytes:
                    await self.write(client, piece[:left_bytes], plan.pace)
                    raise _CutError
                left_bytes -= len(piece)
            await self.write(client, piece, plan.pace)

        try:
            await read_body(upstream.reader, body, forward)
        except _CutError:
            return False
        return True

    async def write(self, side: Peer, data: bytes, pace: Bandwidth | SlowDrip | None = None) -> None:
        """Send data, at most as fast as a pace allows.

        Args:
            side: The receiving end.
            data: The data.
            pace: The pace, or None for all at once.
        """
        if pace is None:
            side.writer.write(data)
            await side.writer.drain()
            return
        piece_bytes = 1 if isinstance(pace, SlowDrip) else max(1, int(pace.bytes_per_second / _PIECES_PER_SECOND))
        for start in range(0, len(data), piece_bytes):
            piece = data[start : start + piece_bytes]
            await self._sleep(len(piece) / pace.bytes_per_second)
            side.writer.write(piece)
            await side.writer.drain()

    async def delay(self, latency: Latency | LatencyAfter | None) -> None:
        """Wait for a latency and its jitter.

        Args:
            latency: The latency, or None for none.
        """
        if latency is not None:
            await self._sleep(latency.seconds + self._jitter.uniform(0, latency.jitter_seconds))


def parse_upstream(upstream: str) -> tuple[str, int, str]:
    """Parse the address of a plain HTTP server.

    Args:
        upstream: `http://host[:port][/prefix]`.

    Returns:
        Host, port and prefix.

    Raises:
        ValueError: It is of another form; the message does not quote it.
    """
    try:
        parts = urlsplit(upstream)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme != "http" or not host or parts.query or parts.fragment or "@" in parts.netloc:
        # The message does not quote it: it may hold credentials.
        raise ValueError("upstream must be of the form http://host[:port][/prefix]; the proxy speaks no TLS")
    return host, port or 80, parts.path.rstrip("/")


def bind_loopback(port: int) -> socket.socket:
    """Bind a socket that does not listen yet; several may be bound to one port.

    Args:
        port: The port, 0 for a free one.

    Returns:
        The socket, which does not block.
    """
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((LOOPBACK, port))
    except BaseException:
        bound.close()
        raise
    return bound
