"""A proxy that treats each request as a bad network, or a bad service, would."""

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, Self

from aiokv.testing.faults import (
    Bandwidth,
    Fault,
    Faults,
    Garbage,
    Plan,
    RecordedRequest,
    ResetAfter,
    ResetBefore,
    Stall,
    StallAfter,
    TerminalFault,
    plan_of,
    script_of,
)
from aiokv.testing.http_relay import (
    BUFFER_BYTES,
    FIRST_FINAL_STATUS,
    LOOPBACK,
    AnswerHead,
    NotHttpError,
    Pacer,
    Peer,
    RequestHead,
    bind_loopback,
    discard,
    parse_upstream,
    read_body,
)

Sleep = Callable[[float], Awaitable[None]]

_BACKLOG = 1024

_HEAD_END = b"\r\n\r\n"
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_cached_plan_of = functools.lru_cache(maxsize=1024)(plan_of)


class FaultProxy:
    """A proxy on a free port of this machine, in front of a plain HTTP/1.1 server, that applies faults to requests.

    A request without a fault is forwarded byte for byte, its `Host` header included. Each client connection has an upstream
    connection of its own. Upgrades are not supported. Use it as `async with FaultProxy(...) as proxy:`.

    Args:
        upstream: The server's address, `http://host[:port][/prefix]`.
        faults: What is applied to the coming requests; see `Faults`.
        seed: The seed of the draws of jitter.
        sleep: Waits for a number of seconds; `asyncio.sleep` except in tests that count the waits.

    Attributes:
        requests: Every request whose head was read, in that order; clear it as you like.

    Raises:
        ValueError: The upstream's address is of another form, or faults exclude each other.
        TypeError: `faults` has none of the forms of `Faults`.
    """

    def __init__(self, upstream: str, *, faults: Faults = None, seed: int = 0, sleep: Sleep = asyncio.sleep) -> None:
        self._upstream_host, self._upstream_port, self._prefix = parse_upstream(upstream)
        self._pacer = Pacer(sleep, seed)
        self.requests: list[RecordedRequest] = []
        self.faults = faults
        self._request_count = 0
        self._connection_count = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reservation: socket.socket | None = None
        self._listener: socket.socket | None = None
        self._clients: set[Peer] = set()
        self._upstreams: set[Peer] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._arriving: set[asyncio.Task[None]] = set()
        self._script_error: Exception | None = None

    async def __aenter__(self) -> Self:
        if self._reservation is not None:
            raise RuntimeError("this FaultProxy is running already; make another one")
        self._loop = asyncio.get_running_loop()
        self._script_error = None
        # Bound for as long as the proxy lives, never listening: so no other process gets the port during an outage.
        self._reservation = bind_loopback(0)
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
        return f"http://{LOOPBACK}:{self.port}{self._prefix}"

    @property
    def port(self) -> int:
        """The port for clients, the same through every outage."""
        if self._reservation is None:
            raise RuntimeError(_NOT_RUNNING)
        port: int = self._reservation.getsockname()[1]
        return port

    @property
    def faults(self) -> Faults:
        """What is applied to the coming requests; see `Faults`. Set it at any time, from any thread.

        Where your function raises, the connection is reset, and the `async with` raises the first such exception at its end.
        """
        return self._faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._script = script_of("faults", faults, plan_of, (Fault, tuple))
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
        """Begin an outage: refuse connections and reset open ones. Any event loop may call this."""
        await self._in_own_loop(self._stop_listening)

    async def resume(self) -> None:
        """End an outage: accept connections again, on the same port. Any event loop may call this."""
        await self._in_own_loop(self._resume)

    @contextlib.asynccontextmanager
    async def outage(self) -> AsyncGenerator[None]:
        """Refuse connections for as long as the context lasts, and reset open ones. Any event loop may enter it."""
        await self.stop_listening()
        try:
            yield
        finally:
            await self.resume()

    async def aclose(self) -> None:
        """Reset every connection, stalled ones too, and release the port; safe to call twice."""
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
        listener = bind_loopback(self.port)
        listener.listen(_BACKLOG)
        # Not `create_server`: when closed, it forgets a connection that it is accepting.
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
            # A connection that is being accepted cannot be cancelled yet; it ends by itself.
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
        """Forward one exchange after the other for a client connection."""
        try:
            connection.setblocking(False)
            _, client = await asyncio.get_running_loop().connect_accepted_socket(Peer, connection)
        except OSError:
            # The client has left already.
            connection.close()
            return
        finally:
            self._arriving.discard(_current_task())
        _register(client, self._clients)
        route = _Route(client, number)
        try:
            while await self._exchange(route):
                pass
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, NotHttpError):
            # One side has left in the middle or does not speak HTTP; everything that had arrived was forwarded.
            client.close()
        except (OSError, _ResetError):
            # The upstream cannot be reached or has broken the connection, or the fault is a reset.
            client.reset()
        except BaseException:
            client.reset()
            raise
        else:
            client.close()
        finally:
            if route.upstream is not None:
                route.upstream.abort()

    async def _exchange(self, route: "_Route") -> bool:
        """Forward one request and its answer; return whether the connection can be used again."""
        client = route.client
        try:
            head = await client.reader.readuntil(_HEAD_END)
        except asyncio.IncompleteReadError:
            return False
        if route.upstream is not None:
            route.upstream.when_left(None)
        request = RequestHead.parse(head)
        self._request_count += 1
        seen = RecordedRequest(self._request_count, route.connection, request.method, request.path)
        self.requests.append(seen)
        plan = self._plan(seen)
        if isinstance(plan.terminal, ResetBefore | Stall | Garbage):
            if request.expects_continue:
                client.writer.write(_CONTINUE)
            await read_body(client.reader, request.body, discard)
            await self._pacer.delay(plan.latency)
            return await _end(client, plan.terminal)

        # A short body is forwarded in one piece with its head, a longer one while the answer may arrive.
        whole = request.body.is_short and not request.expects_continue
        if whole and request.body.length_bytes:
            head += await client.reader.readexactly(request.body.length_bytes)
        await self._pacer.delay(plan.latency)
        upstream = await self._upstream_of(route)
        await self._pacer.write(upstream, head, plan.pace if isinstance(plan.pace, Bandwidth) else None)
        if whole:
            _arrived(seen, client, upstream)
            reusable = await self._answer(route, request, seen, plan)
        else:
            pump = self._start(self._pump(route, request, seen, plan))
            try:
                reusable = await self._answer(route, request, seen, plan) and pump.done()
            finally:
                pump.cancel()
        client.when_left(None)
        # Where the upstream closes an idle connection, the client sees that, as it would without the proxy.
        upstream.when_left(client.close)
        return reusable

    def _plan(self, seen: RecordedRequest) -> Plan:
        try:
            seen.fault = self._script(seen)
            return _cached_plan_of(seen.fault)
        except Exception as error:
            self._script_error = self._script_error or error
            raise _ResetError from error

    async def _upstream_of(self, route: "_Route") -> "Peer":
        if route.upstream is None or route.upstream.left or route.upstream.half_closed:
            if route.upstream is not None:
                route.upstream.abort()
            loop = asyncio.get_running_loop()
            _, route.upstream = await loop.create_connection(Peer, self._upstream_host, self._upstream_port)
            _register(route.upstream, self._upstreams)
        return route.upstream

    async def _pump(self, route: "_Route", request: "RequestHead", seen: RecordedRequest, plan: Plan) -> None:
        """Forward the rest of a request."""
        client, upstream = route.client, route.upstream
        if upstream is None:
            raise AssertionError("the head was sent to an upstream")
        pace = plan.pace if isinstance(plan.pace, Bandwidth) else None
        try:
            await read_body(client.reader, request.body, lambda piece, _: self._pacer.write(upstream, piece, pace))
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, NotHttpError, ConnectionResetError):
            # The client has left, or the upstream has refused the rest; then its answer counts.
            upstream.half_close()
        else:
            _arrived(seen, client, upstream)

    async def _answer(self, route: "_Route", request: "RequestHead", seen: RecordedRequest, plan: Plan) -> bool:
        """Forward the answer, or not; return whether the connection can be used again."""
        client, upstream, ending = route.client, route.upstream, plan.terminal
        if upstream is None:
            raise AssertionError("the head was sent to an upstream")
        hidden = isinstance(ending, ResetAfter | StallAfter)
        while True:
            head = await upstream.reader.readuntil(_HEAD_END)
            answer = AnswerHead.parse(head, request.method)
            if answer.status >= FIRST_FINAL_STATUS:
                break
            if request.expects_continue or not hidden:
                client.writer.write(head)
        seen.status = answer.status
        if hidden:
            await read_body(upstream.reader, answer.body, discard)
            await self._pacer.delay(plan.latency_after)
            return await _end(client, ending)
        await self._pacer.delay(plan.latency_after)
        if answer.body.is_short and plan.pace is None and ending is None:
            try:
                if answer.body.length_bytes:
                    head += await upstream.reader.readexactly(answer.body.length_bytes)
            except asyncio.IncompleteReadError as error:
                client.writer.write(head + error.partial)
                raise
            await self._pacer.write(client, head)
        else:
            await self._pacer.write(client, head, plan.pace)
            if not await self._pacer.relay(client, upstream, answer.body, plan):
                return False
        seen.answered = True
        return request.keeps_alive and answer.keeps_alive and ending is None


_NOT_RUNNING = "this FaultProxy is not running; use it as `async with FaultProxy(...) as proxy:`"


class _ResetError(Exception):
    """End a client's connection by a reset."""


class _Route:
    """A client connection and its upstream connection."""

    def __init__(self, client: Peer, connection: int) -> None:
        self.client = client
        self.connection = connection
        self.upstream: Peer | None = None


async def _end(client: Peer, ending: TerminalFault | None) -> bool:
    """End an exchange without an answer; return False, since the connection cannot be used again."""
    if isinstance(ending, ResetBefore | ResetAfter):
        raise _ResetError
    if isinstance(ending, Garbage):
        client.writer.write(ending.data)
        await client.writer.drain()
        return False
    while await client.reader.read(BUFFER_BYTES):
        pass
    return False


def _arrived(seen: RecordedRequest, client: Peer, upstream: Peer) -> None:
    seen.reached_upstream = True
    # Where the client leaves, the upstream sees that, as it would without the proxy, once it has the whole request.
    client.when_left(upstream.half_close)


def _current_task() -> "asyncio.Task[None]":
    task = asyncio.current_task()
    if task is None:
        raise AssertionError("a task serves a connection")
    return task


def _register(side: Peer, sides: set[Peer]) -> None:
    sides.add(side)
    side.forget = lambda: sides.discard(side)
