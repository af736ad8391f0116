"""The HTTP service over a backend: routes, limits while the body arrives, and errors as JSON."""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Generator
from datetime import UTC, datetime
from urllib.parse import urlsplit

import orjson
from aiohttp import HttpVersion11, web

from aiokv import clock
from aiokv.backends.base import Backend
from aiokv.errors import CallError, ConfigurationError, StorageFullError, ValueTooLargeError
from aiokv.limits import DEFAULT_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.server.access import TOKEN_LIFETIME_SECONDS, AccessFile
from aiokv.wire import METHODS, TOKEN_PATH, error_body, is_loopback, parse_entry_path, parse_ttl_query, value_body

logger = logging.getLogger("aiokv.server")

BODY_TIMEOUT_SECONDS = 30.0

_JSON_HEADERS = {"Content-Type": "application/json", "Cache-Control": "no-store", "Server": "aiokv"}
_DONE_BODY = orjson.dumps({"ok": True})
_MAX_TOKEN_REQUEST_BYTES = 64 * 1024
READINESS_PROBE = ("aiokv-readiness", "probe")
"""The namespace and key that are read to find out whether the backend answers."""


class Service:
    """The wire protocol over a backend.

    Args:
        backend: The store of the values; the caller opens and closes it.
        access: The accounts, each with stores of its own. None takes any credentials or none, and answers only requests whose
            Host header is a loopback name: a web page whose own host name leads here cannot use the service.
        body_timeout_seconds: How long the body of one request may take to arrive.
    """

    def __init__(
        self, backend: Backend, access: AccessFile | None = None, *, body_timeout_seconds: float = BODY_TIMEOUT_SECONDS
    ) -> None:
        self._backend = backend
        self._access = access
        self._body_timeout_seconds = body_timeout_seconds

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answer one request.

        Args:
            request: A request of aiohttp's low-level server.

        Returns:
            The answer; every error is `{"error": "<message>"}`.
        """
        try:
            return await self._answer(request)
        except _Refusal as refusal:
            response = _error(refusal.status, refusal.message, refusal.headers)
            if "Expect" in request.headers:
                # The client may send the body or not, so the next bytes could be a body or a request.
                response.force_close()
            return response
        except ValueTooLargeError as error:
            return _error(413, error.reason)
        except StorageFullError as error:
            logger.error("%s", error)  # noqa: TRY400 (the error says all)
            return _error(507, "the store has no room left; nothing was stored")
        except (CallError, ConfigurationError) as error:
            logger.error("%s", error)  # noqa: TRY400 (the error says all)
            return _error(503, "the store cannot be reached now", {"Retry-After": "1"})
        except _ClientLeftError:
            raise
        except Exception:
            logger.exception("a request failed")
            return _error(500, "internal error")

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        # The path as it was sent: after aiohttp's decoding, different keys may look the same.
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):
            # The absolute form, which a server must accept too (RFC 9112 section 3.2.2).
            path = "/" + path.partition("://")[2].partition("/")[2]
        _check_host(request, loopback_only=self._access is None)
        verb, _, entry = path[1:].partition("/")
        if verb in METHODS and entry:
            _check_method(request, METHODS[verb])
            scope = self._scope(request)
            with _as_refusal():
                db_name, key = parse_entry_path(entry)
            return await self._entry(request, verb, scope + db_name, key, query)
        if path == TOKEN_PATH:
            _check_method(request, "POST")
            return await self._token(request)
        if path in {"/livez", "/readyz"}:
            _check_method(request, "GET")
            if path == "/readyz":
                await self._backend.get(*READINESS_PROBE)
            return _ok(_DONE_BODY)
        raise _Refusal(404, "no such path; known: /get/, /set/, /delete/ with {db_name}/{key}, /livez, /readyz")

    async def _entry(self, request: web.BaseRequest, verb: str, db_name: str, key: str, query: str) -> web.Response:
        if verb == "get":
            value = await self._backend.get(db_name, key)
            return _error(404, "no such key, or it has expired") if value is None else _ok(value_body(value))
        if verb == "set":
            with _as_refusal():
                ttl_seconds = parse_ttl_query(query)
            value = await self._read_value(request)
            await self._backend.set(db_name, key, value, DEFAULT_TTL_SECONDS if ttl_seconds is None else ttl_seconds)
        else:
            await self._backend.delete(db_name, key)
        return _ok(_DONE_BODY)

    async def _token(self, request: web.BaseRequest) -> web.Response:
        await self._read_body(request, _MAX_TOKEN_REQUEST_BYTES)
        if self._access is None:
            # The service accepts any token. Some clients need one before they send a request.
            token = secrets.token_urlsafe(32)
            expires_at = datetime.fromtimestamp(int(clock.now()) + TOKEN_LIFETIME_SECONDS, UTC)
        else:
            issued = self._access.issue_token(request.headers.get("Authorization", ""))
            if issued is None:
                raise _Refusal(
                    401,
                    "the key is not known here; expected 'Authorization: Key <id>:<secret>'",
                    {"WWW-Authenticate": "Key"},
                )
            token, expires_at = issued
        body = {
            "token": token,
            "token_type": "Bearer",
            "base_url": f"{request.scheme}://{request.host}",
            "expires_at": expires_at.isoformat(timespec="seconds"),
        }
        return _ok(orjson.dumps(body))

    def _scope(self, request: web.BaseRequest) -> str:
        """Return the prefix of the account's namespaces. It ends at the first `:`, since no account holds one."""
        if self._access is None:
            return ""
        account = self._access.account_of_token(request.headers.get("Authorization", ""))
        if account is None:
            raise _Refusal(
                401,
                f"the token is missing, expired or not from here; exchange a key for one at POST {TOKEN_PATH}",
                {"WWW-Authenticate": "Bearer"},
            )
        return f"{account}:"

    async def _read_value(self, request: web.BaseRequest) -> str:
        body = await self._read_body(request, MAX_VALUE_BYTES)
        try:
            return body.decode()
        except UnicodeDecodeError as error:
            # The new error is not chained to this one, which holds the value.
            position = error.start
        raise _Refusal(400, f"the value is not UTF-8, from byte {position} on; encode binary data as text, such as base64")

    async def _read_body(self, request: web.BaseRequest, limit_bytes: int) -> bytes:
        """Read a body that is not compressed; stop as soon as it is too long."""
        encoding = request.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            raise _Refusal(415, "the body must be sent without Content-Encoding")
        if (request.content_length or 0) > limit_bytes:
            raise _Refusal(413, _too_large(request.content_length, limit_bytes))
        if request.headers.get("Expect", "").lower() == "100-continue" and request.version >= HttpVersion11:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunks: list[bytes] = []
        size_bytes = 0
        try:
            async with asyncio.timeout(self._body_timeout_seconds):
                while chunk := await request.content.readany():
                    size_bytes += len(chunk)
                    if size_bytes > limit_bytes:
                        raise _Refusal(413, _too_large(None, limit_bytes))
                    chunks.append(chunk)
        except TimeoutError:
            raise _Refusal(408, f"the body did not arrive within {self._body_timeout_seconds:g} s") from None
        except ConnectionError:
            raise _ClientLeftError from None
        except web.RequestPayloadError:
            raise _Refusal(400, "the body is malformed") from None
        return b"".join(chunks)


class _ClientLeftError(ConnectionError):
    """The client closed the connection; aiohttp handles it as such."""


class _Refusal(Exception):  # noqa: N818 (an answer, not an error of ours)
    """An error answer that ends a request."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers or {}


@contextlib.contextmanager
def _as_refusal() -> Generator[None]:
    """Answer the ValueError of an argument check with 400 and its message."""
    try:
        yield
    except ValueError as error:
        raise _Refusal(400, str(error)) from None


def _too_large(size_bytes: int | None, limit_bytes: int) -> str:
    noun = "value" if limit_bytes == MAX_VALUE_BYTES else "body"
    size = "more than that" if size_bytes is None else f"{size_bytes:,} bytes"
    return f"{noun} is {size}, over the limit of {limit_bytes:,} bytes"


def _check_method(request: web.BaseRequest, method: str) -> None:
    if request.method != method:
        raise _Refusal(405, f"this path takes {method}", {"Allow": method})


def _check_host(request: web.BaseRequest, *, loopback_only: bool) -> None:
    if not request.host.isascii():
        raise _Refusal(400, "the Host header must be ASCII")
    if not loopback_only:
        return
    # DNS rebinding: a web page whose host name leads to this address could send requests here and read the answers.
    try:
        host = urlsplit(f"//{request.host}").hostname
    except ValueError:
        host = None
    if not is_loopback(host):
        raise _Refusal(403, "without an access file this server answers to localhost, 127.0.0.1 and [::1] only")


def _ok(body: bytes) -> web.Response:
    return web.Response(body=body, headers=_JSON_HEADERS)


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> web.Response:
    response = web.Response(status=status, body=error_body(message), headers={**_JSON_HEADERS, **(headers or {})})
    if status in {408, 413}:
        # The rest of the body is not read.
        response.force_close()
    return response


class HttpServer(web.Server):
    """An aiohttp server that answers malformed HTTP with JSON, too.

    Args:
        service: The handler of all requests.
        keepalive_seconds: How long a connection may be idle, and how long the head of its first request may take.
    """

    def __init__(self, service: Service, keepalive_seconds: float) -> None:
        super().__init__(service.handle)
        self._keepalive_seconds = keepalive_seconds

    def __call__(self) -> web.RequestHandler:
        """Make the protocol of a new connection.

        Returns:
            The protocol, which decompresses nothing: the service refuses compressed bodies.
        """
        return _Protocol(
            self,
            loop=self._loop,
            keepalive_timeout=self._keepalive_seconds,
            access_log=None,  # type: ignore[arg-type]  # aiohttp takes None for "no log"
            auto_decompress=False,
            logger=logger,
        )


class _Protocol(web.RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        # aiohttp's message quotes the request, which may hold a secret.
        logger.debug("refused a malformed request: %s", type(exc).__name__, extra={"status": status})
        del request, message
        response = _error(status, "the request is not well-formed HTTP, or its head is too long")
        response.force_close()
        return response
