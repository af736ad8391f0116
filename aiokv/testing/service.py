"""A service that answers as it is told, and as the real one where nothing is told."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Self

import orjson
from aiohttp import web

from aiokv.backends.base import Backend, Clock
from aiokv.backends.memory import MemoryBackend
from aiokv.server.app import HttpServer, Service
from aiokv.testing.faults import script_of
from aiokv.wire import TOKEN_PATH, error_body, value_body

_HOST = "127.0.0.1"
_KEEPALIVE_SECONDS = 75.0
# What is under way when the service ends is of no use to anybody.
_DRAIN_SECONDS = 0.1
_JSON = "application/json"

RetryAfter = int | str | datetime


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of a `ScriptedService`.

    Args:
        status: The HTTP status, 200 to 599.
        body: The body.
        headers: Its headers; `Content-Type` is `application/json` where they name none.
        delay_seconds: How long the service waits before it answers.

    Raises:
        ValueError: The status or the delay is outside its range.
    """

    status: int = 200
    body: bytes = field(default=b'{"ok":true}', repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    delay_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not 200 <= self.status <= 599:  # noqa: PLR2004 (RFC 9110 section 15, without the interim ones)
            raise ValueError(f"status must be from 200 to 599, not {self.status!r}")
        if not self.delay_seconds >= 0:
            raise ValueError(f"delay_seconds must be 0 or more, not {self.delay_seconds!r}")

    @classmethod
    def value(cls, value: str) -> Self:
        """Make the answer of a `get` that finds a value.

        Args:
            value: The value.

        Returns:
            A 200.
        """
        return cls(body=value_body(value))

    @classmethod
    def done(cls) -> Self:
        """Make the answer of a `set` or `delete` that is said to have succeeded; nothing is stored.

        Returns:
            A 200.
        """
        return cls()

    @classmethod
    def error(cls, status: int, message: str = "scripted", *, retry_after: RetryAfter | None = None) -> Self:
        """Make an error as the service words it.

        Args:
            status: The HTTP status, 400 to 599.
            message: What stands under `error`.
            retry_after: Seconds, a moment with a time zone, or the header's text as it is; None leaves the header out.

        Returns:
            The error, as JSON.

        Raises:
            ValueError: The status is outside its range, or the moment has no time zone.
        """
        if not 400 <= status <= 599:  # noqa: PLR2004 (RFC 9110 section 15)
            raise ValueError(f"the status of an error must be from 400 to 599, not {status!r}")
        headers = {} if retry_after is None else {"Retry-After": _retry_after_text(retry_after)}
        return cls(status, error_body(message), headers)

    @classmethod
    def throttled(cls, retry_after: RetryAfter | None = 1) -> Self:
        """Make a 429.

        Args:
            retry_after: As for `error`.

        Returns:
            The error.
        """
        return cls.error(429, "too many requests", retry_after=retry_after)

    @classmethod
    def unavailable(cls, retry_after: RetryAfter | None = None) -> Self:
        """Make a 503.

        Args:
            retry_after: As for `error`.

        Returns:
            The error.
        """
        return cls.error(503, "the service is down", retry_after=retry_after)

    @classmethod
    def unauthorized(cls) -> Self:
        """Make a 401, as for a token or a key that is refused.

        Returns:
            The error.
        """
        return cls.error(401, "the credentials were refused")

    @classmethod
    def html(cls, status: int = 502) -> Self:
        """Make the page that a gateway shows in place of the service's answer.

        Args:
            status: The HTTP status; a 200 is that of a captive portal.

        Returns:
            The page.
        """
        page = b"<!DOCTYPE html><html><head><title>Bad Gateway</title></head><body><h1>Bad Gateway</h1></body></html>"
        return cls(status, page, {"Content-Type": "text/html; charset=utf-8"})

    @classmethod
    def redirect(cls, location: str, status: int = 307) -> Self:
        """Make a redirect.

        Args:
            location: Where to.
            status: The HTTP status, 300 to 399.

        Returns:
            The redirect.

        Raises:
            ValueError: The status is outside its range.
        """
        if not 300 <= status <= 399:  # noqa: PLR2004 (RFC 9110 section 15)
            raise ValueError(f"the status of a redirect must be from 300 to 399, not {status!r}")
        return cls(status, b"", {"Location": location})

    @classmethod
    def broken_json(cls) -> Self:
        """Make a 200 whose body is cut in the middle of its JSON, as HTTP a whole one.

        Returns:
            The answer.
        """
        return cls(body=b'{"value": "cut in the mid')


@dataclass(slots=True)
class ServiceRequest:
    """One request that a `ScriptedService` received; bears no header and no body.

    Args:
        number: Its place among all requests of the service, from 1.
        method: Its method.
        path: Its path and query, as they were sent.
        is_exchange: Whether it is for the token endpoint.
        reply: The scripted answer, or None where the real service answered.
        status: The answer's status, or None where there is none yet.
    """

    number: int
    method: str
    path: str
    is_exchange: bool
    reply: Reply | None = None
    status: int | None = None


Replies = Reply | Iterable[Reply | None] | Callable[[ServiceRequest], Reply | None] | None
"""How requests to come are answered.

None is as the real service would. A `Reply` answers every request. An iterable, such as a list, has an item for each request,
after which the real service answers. A function is called with each request.
"""


class ScriptedService(Service):
    """Answer on a free port of this machine as a script says; where that has ended, as the real service over memory.

    Use it as `async with ScriptedService(Reply.throttled(), Reply.unavailable()) as service:`. The token endpoint has a script
    of its own, so that an exchange uses up no reply.

    Args:
        replies: The answers to come, one for each request, but for those to the token endpoint; None is the real service's.
        token_replies: The token endpoint's answers to come; see `Replies`.
        token_lifetime_seconds: How long a token lives that the token endpoint hands out.
        requires_token: Whether requests without a living token from here are answered by 401 and use up no reply.
        backend: Where the real service keeps its values; None takes new memory.
        sleep: Waits for a reply's delay; `asyncio.sleep` but for tests.
        clock: Gives the present as seconds since the epoch, for the life of tokens.

    Attributes:
        requests: Every request received, in that order; clear it as you like.
        token_lifetime_seconds: As above; may be changed at any time.
        backend: Where values are.

    Raises:
        TypeError: What is given as replies cannot be some.
    """

    def __init__(  # noqa: PLR0913 (keywords, each with a default that serves)
        self,
        *replies: Reply | None,
        token_replies: Replies = None,
        token_lifetime_seconds: float = 7200.0,
        requires_token: bool = False,
        backend: Backend | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Clock = time.time,
    ) -> None:
        self.backend: Backend = MemoryBackend() if backend is None else backend
        super().__init__(self.backend)
        self.replies = replies
        self.token_replies = token_replies
        self.token_lifetime_seconds = token_lifetime_seconds
        self.requests: list[ServiceRequest] = []
        self._requires_token = requires_token
        self._sleep = sleep
        self._clock = clock
        self._request_count = 0
        self._token_expiries: dict[str, float] = {}
        self._runner: web.ServerRunner | None = None
        self._port: int | None = None
        self._script_error: Exception | None = None

    async def __aenter__(self) -> Self:
        if self._runner is not None:
            raise RuntimeError("this ScriptedService is running already; make another one")
        self._runner = web.ServerRunner(HttpServer(self, _KEEPALIVE_SECONDS), shutdown_timeout=_DRAIN_SECONDS)
        try:
            await self._runner.setup()
            site = web.TCPSite(self._runner, _HOST, 0)
            await site.start()
        except BaseException:
            await self.aclose()
            raise
        self._port = site.port
        return self

    async def __aexit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        await self.aclose()
        if self._script_error is not None and error_type is None:
            raise self._script_error

    async def aclose(self) -> None:
        """Stop, whatever is under way; safe to call twice."""
        runner, self._runner, self._port = self._runner, None, None
        if runner is not None:
            await runner.cleanup()

    @property
    def url(self) -> str:
        """The service's address."""
        if self._port is None:
            raise RuntimeError("this ScriptedService is not running; use it as `async with ScriptedService(...) as service:`")
        return f"http://{_HOST}:{self._port}"

    @property
    def replies(self) -> Replies:
        """How requests to come are answered, as it was set; see `Replies`. Set it at any time, from any thread.

        Where a function of yours raises, the answer is a 500, and the first such exception comes out of the `async with`.
        """
        return self._replies

    @replies.setter
    def replies(self, replies: Replies) -> None:
        self._script = script_of("replies", replies, _check_reply, Reply)
        self._replies = replies

    @property
    def token_replies(self) -> Replies:
        """How the token endpoint answers, as it was set; see `Replies`. Set it at any time, from any thread."""
        return self._token_replies

    @token_replies.setter
    def token_replies(self, replies: Replies) -> None:
        self._token_script = script_of("token_replies", replies, _check_reply, Reply)
        self._token_replies = replies

    @property
    def calls(self) -> int:
        """How many requests have come that were not for the token endpoint."""
        return sum(not request.is_exchange for request in self.requests)

    @property
    def exchanges(self) -> int:
        """How many requests for a token have come."""
        return sum(request.is_exchange for request in self.requests)

    def revoke_tokens(self) -> None:
        """Let every token that was handed out be refused from now on; only with `requires_token` does that matter."""
        self._token_expiries.clear()

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answer one request; see `Service.handle`."""
        path = request.raw_path
        is_exchange = path.partition("?")[0] == TOKEN_PATH
        self._request_count += 1
        received = ServiceRequest(self._request_count, request.method, path, is_exchange)
        self.requests.append(received)
        if self._requires_token and not is_exchange and not self._is_living_token(request):
            response = await self._scripted(request, Reply.unauthorized())
        else:
            received.reply = self._next_reply(received)
            if received.reply is not None:
                response = await self._scripted(request, received.reply)
            elif is_exchange:
                response = await self._scripted(request, self._token_reply(request))
            else:
                response = await super().handle(request)
        received.status = response.status
        return response

    def _next_reply(self, received: ServiceRequest) -> Reply | None:
        try:
            reply = (self._token_script if received.is_exchange else self._script)(received)
            _check_reply(reply)
        except Exception as error:  # noqa: BLE001 (whatever a function of the test's raises is the test's to see)
            self._script_error = self._script_error or error
            return Reply.error(500, "the script has failed")
        return reply

    async def _scripted(self, request: web.BaseRequest, reply: Reply) -> web.Response:
        while await request.content.readany():
            pass
        if reply.delay_seconds:
            await self._sleep(reply.delay_seconds)
        headers = {"Content-Type": _JSON, **reply.headers}
        return web.Response(status=reply.status, body=reply.body, headers=headers)

    def _token_reply(self, request: web.BaseRequest) -> Reply:
        token = secrets.token_urlsafe(32)
        expires_at = self._clock() + self.token_lifetime_seconds
        self._token_expiries[token] = expires_at
        body = {
            "token": token,
            "token_type": "Bearer",
            "base_url": f"{request.scheme}://{request.host}",
            "expires_at": (datetime.fromtimestamp(0, UTC) + timedelta(seconds=expires_at)).isoformat(),
        }
        return Reply(body=orjson.dumps(body))

    def _is_living_token(self, request: web.BaseRequest) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._clock() < self._token_expiries.get(token, 0.0)


def _check_reply(reply: object) -> None:
    if reply is not None and not isinstance(reply, Reply):
        raise TypeError(f"a reply must be a Reply or None, not {type(reply).__name__}")


def _retry_after_text(retry_after: RetryAfter) -> str:
    if not isinstance(retry_after, datetime):
        return str(retry_after)
    if retry_after.tzinfo is None:
        raise ValueError("retry_after must have a time zone, as of datetime.now(UTC)")
    return format_datetime(retry_after.astimezone(UTC), usegmt=True)
