"""A service that answers as a script says, and as the real one where the script says nothing."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Self

import orjson
from aiohttp import web

from aiokv import clock as process_clock
from aiokv.backends.base import Backend, Clock
from aiokv.backends.memory import MemoryBackend
from aiokv.server.answers import Answer
from aiokv.server.requests import Request
from aiokv.server.service import Service
from aiokv.testing.faults import script_of
from aiokv.testing.replies import Replies, Reply, ServiceRequest, check_reply
from aiokv.wire import TOKEN_PATH

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_HOST = "127.0.0.1"
_KEEPALIVE_SECONDS = 75.0
# No test waits for a request that is under way when the service ends.
_DRAIN_SECONDS = 0.1
_JSON = "application/json"


class ScriptedService:
    """A service on a free port of this machine that answers as a script says; after its end, as the real one over memory.

    Use it as `async with ScriptedService(Reply.throttled(), Reply.unavailable()) as service:`. The token endpoint has a script
    of its own, so that an exchange uses up no reply.

    Args:
        replies: The coming answers, one for each request except those to the token endpoint; None is the real service's.
        token_replies: The token endpoint's coming answers; see `Replies`.
        token_lifetime_seconds: How long a token of the token endpoint lives.
        requires_token: Whether requests without a living token of this service are answered by 401 and use up no reply.
        backend: Where the real service keeps its values; None takes new memory.
        handler: An aiohttp handler that answers every request in place of the scripts, for answers that no `Reply` can
            express, such as a connection that is aborted. It gets the request with its body read.
        sleep: Waits for a reply's delay; `asyncio.sleep` except in tests.
        clock: Returns the present as seconds since the epoch, for the life of tokens; None takes `aiokv.clock.now`.

    Attributes:
        requests: Every request received, in that order; clear it as you like.
        token_lifetime_seconds: As above; may be changed at any time.
        backend: The backend with the values.

    Raises:
        TypeError: The replies have none of the forms of `Replies`.
    """

    def __init__(  # noqa: PLR0913 (keywords, each with a default that serves)
        self,
        *replies: Reply | None,
        token_replies: Replies = None,
        token_lifetime_seconds: float = 7200.0,
        requires_token: bool = False,
        backend: Backend | None = None,
        handler: Handler | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Clock | None = None,
    ) -> None:
        self.backend: Backend = MemoryBackend() if backend is None else backend
        self._service = Service(self.backend)
        self.replies = replies
        self.token_replies = token_replies
        self.token_lifetime_seconds = token_lifetime_seconds
        self.requests: list[ServiceRequest] = []
        self._requires_token = requires_token
        self._handler = handler
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
        server = web.Server(self._handle, access_log=None, auto_decompress=False, keepalive_timeout=_KEEPALIVE_SECONDS)
        self._runner = web.ServerRunner(server, shutdown_timeout=_DRAIN_SECONDS)
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
        """Stop, and end the requests under way; safe to call twice."""
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
        """How the coming requests are answered; see `Replies`. Set it at any time, from any thread.

        Where your function raises, the answer is a 500, and the `async with` raises the first such exception at its end.
        """
        return self._replies

    @replies.setter
    def replies(self, replies: Replies) -> None:
        self._script = script_of("replies", replies, check_reply, Reply)
        self._replies = replies

    @property
    def token_replies(self) -> Replies:
        """How the token endpoint answers; see `Replies`. Set it at any time, from any thread."""
        return self._token_replies

    @token_replies.setter
    def token_replies(self, replies: Replies) -> None:
        self._token_script = script_of("token_replies", replies, check_reply, Reply)
        self._token_replies = replies

    @property
    def calls(self) -> int:
        """The number of requests received, without those for the token endpoint."""
        return sum(not request.is_exchange for request in self.requests)

    @property
    def exchanges(self) -> int:
        """The number of requests for a token received."""
        return sum(request.is_exchange for request in self.requests)

    @property
    def paths(self) -> list[str]:
        """The path and query of every request received, in that order."""
        return [request.path for request in self.requests]

    def revoke_tokens(self) -> None:
        """Refuse every token that was issued so far; it has an effect only with `requires_token`."""
        self._token_expiries.clear()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.raw_path
        is_exchange = path.partition("?")[0] == TOKEN_PATH
        self._request_count += 1
        received = ServiceRequest(self._request_count, request.method, path, is_exchange, dict(request.headers))
        self.requests.append(received)
        if self._handler is not None:
            received.body = await request.read()
            return await self._handler(request)
        if self._requires_token and not is_exchange and not self._is_living_token(request):
            response = await self._send_reply(received, request, Reply.unauthorized())
        else:
            received.reply = self._next_reply(received)
            if received.reply is not None:
                response = await self._send_reply(received, request, received.reply)
            elif is_exchange:
                response = await self._send_reply(received, request, self._token_reply(request))
            else:
                response = await self._ask_service(request)
        received.status = response.status
        return response

    def _next_reply(self, received: ServiceRequest) -> Reply | None:
        try:
            reply = (self._token_script if received.is_exchange else self._script)(received)
            check_reply(reply)
        except Exception as error:  # noqa: BLE001 (a function of the test's; the test gets its exception)
            self._script_error = self._script_error or error
            return Reply.error(500, "the script has failed")
        return reply

    async def _send_reply(self, received: ServiceRequest, request: web.BaseRequest, reply: Reply) -> web.Response:
        received.body = await request.read()
        if reply.delay_seconds:
            await self._sleep(reply.delay_seconds)
        headers = {"Content-Type": _JSON, **reply.headers}
        return web.Response(status=reply.status, body=reply.body, headers=headers)

    async def _ask_service(self, request: web.BaseRequest) -> web.Response:
        """Answer as the real service does; it knows nothing of how requests arrive."""
        fields = {name.lower().encode(): text.encode("utf-8", "surrogateescape") for name, text in request.headers.items()}
        target = request.raw_path.encode("utf-8", "surrogateescape")
        asked = Request(request.method.encode(), target, fields, keep_alive=True, is_http_1_0=False)
        answer = self._service.admit(asked, request.remote or "")
        try:
            if answer is None:
                async for piece in request.content.iter_any():
                    asked.received_bytes += len(piece)
                    if asked.content_length is None and (answer := self._service.admission.hold_more(asked, len(piece))):
                        break
                    asked.body += piece
            if answer is None:
                result = self._service.answer(asked)
                answer = result if isinstance(result, Answer) else await result
        finally:
            self._service.admission.release(asked)
        response = web.Response(status=answer.status, body=answer.body, headers={"Content-Type": answer.content_type.decode()})
        for line in answer.headers.decode().splitlines():
            name, _, text = line.partition(": ")
            response.headers[name] = text
        if answer.closes:
            response.force_close()
        return response

    def _token_reply(self, request: web.BaseRequest) -> Reply:
        token = secrets.token_urlsafe(32)
        expires_at = self._now() + self.token_lifetime_seconds
        self._token_expiries[token] = expires_at
        body = {
            "token": token,
            "token_type": "Bearer",
            "base_url": f"{request.scheme}://{request.host}",
            "expires_at": (datetime.fromtimestamp(0, UTC) + timedelta(seconds=expires_at)).isoformat(),
        }
        return Reply(body=orjson.dumps(body))

    def _now(self) -> float:
        return process_clock.now() if self._clock is None else self._clock()

    def _is_living_token(self, request: web.BaseRequest) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._now() < self._token_expiries.get(token, 0.0)
