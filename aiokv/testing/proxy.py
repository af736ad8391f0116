"""A proxy that does to each request what a bad network, or a bad service, would do."""

import asyncio
import contextlib
import functools
import random
import re
import socket
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from aiokv.testing.faults import (
    Bandwidth,
    Course,
    Ending,
    Fault,
    Faults,
    Garbage,
    Latency,
    LatencyAfter,
    RequestSeen,
    ResetAfter,
    ResetBefore,
    SlowDrip,
    Stall,
    StallAfter,
    Truncate,
    course_of,
    script_of,
)

Sleep = Callable[[float], Awaitable[None]]

_HOST = "127.0.0.1"
_BACKLOG = 1024
_BUFFER_BYTES = 256 * 1024
_SHORT_BODY_BYTES = 64 * 1024
_PIECES_PER_SECOND = 20
# On, 0 seconds: the connection ends by a reset, whatever was still to be sent.
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)

_HEAD_END = b"\r\n\r\n"
_LINE_END = b"\r\n"
_FRAMING_HEADERS = re.compile(rb"\r\n(content-length|transfer-encoding|connection|expect):[ \t]*([^\r\n]*)", re.IGNORECASE)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_FIRST_FINAL_STATUS = 200
_BODILESS_STATUSES = frozenset({204, 304})

_cached_course_of = functools.lru_cache(maxsize=1024)(course_of)


class FaultProxy:
    """Stand on a free port of this machine before a plain HTTP/1.1 server, and let requests meet faults.

    What meets no fault passes as it came, byte for byte, its `Host` header included. Each client connection has an upstream
    connection of its own. Upgrades are not supported. Use it as `async with FaultProxy(...) as proxy:`.

    Args:
        upstream: The server's address, `http://host[:port][/prefix]`.
        faults: What befalls the requests to come; see `Faults`.
        seed: Where the draws of jitter begin.
        sleep: Waits for a number of seconds; `asyncio.sleep` but for tests that count what is waited for.

    Attributes:
        requests: Every request whose head was read, in that order; clear it as you like.

    Raises:
        ValueError: The upstream's address is of another form, or faults exclude each other.
        TypeError: What is given as faults cannot be some.
    """

    def __init__(self, upstream: str, *, faults: Faults = None, seed: int = 0, sleep: Sleep = asyncio.sleep) -> None:
        self._upstream_host, self._upstream_port, self._prefix = _address_of(upstream)
        self._sleep = sleep
        self._jitter = random.Random(seed)  # noqa: S311 (repeatable on purpose, guards nothing)
        self.requests: list[RequestSeen] = []
        self.faults = faults
        self._request_count = 0
        self._connection_count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reservation: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._clients: set[_Side] = set()
        self._upstreams: set[_Side] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._arriving: set[asyncio.Task[None]] = set()
        self._script_error: Exception | None = None

    async def __aenter__(self) -> Self:
        if self._reservation is not None:
            raise RuntimeError("this FaultProxy is running already; make another one")
        self._loop = asyncio.get_running_loop()
        self._script_error = None
        # Held for as long as the proxy lives, never listening: during an outage nobody else can come by the port.
        self._reservation = _bound_socket(0)
        try:
            await self._resume()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        await self.aclose()
        if self._script_error is not None and error_type is None:
            raise self._script_error

    @property
    def url(self) -> str:
        """The address for clients, with the upstream's prefix."""
        return f"http://{_HOST}:{self.port}{self._prefix}"

    @property
    def port(self) -> int:
        """The port for clients, the same through every outage."""
        if self._reservation is None:
            raise RuntimeError(_NOT_RUNNING)
        port: int = self._reservation.getsockname()[1]
        return port

    @property
    def faults(self) -> Faults:
        """What befalls the requests to come, as it was set; see `Faults`. Set it at any time, from any thread.

        Where a function of yours raises, the connection is reset, and the first such exception comes out of the `async with`.
        """
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._script = script_of("faults", faults, course_of, (Fault, tuple))
        self._faults = faults

    @property
    def listening(self) -> bool:
        """Whether connections are accepted."""
        return self._listener is not None

    @property
    def connections(self) -> int:
        """How many client connections are open."""
        return len(self._clients)

    async def stop_listening(self) -> None:
        """Begin an outage: refuse connections, and reset those that are open. Any event loop may call this."""
        await self._in_own_loop(self._stop_listening)

    async def resume(self) -> None:
        """End an outage: accept connections again, on the same port. Any event loop may call this."""
        await self._in_own_loop(self._resume)

    @contextlib.asynccontextmanager
    async def outage(self) -> AsyncGenerator[None]:
        """Refuse connections for as long as the context lasts, and reset those that are open. Any event loop may enter it."""
        await self.stop_listening()
        try:
            yield
        finally:
            await self.resume()

    async def aclose(self) -> None:
        """Reset every connection, stalled ones too, and give the port back; safe to call twice."""
        try:
            await self._stop_listening()
        finally:
            if self._reservation is not None:
                self._reservation.close()
                self._reservation = None

    async def _in_own_loop(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if self._loop is None or self._reservation is None:
            raise RuntimeError(_NOT_RUNNING)
        if self._loop is asyncio.get_running_loop():
            await work()
        else:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self._loop))

    async def _resume(self) -> None:
        if self._listener is not None:
            return
        listener = _bound_socket(self.port)
        listener.listen(_BACKLOG)
        # Not `create_server`, which loses track of a connection that it is accepting while it is closed.
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)
        self._listener = listener

    async def _stop_listening(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        cancelled: set[asyncio.Task[None]] = set()
        while self._clients or self._upstreams or self._tasks:
            for client in self._clients:
                client.reset()
            for upstream in self._upstreams:
                upstream.abort()
            # A connection that is arriving is not known to the loop yet; it finds out by itself.
            for task in self._tasks - self._arriving - cancelled:
                task.cancel()
                cancelled.add(task)
            await asyncio.sleep(0)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_BACKLOG):
            try:
                connection, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            self._connection_count += 1
            self._arriving.add(self._start(self._serve(connection, self._connection_count)))

    def _start(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work, name="aiokv fault proxy")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _serve(self, connection: socket.socket, number: int) -> None:
        """Carry one exchange after the other for a client connection."""
        try:
            connection.setblocking(False)
            _, client = await asyncio.get_running_loop().connect_accepted_socket(_Side, connection)
        except OSError:
            # Its client has left already.
            connection.close()
            return
        finally:
            self._arriving.discard(_current_task())
        _know(client, self._clients)
        line = _Line(client, number)
        try:
            while await self._exchange(line):
                pass
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, _UnreadableError):
            # One side has left in the middle or does not speak HTTP; what had arrived was handed on.
            client.close()
        except (OSError, _ResetError):
            # Likewise where the upstream cannot be reached or has broken off.
            client.reset()
        except BaseException:
            client.reset()
            raise
        else:
            client.close()
        finally:
            if line.upstream is not None:
                line.upstream.abort()

    async def _exchange(self, line: "_Line") -> bool:
        """Carry one request and its answer; say whether the connection serves for another one."""
        client = line.client
        try:
            head = await client.reader.readuntil(_HEAD_END)
        except asyncio.IncompleteReadError:
            return False
        if line.upstream is not None:
            line.upstream.when_left(None)
        request = _Request.parse(head)
        self._request_count += 1
        seen = RequestSeen(self._request_count, line.connection, request.method, request.path)
        self.requests.append(seen)
        course = self._course(seen)
        if isinstance(course.ending, ResetBefore | Stall | Garbage):
            if request.expects_continue:
                client.writer.write(_CONTINUE)
            await _read_body(client.reader, request.body, _discard)
            await self._delay(course.latency)
            return await _end(client, course.ending)

        # A short body that the client sends unasked goes in one piece with its head, a longer one while the answer may come.
        whole = request.body.is_short and not request.expects_continue
        if whole and request.body.length_bytes:
            head += await client.reader.readexactly(request.body.length_bytes)
        await self._delay(course.latency)
        upstream = await self._upstream_of(line)
        await self._write(upstream, head, course.pace if isinstance(course.pace, Bandwidth) else None)
        if whole:
            _arrived(seen, client, upstream)
            reusable = await self._answer(line, request, seen, course)
        else:
            pump = self._start(self._pump(line, request, seen, course))
            try:
                reusable = await self._answer(line, request, seen, course) and pump.done()
            finally:
                pump.cancel()
        client.when_left(None)
        # An upstream that closes an idle connection has the client know, as it would without the proxy.
        upstream.when_left(client.close)
        return reusable

    def _course(self, seen: RequestSeen) -> Course:
        try:
            seen.fault = self._script(seen)
            return _cached_course_of(seen.fault)
        except Exception as error:
            self._script_error = self._script_error or error
            raise _ResetError from error

    async def _upstream_of(self, line: "_Line") -> "_Side":
        if line.upstream is None or line.upstream.left or line.upstream.half_closed:
            if line.upstream is not None:
                line.upstream.abort()
            loop = asyncio.get_running_loop()
            _, line.upstream = await loop.create_connection(_Side, self._upstream_host, self._upstream_port)
            _know(line.upstream, self._upstreams)
        return line.upstream

    async def _pump(self, line: "_Line", request: "_Request", seen: RequestSeen, course: Course) -> None:
        """Hand the rest of a request on."""
        client, upstream = line.client, line.upstream
        if upstream is None:
            raise AssertionError("the head has gone to an upstream")
        pace = course.pace if isinstance(course.pace, Bandwidth) else None
        try:
            await _read_body(client.reader, request.body, lambda piece, _: self._write(upstream, piece, pace))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, _UnreadableError, ConnectionResetError):
            # The client's fault, or the upstream's, which may have refused the rest and whose answer counts.
            upstream.half_close()
        else:
            _arrived(seen, client, upstream)

    async def _answer(self, line: "_Line", request: "_Request", seen: RequestSeen, course: Course) -> bool:
        """Hand the answer on, or not; say whether the connection serves for another exchange."""
        client, upstream, ending = line.client, line.upstream, course.ending
        if upstream is None:
            raise AssertionError("the head has gone to an upstream")
        hidden = isinstance(ending, ResetAfter | StallAfter)
        while True:
            head = await upstream.reader.readuntil(_HEAD_END)
            answer = _Answer.parse(head, request.method)
            if answer.status >= _FIRST_FINAL_STATUS:
                break
            if request.expects_continue or not hidden:
                client.writer.write(head)
        seen.status = answer.status
        if hidden:
            await _read_body(upstream.reader, answer.body, _discard)
            await self._delay(course.latency_after)
            return await _end(client, ending)
        await self._delay(course.latency_after)
        if answer.body.is_short and course.pace is None and ending is None:
            try:
                if answer.body.length_bytes:
                    head += await upstream.reader.readexactly(answer.body.length_bytes)
            except asyncio.IncompleteReadError as error:
                client.writer.write(head + error.partial)
                raise
            await self._write(client, head)
        else:
            await self._write(client, head, course.pace)
            if not await self._relay(client, upstream, answer.body, course):
                return False
        seen.answered = True
        return request.keeps_alive and answer.keeps_alive and ending is None

    async def _relay(self, client: "_Side", upstream: "_Side", body: "_Body", course: Course) -> bool:
        """Hand a body on, up to where it is to be cut; say whether that was all of it."""
        left_bytes = course.ending.kept_bytes if isinstance(course.ending, Truncate) else None

        async def hand_on(piece: bytes, is_payload: bool) -> None:  # noqa: FBT001 (of this module alone)
            nonlocal left_bytes
            if left_bytes is not None and is_payload:
                if len(piece) > left_bytes:
                    await self._write(client, piece[:left_bytes], course.pace)
                    raise _CutError
                left_bytes -= len(piece)
            await self._write(client, piece, course.pace)

        try:
            await _read_body(upstream.reader, body, hand_on)
        except _CutError:
            return False
        return True

    async def _write(self, side: "_Side", data: bytes, pace: Bandwidth | SlowDrip | None = None) -> None:
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

    async def _delay(self, latency: Latency | LatencyAfter | None) -> None:
        if latency is not None:
            await self._sleep(latency.seconds + self._jitter.uniform(0, latency.jitter_seconds))


_NOT_RUNNING = "this FaultProxy is not running; use it as `async with FaultProxy(...) as proxy:`"


class _ResetError(Exception):
    """End a client's connection by a reset."""


class _CutError(Exception):
    """End a body where it is to be cut."""


class _UnreadableError(Exception):
    """Say that what came is not HTTP."""


class _Side(asyncio.StreamReaderProtocol):
    """One end of a connection."""

    writer: asyncio.StreamWriter

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.reader = asyncio.StreamReader(limit=_BUFFER_BYTES, loop=loop)
        super().__init__(self.reader, loop=loop)
        self._running_loop = loop
        self._when_left: Callable[[], None] | None = None
        self.left = False
        self.half_closed = False
        self.forget: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not isinstance(transport, asyncio.Transport):
            raise TypeError("a TCP connection has a transport to read from and to write to")
        self.writer = asyncio.StreamWriter(transport, self, self.reader, self._running_loop)

    def eof_received(self) -> bool | None:
        stays_open = super().eof_received()
        self._leave()
        return stays_open

    def connection_lost(self, exc: Exception | None) -> None:
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
        """Have something done once the other side has sent all that it will, at once where that is so already."""
        self._when_left = act
        if self.left and act is not None:
            act()

    def half_close(self) -> None:
        if not (self.half_closed or self.writer.transport.is_closing()):
            self.half_closed = True
            self.writer.write_eof()

    def close(self) -> None:
        self.writer.close()

    def abort(self) -> None:
        self.writer.transport.abort()

    def reset(self) -> None:
        if not self.writer.transport.is_closing():
            self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        self.writer.transport.abort()


class _Line:
    """A client connection with what serves it."""

    def __init__(self, client: _Side, connection: int) -> None:
        self.client = client
        self.connection = connection
        self.upstream: _Side | None = None


class _Body(NamedTuple):
    """How long a body is."""

    length_bytes: int | None
    chunked: bool = False

    @property
    def is_short(self) -> bool:
        return self.length_bytes is not None and self.length_bytes <= _SHORT_BODY_BYTES


class _Request(NamedTuple):
    """What of a request's head concerns a proxy."""

    method: str
    path: str
    body: _Body
    keeps_alive: bool
    expects_continue: bool

    @classmethod
    def parse(cls, head: bytes) -> Self:
        words = head.partition(_LINE_END)[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):  # noqa: PLR2004 (method, path, version)
            raise _UnreadableError
        length_bytes, encoding, connection, expect = _framing(head)
        if encoding and not encoding.endswith(b"chunked"):
            raise _UnreadableError
        body = _Body(None, chunked=True) if encoding else _Body(length_bytes or 0)
        return cls(words[0], words[1], body, _keeps_alive(words[2], connection), expect == b"100-continue")


class _Answer(NamedTuple):
    """What of an answer's head concerns a proxy."""

    status: int
    body: _Body
    keeps_alive: bool

    @classmethod
    def parse(cls, head: bytes, method: str) -> Self:
        words = head.partition(_LINE_END)[0].decode("latin-1").split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdecimal():  # noqa: PLR2004 (version, status)
            raise _UnreadableError
        status = int(words[1])
        length_bytes, encoding, connection, _ = _framing(head)
        if method == "HEAD" or status < _FIRST_FINAL_STATUS or status in _BODILESS_STATUSES:
            body = _Body(0)
        elif encoding.endswith(b"chunked"):
            body = _Body(None, chunked=True)
        else:
            body = _Body(None if encoding else length_bytes)
        lasts = body.chunked or body.length_bytes is not None
        return cls(status, body, lasts and _keeps_alive(words[0], connection))


def _framing(head: bytes) -> tuple[int | None, bytes, bytes, bytes]:
    """Read Content-Length, Transfer-Encoding, Connection and Expect."""
    length_bytes: int | None = None
    encoding = connection = expect = b""
    for name, value in _FRAMING_HEADERS.findall(head):
        text = value.strip().lower()
        match name.lower():
            case b"content-length":
                if not text.isdigit() or length_bytes not in {None, int(text)}:
                    raise _UnreadableError
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


async def _discard(_piece: bytes, _is_payload: bool) -> None:  # noqa: FBT001 (of this module alone)
    pass


async def _read_body(reader: asyncio.StreamReader, body: _Body, sink: Sink) -> None:
    """Give each piece of a body to `sink`, and whether it is payload or the framing of chunks."""
    if not body.chunked:
        await _read_length(reader, body.length_bytes, sink)
        return
    while True:
        line = await reader.readuntil(_LINE_END)
        try:
            length_bytes = int(line.partition(b";")[0], 16)
        except ValueError:
            raise _UnreadableError from None
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
        piece = await reader.read(_BUFFER_BYTES if left_bytes is None else min(_BUFFER_BYTES, left_bytes))
        if not piece:
            if left_bytes is None:
                return
            raise asyncio.IncompleteReadError(b"", left_bytes)
        if left_bytes is not None:
            left_bytes -= len(piece)
        await sink(piece, True)


async def _end(client: _Side, ending: Ending | None) -> bool:
    """End an exchange that has no answer; say that the connection serves for no other one."""
    if isinstance(ending, ResetBefore | ResetAfter):
        raise _ResetError
    if isinstance(ending, Garbage):
        client.writer.write(ending.data)
        await client.writer.drain()
        return False
    while await client.reader.read(_BUFFER_BYTES):
        pass
    return False


def _arrived(seen: RequestSeen, client: _Side, upstream: _Side) -> None:
    seen.reached_upstream = True
    # A client that leaves has the upstream know, as it would without the proxy; not before all of its request is there.
    client.when_left(upstream.half_close)


def _current_task() -> "asyncio.Task[None]":
    task = asyncio.current_task()
    if task is None:
        raise AssertionError("a connection is served by a task")
    return task


def _know(side: _Side, sides: set[_Side]) -> None:
    sides.add(side)
    side.forget = lambda: sides.discard(side)


def _bound_socket(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setblocking(False)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind((_HOST, port))
    except BaseException:
        bound.close()
        raise
    return bound


def _address_of(upstream: str) -> tuple[str, int, str]:
    try:
        parts = urlsplit(upstream)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme != "http" or not host or parts.query or parts.fragment or "@" in parts.netloc:
        # Not repeated: it may hold credentials.
        raise ValueError("upstream must be of the form http://host[:port][/prefix]; the proxy speaks no TLS")
    return host, port or 80, parts.path.rstrip("/")
