"""One HTTP request on a pooled session: an answer, or an error of aiokv. It knows nothing of keys, tokens or retries."""

import asyncio
import contextlib
import io
import ssl
from collections.abc import AsyncGenerator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from aiokv.backends.base import is_patient
from aiokv.backends.http.aiohttp_errors import map_error
from aiokv.backends.http.availability import Availability
from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import RetryPolicy, has_backoff
from aiokv.backends.http.room import Room
from aiokv.backends.http.stream import Stream
from aiokv.deadlines import Bound, SharedDeadline
from aiokv.errors import (
    CallError,
    ConfigurationError,
    ConnectError,
    PoolTimeoutError,
    ResponseError,
    StoreClosedError,
    TransportError,
)
from aiokv.wire import MAX_ANSWER_BYTES, MAX_ERROR_BODY_BYTES

# aiohttp warns of a longer body passed as bytes, since it is written in one piece.
_MAX_DIRECT_BODY_BYTES = 2**20
# A third of what a server of ours holds of large bodies, so that three busy processes share it without being refused.
_LARGE_ROOM_BYTES = 16 * 2**20
_OK = 200
_LEAST_ATTEMPT_SECONDS = 0.005
# A shared deadline may be so much later than the call's own.
_DEADLINE_SLACK_SECONDS = 0.001
_MAX_DEADLINES = 64


class Request:
    """A request; a plain class, since a named tuple costs five times as much to make.

    Args:
        method: The HTTP method.
        url: The address, percent-encoded; a redirect is not followed.
        body: The body.
        write: Whether it changes something: once it is sent, a failure leaves its outcome unknown.

    Attributes:
        max_answer_bytes: The largest body of an answer with status 200.
    """

    max_answer_bytes = MAX_ANSWER_BYTES

    def __init__(self, method: str, url: URL, body: bytes | None = None, *, write: bool) -> None:
        self.method = method
        self.url = url
        self.body = body
        self.write = write


class Answer(NamedTuple):
    """An answer: the status, the headers, and the body as far as it was read."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Timeouts:
    """How long an attempt may take; made once for many requests.

    Args:
        policy: The retry policy that holds the limits.
    """

    __slots__ = ("attempt_seconds", "connect_seconds", "of_session", "ready_seconds")

    def __init__(self, policy: RetryPolicy) -> None:
        # That of most attempts: later ones may have less.
        self.attempt_seconds = min(policy.attempt_timeout, policy.total_timeout)
        self.connect_seconds = policy.connect_timeout
        self.ready_seconds = policy.wait_for_ready
        self.of_session = aiohttp.ClientTimeout(total=None, sock_connect=policy.connect_timeout)


class _Connector(aiohttp.TCPConnector):
    """A connection pool that remembers which tasks failed to get a new connection, and so have sent nothing."""

    def __init__(self, options: HttpOptions) -> None:
        super().__init__(
            limit=0,
            keepalive_timeout=options.keepalive_seconds,
            ttl_dns_cache=options.dns_cache_seconds,
            ssl=_ssl_context(options.ca_file) if options.ca_file is not None else True,
        )
        self.unconnected: set[asyncio.Task[Any] | None] = set()

    async def _create_connection(self, req: aiohttp.ClientRequest, traces: Any, timeout: Any) -> Any:  # noqa: ASYNC109
        # The one method that every connector must have of its own, called for new connections only.
        try:
            return await super()._create_connection(req, traces, timeout)
        except BaseException:
            self.unconnected.add(asyncio.current_task())
            raise


class Transport:
    """A pooled aiohttp session of one event loop.

    Args:
        options: The pool's size, keep-alive and trust.

    Raises:
        ConfigurationError: `ca_file` cannot be read.
    """

    def __init__(self, options: HttpOptions) -> None:
        self._loop = asyncio.get_running_loop()
        # In front of the pool: so a wait for a connection and a slow server are different errors.
        self._slots = asyncio.Semaphore(options.pool_size)
        self._room = Room(_LARGE_ROOM_BYTES)
        # Of the requests under way, which closing brings forward: by their length, and those that are shorter.
        self._deadlines: dict[float, SharedDeadline] = {}
        self._timeouts: set[asyncio.Timeout] = set()
        self._waited_for: set[Availability] = set()
        self._connector = _Connector(options)
        self._session = aiohttp.ClientSession(
            connector=self._connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "User-Agent": f"aiokv/{version('aiokv')}"},
        )
        # By itself aiohttp sends an idempotent request again when a connection breaks: N attempts would be up to 2N sends.
        # There is no public switch (aiohttp #9790); a test counts what is sent.
        if hasattr(self._session, "_retry_connection"):
            self._session._retry_connection = False  # noqa: SLF001

    def __del__(self) -> None:
        # Dropped without aclose, as when its loop is gone. An object whose constructor raised has no session.
        session: aiohttp.ClientSession | None = getattr(self, "_session", None)
        if session is not None and not session.closed:
            self.abandon()

    @property
    def busy(self) -> bool:
        """Whether a new request would have to wait for a connection."""
        return self._slots.locked()

    async def request(
        self, request: Request, headers: Mapping[str, str], timeouts: Timeouts, deadline: float, host: Availability
    ) -> Answer:
        """Send a request once, as soon as its host takes connections.

        Args:
            request: The request.
            headers: Its headers.
            timeouts: The limits of one attempt.
            deadline: The event loop's time by which the answer must have arrived.
            host: What is known of the host of the address.

        Returns:
            The answer, whatever its status; the body of an error is cut at 64 KiB.

        Raises:
            PoolTimeoutError: No connection came free before the deadline.
            ConnectError: No connection could be made, and the host was waited for; `attempts` is 0 where none was tried.
            CallTimeoutError: The attempt's time or the deadline passed.
            TransportError: The connection broke.
            ResponseError: The answer is not HTTP, or too large.
            StoreClosedError: The session was closed meanwhile.
        """
        refused: ConnectError | None = None
        while True:
            if not host.is_open:
                await self._wait_for_host(host, timeouts, deadline, refused)
            must_wait = self._slots.locked()
            if must_wait:
                await self._wait_for_slot(deadline)
            else:
                await self._slots.acquire()
            generation = host.generation
            try:
                if must_wait and host.blocks(_ready_seconds(timeouts)):
                    # The host was lost meanwhile.
                    continue
                answer = await self._send(request, headers, timeouts, deadline)
            except ConnectError as error:
                error.attempts = 1
                if not error.transient:
                    raise
                host.refused(error.reason)
                refused = error
            except TransportError as error:
                error.broke_with_host = host.broke(generation)
                raise
            else:
                if not host.is_well:
                    host.answered(generation)
                return answer
            finally:
                self._slots.release()

    async def request_large(
        self, request: Request, headers: Mapping[str, str], timeouts: Timeouts, deadline: float, host: Availability
    ) -> Answer:
        """Send a request with a body over `room.LARGE_BYTES`, once there is room for it; else as `request`.

        Args:
            request: As for `request`.
            headers: As for `request`.
            timeouts: As for `request`.
            deadline: As for `request`.
            host: As for `request`.

        Returns:
            The answer.

        Raises:
            CallError: As for `request`; also where other large bodies were under way until the deadline.
        """
        size_bytes = len(request.body or b"")
        await self._room.take(size_bytes, deadline - _LEAST_ATTEMPT_SECONDS)
        try:
            return await self.request(request, headers, timeouts, deadline, host)
        finally:
            self._room.give_back(size_bytes)

    async def open_stream(self, request: Request, headers: Mapping[str, str], timeouts: Timeouts, host: Availability) -> Stream:
        """Send a request on a connection of its own, beside those of the pool, and wait for the head of the answer.

        Args:
            request: A request that changes nothing.
            headers: Its headers.
            timeouts: The limits of one attempt.
            host: What is known of the host of the address.

        Returns:
            The answer, whatever its status.

        Raises:
            CallError: There was none, as for `request`.
        """
        deadline = self._loop.time() + timeouts.attempt_seconds
        if not host.is_open:
            await self._wait_for_host(host, timeouts, deadline, None)
        generation = host.generation
        try:
            async with self._timeout_at(deadline):
                response = await self._session.request(
                    request.method, request.url, headers=headers, allow_redirects=False, timeout=timeouts.of_session
                )
        except (aiohttp.ClientError, HttpProcessingError, OSError, RuntimeError) as error:
            if self._session.closed:
                raise StoreClosedError("the store was closed meanwhile") from error
            if isinstance(error, RuntimeError):
                raise
            ours = map_error(error, timeouts.connect_seconds, write=False)
            # aiohttp's error for an answer holds the request's headers, and with them the token: it is not chained.
            cause = None if isinstance(error, aiohttp.ClientResponseError) else error
        else:
            if not host.is_well:
                host.answered(generation)
            return Stream(response, lambda: self._session.closed)
        finally:
            self._connector.unconnected.discard(asyncio.current_task())
        if isinstance(ours, ConnectError) and ours.transient:
            host.refused(ours.reason)
        elif isinstance(ours, TransportError):
            host.broke(generation)
        raise ours from cause

    async def _wait_for_host(
        self, host: Availability, timeouts: Timeouts, deadline: float, refused: ConnectError | None
    ) -> None:
        """Wait until a host takes connections; raise what it refused this call with where that takes too long."""
        ready_seconds = _ready_seconds(timeouts)
        allowed_seconds = deadline - _LEAST_ATTEMPT_SECONDS - self._loop.time()
        self._waited_for.add(host)
        if await host.wait(ready_seconds, allowed_seconds, timeouts.connect_seconds, lambda: self._session.closed):
            return
        if self._session.closed:
            raise StoreClosedError("the store was closed meanwhile")
        if refused is not None:
            raise refused
        raise ConnectError(f"{host.away()}; calls fail at once, but for one that looks now and then, until the host is back")

    async def _wait_for_slot(self, deadline: float) -> None:
        try:
            # A request with less time than this would not get an answer, and its outcome would be unknown.
            async with asyncio.timeout_at(deadline - _LEAST_ATTEMPT_SECONDS):
                await self._slots.acquire()
        except TimeoutError as error:
            raise PoolTimeoutError(
                "every connection of the pool stayed busy until the deadline; "
                "raise pool_size, lower concurrency, or look for a slow server"
            ) from error

    async def _send(self, request: Request, headers: Mapping[str, str], timeouts: Timeouts, deadline: float) -> Answer:
        method, url, body, write = request.method, request.url, request.body, request.write
        data = io.BytesIO(body) if body is not None and len(body) > _MAX_DIRECT_BODY_BYTES else body
        cause: Exception | None
        response: aiohttp.ClientResponse | None = None
        seconds = timeouts.attempt_seconds
        try:
            if deadline - self._loop.time() > seconds - _DEADLINE_SLACK_SECONDS:
                with Bound(self._deadlines.get(seconds) or self._deadline(seconds)):
                    response = await self._session.request(
                        method, url, data=data, headers=headers, allow_redirects=False, timeout=timeouts.of_session
                    )
                    return Answer(response.status, response.headers, await _read(response, request.max_answer_bytes))
            async with self._timeout_at(deadline):
                response = await self._session.request(
                    method, url, data=data, headers=headers, allow_redirects=False, timeout=timeouts.of_session
                )
                return Answer(response.status, response.headers, await _read(response, request.max_answer_bytes))
        except CallError as error:
            error.maybe_applied = write
            raise
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            # aiohttp's error for an answer holds the request's headers, and with them the token: it is not chained.
            cause = None if isinstance(error, aiohttp.ClientResponseError) else error
            connected = asyncio.current_task() not in self._connector.unconnected
            if self._session.closed:
                ours: CallError = StoreClosedError("the store was closed meanwhile", maybe_applied=write and connected)
            else:
                plain = url.scheme == "http"
                ours = map_error(error, timeouts.connect_seconds, write=write, connected=connected, plain=plain)
        except RuntimeError as error:
            if not self._session.closed:
                raise
            # Before there is an answer, aiohttp raises this only where it has sent nothing.
            maybe_applied = write and response is not None
            cause, ours = error, StoreClosedError("the store is closed", maybe_applied=maybe_applied)
        finally:
            if self._connector.unconnected:
                self._connector.unconnected.discard(asyncio.current_task())
        raise ours from cause

    def _deadline(self, seconds: float) -> SharedDeadline:
        if len(self._deadlines) >= _MAX_DEADLINES:
            # A program that computes its timeouts never comes back to most of them.
            self._deadlines = {length: deadline for length, deadline in self._deadlines.items() if deadline.waiting}
        return self._deadlines.setdefault(seconds, SharedDeadline(seconds))

    @contextlib.asynccontextmanager
    async def _timeout_at(self, deadline: float) -> AsyncGenerator[None]:
        """Bound an attempt that has less time than most, so that it cannot share their timer."""
        timeout = asyncio.timeout_at(deadline)
        self._timeouts.add(timeout)
        try:
            async with timeout:
                yield
        finally:
            self._timeouts.discard(timeout)

    async def aclose(self) -> None:
        """Close every connection and end every request that is under way."""
        await self._session.close()
        for host in self._waited_for:
            host.wake()
        # aiohttp does not end requests that wait for the rest of a body.
        for deadline in self._deadlines.values():
            deadline.expire()
        for timeout in self._timeouts:
            # An expired timeout cannot be rescheduled; its request is ending anyway.
            if not timeout.expired():
                timeout.reschedule(self._loop.time())

    def abandon(self) -> None:
        """Drop the session without its event loop, which is closed or belongs to the process that forked this one."""
        connector = self._session.connector
        self._session.detach()
        if connector is not None:
            # Without the loop nothing can be sent; this only keeps the object from warning that it is open.
            connector._closed = True  # noqa: SLF001


def _ready_seconds(timeouts: Timeouts) -> float:
    """Return how long the running call waits for a host that takes no connections."""
    return timeouts.ready_seconds if is_patient.get() and has_backoff() else 0.0


async def _read(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Read the body; close a connection whose answer was not read to its end."""
    try:
        return await _read_bounded(response, limit_bytes)
    except BaseException:
        response.close()
        raise


async def _read_bounded(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """Read an error's body up to 64 KiB, another's up to what its call allows."""
    ok = response.status == _OK
    if not ok:
        limit_bytes = MAX_ERROR_BODY_BYTES
    content = response.content
    body = await content.readany()
    if not content.at_eof():
        chunks, size_bytes = [body], len(body)
        while size_bytes <= limit_bytes and (chunk := await content.readany()):
            chunks.append(chunk)
            size_bytes += len(chunk)
        body = b"".join(chunks)
    if len(body) > limit_bytes:
        response.close()
        if ok:
            raise ResponseError(f"the answer is larger than {limit_bytes:,} bytes, which no answer of this call can be")
        return body[:limit_bytes]
    response.release()
    return body


def _ssl_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"ca_file {ca_file!r} cannot be used: {error}") from error
