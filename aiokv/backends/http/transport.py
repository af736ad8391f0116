"""One HTTP request on a pooled session: an answer, or one of our own errors. Knows nothing of keys, tokens or retries."""

import asyncio
import io
import os
import socket
import ssl
from collections.abc import Mapping
from importlib.metadata import version
from typing import NamedTuple

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.errors import (
    CallError,
    CallTimeoutError,
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
_OK = 200
_LEAST_ATTEMPT_SECONDS = 0.005


class Answer(NamedTuple):
    """What came back: the status, the headers, and the body as far as it was read."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Timeouts:
    """How long an attempt may take; made once for many requests.

    Args:
        policy: Says it.
    """

    __slots__ = ("attempt_seconds", "connect_seconds", "of_session")

    def __init__(self, policy: RetryPolicy) -> None:
        self.attempt_seconds = policy.attempt_timeout
        self.connect_seconds = policy.connect_timeout
        self.of_session = aiohttp.ClientTimeout(total=None, sock_connect=policy.connect_timeout)


class Transport:
    """A pooled aiohttp session of one event loop.

    Args:
        options: The pool's size, keep-alive and trust.

    Raises:
        ConfigurationError: `ca_file` cannot be read.
    """

    def __init__(self, options: HttpOptions) -> None:
        self._loop = asyncio.get_running_loop()
        # In front of the pool, so that a wait for a connection can be told from a slow server.
        self._slots = asyncio.Semaphore(options.pool_size)
        # Those of requests under way: to close is to end them.
        self._bounds: set[asyncio.Timeout] = set()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=options.keepalive_seconds,
                ttl_dns_cache=options.dns_cache_seconds,
                ssl=_ssl_context(options.ca_file) if options.ca_file is not None else True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"Accept": "application/json", "User-Agent": f"aiokv/{version('aiokv')}"},
        )
        # aiohttp sends an idempotent request again by itself when a connection breaks: N attempts would be up to 2N sends.
        # There is no public switch (aiohttp #9790); a test counts what is sent.
        if hasattr(self._session, "_retry_connection"):
            self._session._retry_connection = False  # noqa: SLF001

    def __del__(self) -> None:
        # Let go without aclose, as when its loop is gone. An object whose constructor raised has no session.
        session: aiohttp.ClientSession | None = getattr(self, "_session", None)
        if session is not None and not session.closed:
            self.abandon()

    @property
    def busy(self) -> bool:
        """Whether a request would have to wait for its turn."""
        return self._slots.locked()

    async def request(  # noqa: PLR0913, PLR0917 (what a request is)
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | None,
        body: bytes | None,
        timeouts: Timeouts,
        deadline: float,
    ) -> Answer:
        """Send a request once.

        Args:
            method: The HTTP method.
            url: Where to, percent-encoded; a redirect is not followed.
            headers: Headers of this request.
            body: Its body.
            timeouts: How long it may take.
            deadline: The event loop's time by which the answer must be there.

        Returns:
            The answer, whatever its status; the body of an error is cut at 64 KiB.

        Raises:
            PoolTimeoutError: No connection came free before the deadline.
            ConnectError: No connection could be made.
            CallTimeoutError: The attempt's time, or the deadline, passed.
            TransportError: The connection broke.
            ResponseError: What came is not HTTP, or larger than any value can be.
            StoreClosedError: The session was closed meanwhile.
        """
        if self._slots.locked():
            await self._wait_for_slot(deadline)
        else:
            await self._slots.acquire()
        try:
            return await self._send(method, url, headers, body, timeouts, deadline)
        finally:
            self._slots.release()

    async def _wait_for_slot(self, deadline: float) -> None:
        try:
            # What is left after this would not bring a request anywhere, but would leave its outcome open.
            async with asyncio.timeout_at(deadline - _LEAST_ATTEMPT_SECONDS):
                await self._slots.acquire()
        except TimeoutError as error:
            raise PoolTimeoutError(
                "every connection of the pool stayed busy until the deadline; "
                "raise pool_size, lower concurrency, or look for a slow server"
            ) from error

    async def _send(  # noqa: PLR0913, PLR0917 (what a request is)
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str] | None,
        body: bytes | None,
        timeouts: Timeouts,
        deadline: float,
    ) -> Answer:
        # Anything but a GET may change something: once sent, a failure leaves its outcome open.
        write = method != "GET"
        data = io.BytesIO(body) if body is not None and len(body) > _MAX_DIRECT_BODY_BYTES else body
        allowed_until = min(deadline, self._loop.time() + timeouts.attempt_seconds)
        cause: Exception | None
        response: aiohttp.ClientResponse | None = None
        bound = asyncio.timeout_at(allowed_until)
        self._bounds.add(bound)
        try:
            async with bound:
                response = await self._session.request(
                    method, url, data=data, headers=headers, allow_redirects=False, timeout=timeouts.of_session
                )
                return Answer(response.status, response.headers, await _read(response))
        except CallError as error:
            error.maybe_applied = write
            raise
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            # aiohttp's error for an answer holds the request's headers, and with them the token: it is not chained.
            cause = None if isinstance(error, aiohttp.ClientResponseError) else error
            if self._session.closed:
                ours: CallError = StoreClosedError("the store was closed meanwhile", maybe_applied=write)
            else:
                ours = translated(error, timeouts, write=write)
        except RuntimeError as error:
            if not self._session.closed:
                raise
            # Before there is an answer, aiohttp says so only where it has sent nothing.
            maybe_applied = write and response is not None
            cause, ours = error, StoreClosedError("the store is closed", maybe_applied=maybe_applied)
        finally:
            self._bounds.discard(bound)
        raise ours from cause

    async def aclose(self) -> None:
        """Close every connection, and end every request that is under way."""
        await self._session.close()
        # aiohttp leaves those alone that wait for the rest of a body.
        for bound in self._bounds:
            # One whose time has just come ends by itself, and refuses another.
            if not bound.expired():
                bound.reschedule(self._loop.time())

    def abandon(self) -> None:
        """Let the session go without its event loop, which is closed or belongs to the process that forked this one."""
        connector = self._session.connector
        self._session.detach()
        if connector is not None:
            # Without the loop nothing can be said to the other side; this only settles the object's own state.
            connector._closed = True  # noqa: SLF001


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read the body; what was not read to its end is not used again."""
    try:
        return await _read_bounded(response)
    except BaseException:
        response.close()
        raise


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    """Read an error's body up to 64 KiB, a value's up to what a value can be."""
    ok = response.status == _OK
    limit_bytes = MAX_ANSWER_BYTES if ok else MAX_ERROR_BODY_BYTES
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
            raise ResponseError(f"the answer is larger than {limit_bytes:,} bytes, which no value can be")
        return body[:limit_bytes]
    response.release()
    return body


class _Meaning(NamedTuple):
    """What one of aiohttp's exceptions says of a request."""

    kind: type[CallError]
    words: str
    # Whether the other side may have seen the request.
    sent: bool
    transient: bool | None = None


_NOT_CALLABLE = _Meaning(ConnectError, "aiohttp refuses the URL", sent=False, transient=False)
_NOT_HTTP = _Meaning(ResponseError, "what came back is not an HTTP answer ({detail})", sent=True)
_NO_ANSWER = _Meaning(CallTimeoutError, "no answer in time", sent=True)
_BROKEN = _Meaning(TransportError, "the connection broke ({detail})", sent=True)

# The most special first: the first one that an exception is an instance of counts.
MEANINGS: dict[type[Exception], _Meaning] = {
    aiohttp.ConnectionTimeoutError: _Meaning(ConnectError, "no connection within {connect_seconds:g} s", sent=False),
    aiohttp.ServerTimeoutError: _NO_ANSWER,
    TimeoutError: _NO_ANSWER,
    aiohttp.ClientConnectorCertificateError: _Meaning(
        ConnectError,
        "the server's certificate is not trusted ({detail}); name its authority with HttpOptions(ca_file=...) or SSL_CERT_FILE",
        sent=False,
        transient=False,
    ),
    aiohttp.ClientConnectorDNSError: _Meaning(ConnectError, "the host name cannot be resolved ({detail})", sent=False),
    aiohttp.ClientSSLError: _Meaning(ConnectError, "the TLS handshake failed ({detail})", sent=False),
    aiohttp.ServerFingerprintMismatch: _Meaning(ConnectError, "the certificate is another one", sent=False, transient=False),
    aiohttp.ClientConnectorError: _Meaning(ConnectError, "no connection ({detail})", sent=False),
    aiohttp.ClientResponseError: _NOT_HTTP,
    HttpProcessingError: _NOT_HTTP,
    aiohttp.InvalidURL: _NOT_CALLABLE,
    aiohttp.NonHttpUrlClientError: _NOT_CALLABLE,
    aiohttp.RedirectClientError: _NOT_CALLABLE,
    aiohttp.ClientPayloadError: _BROKEN,
    aiohttp.ClientConnectionError: _BROKEN,
    aiohttp.ClientError: _BROKEN,
    OSError: _BROKEN,
}


def translated(error: Exception, timeouts: Timeouts, *, write: bool) -> CallError:
    """Give our own error for one of aiohttp's or the system's.

    Args:
        error: Theirs.
        timeouts: Those of the request, for the message.
        write: Whether the request would have changed something.

    Returns:
        Ours, which shows no header and no body; a write that was sent may have been applied.
    """
    meaning = next(meaning for theirs, meaning in MEANINGS.items() if isinstance(error, theirs))
    words = meaning.words.format(detail=_detail(error), connect_seconds=timeouts.connect_seconds)
    return meaning.kind(words, maybe_applied=write and meaning.sent, transient=meaning.transient)


def _detail(error: Exception) -> str:
    """Say what is behind an error, in the system's words where it has any."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, socket.gaierror | ssl.SSLError):
        # Their numbers are not the system's.
        return cause.strerror or type(cause).__name__
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return type(cause).__name__


def _ssl_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"ca_file {ca_file!r} cannot be used: {error}") from error
