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
from yarl import URL

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
from aiokv.remote.options import HttpOptions
from aiokv.remote.retry import RetryPolicy
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


class Transport:
    """A pooled aiohttp session of one event loop.

    Args:
        policy: The timeouts of an attempt.
        options: The pool's size, keep-alive and trust.

    Raises:
        ConfigurationError: `ca_file` cannot be read.
    """

    def __init__(self, policy: RetryPolicy, options: HttpOptions) -> None:
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        # In front of the pool, so that a wait for a connection can be told from a slow server.
        self._slots = asyncio.Semaphore(options.pool_size)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,
                keepalive_timeout=options.keepalive_seconds,
                ttl_dns_cache=options.dns_cache_seconds,
                ssl=_ssl_context(options.ca_file) if options.ca_file is not None else True,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=policy.connect_timeout),
            headers={"Accept": "application/json", "User-Agent": f"aiokv/{version('aiokv')}"},
        )
        # aiohttp sends an idempotent request again by itself when a connection breaks: N attempts would be up to 2N sends.
        # There is no public switch (aiohttp #9790); a test counts what is sent.
        if hasattr(self._session, "_retry_connection"):
            self._session._retry_connection = False  # noqa: SLF001

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._session.closed

    async def request(
        self, method: str, url: URL, headers: Mapping[str, str] | None, body: bytes | None, deadline: float
    ) -> Answer:
        """Send a request once.

        Args:
            method: The HTTP method.
            url: Where to, percent-encoded; a redirect is not followed.
            headers: Headers of this request.
            body: Its body.
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
            return await self._send(method, url, headers, body, deadline)
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

    async def _send(
        self, method: str, url: URL, headers: Mapping[str, str] | None, body: bytes | None, deadline: float
    ) -> Answer:
        # Anything but a GET may change something: once sent, a failure leaves its outcome open.
        write = method != "GET"
        data = io.BytesIO(body) if body is not None and len(body) > _MAX_DIRECT_BODY_BYTES else body
        allowed_until = min(deadline, self._loop.time() + self._policy.attempt_timeout)
        try:
            async with asyncio.timeout_at(allowed_until):
                response = await self._session.request(method, url, data=data, headers=headers, allow_redirects=False)
                try:
                    content = await _read(response)
                except BaseException:
                    response.close()
                    raise
                return Answer(response.status, response.headers, content)
        except TimeoutError as error:
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                raise ConnectError(f"no connection within {self._policy.connect_timeout:g} s") from error
            raise CallTimeoutError("no answer in time", maybe_applied=write) from error
        except ResponseError as error:
            error.maybe_applied = write
            raise
        except aiohttp.ClientResponseError as error:
            # Not chained: this error alone holds the request's headers, and with them the token.
            reason = f"what came back is not an HTTP answer ({type(error).__name__})"
        except (aiohttp.ClientError, OSError) as error:
            if self._session.closed:
                raise StoreClosedError("the store was closed meanwhile", maybe_applied=write) from error
            raise _translate(error, write=write) from error
        except RuntimeError as error:
            if not self._session.closed:
                raise
            raise StoreClosedError("the store is closed") from error
        raise ResponseError(reason, maybe_applied=write)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._session.close()

    def abandon(self) -> None:
        """Let the session go without its event loop, which is closed or belongs to the process that forked this one."""
        connector = self._session.connector
        self._session.detach()
        if connector is not None:
            # Without the loop nothing can be said to the other side; this only settles the object's own state.
            connector._closed = True  # noqa: SLF001


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Read the body, an error's up to 64 KiB, a value's up to what a value can be."""
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


def _translate(error: Exception, *, write: bool) -> CallError:
    """Give our own error for one of aiohttp's, which hold no header or body."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    detail = type(cause).__name__
    if isinstance(cause, socket.gaierror | ssl.SSLError):
        # Their numbers are not the system's.
        detail = cause.strerror or detail
    elif isinstance(cause, OSError) and cause.errno:
        detail = os.strerror(cause.errno)
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return ConnectError(
            f"the server's certificate is not trusted ({error.certificate_error}); "
            "name its authority with HttpOptions(ca_file=...) or SSL_CERT_FILE",
            transient=False,
        )
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return ConnectError(f"the host name cannot be resolved ({detail})")
    if isinstance(error, aiohttp.ClientSSLError):
        return ConnectError(f"the TLS handshake failed ({detail})")
    if isinstance(error, aiohttp.ClientConnectorError):
        return ConnectError(f"no connection ({detail})")
    return TransportError(f"the connection broke ({detail})", maybe_applied=write)


def _ssl_context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"ca_file {ca_file!r} cannot be used: {error}") from error
