"""A cache of responses for FastAPI and every other ASGI framework, in an `AsyncKVStore` that all workers share.

```python
from fastapi import APIRouter, FastAPI
from aiokv import AsyncKVStore
from aiokv.adapters.fastapi import cached_route

router = APIRouter(route_class=cached_route(AsyncKVStore("responses"), ttl=60))

@router.get("/forecast/{city}")
async def forecast(city: str) -> dict: ...

app = FastAPI()
app.include_router(router)
```

`docs/fastapi.md` says what is cached and what is not.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from aiokv.adapters._asgi_responses import Message, Rules, Send, fresh_seconds_of, read_response
from aiokv.caching.decorator import kv_cached
from aiokv.caching.options import ttl_seconds
from aiokv.store import AsyncKVStore

if TYPE_CHECKING:
    from fastapi.routing import APIRoute

logger = logging.getLogger("aiokv")

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[Message]]
App = Callable[[_Scope, _Receive, Send], Awaitable[None]]

DEFAULT_MAX_BODY_BYTES: Final = 1_000_000

_PERSONAL: Final = ("authorization", "cookie")
# The application must make a whole response, whatever this client has already.
_CONDITIONS: Final = frozenset({b"if-none-match", b"if-modified-since"})
# The loop holds its tasks weakly.
_running: "set[asyncio.Task[None]]" = set()


class ResponseCache:
    """An ASGI application that answers GET requests with what another one answered before, until that is no longer fresh.

    Equal requests at once make one call of the application, in all workers as far as `kv_cached` can. A response is stored
    where it is 200 or has a lifetime of its own (`s-maxage`, `max-age`, `Expires`), and neither `no-store`, `no-cache`,
    `private`, `Set-Cookie`, the type `text/event-stream` nor a `Vary` that names another header than `vary` does. Any other is
    passed on as it comes. A store that fails, and a damaged value in it, mean that the application is called.

    Requests with `Authorization`, `Cookie`, `Range` or a body go to the application, and so does every method but GET. A
    response gets an `ETag`, a `Cache-Control` and a `Vary` unless it has them, and its `Age` where it was stored;
    `If-None-Match` is answered by 304. `Cache-Control` of requests is ignored, so that clients cannot make the application
    work.

    Args:
        app: The application, such as a FastAPI app or the `app` of a route.
        store: Where responses live; None takes `default_store()`.
        ttl: Seconds that a response of status 200 is fresh where it does not say so itself; from 1 to 2,592,000 (30 days).
        vary: Names of request headers that responses depend on, such as `accept-language`. Each value has responses of its
            own. With `authorization` or `cookie` among them, so does each user.
        ignore: `cookie`, `authorization` or both, which then keep no request from the cache. The application sees them in no
            GET and no HEAD request, whether or not its response is stored.
        stale_while_revalidate: For how many seconds after a response was fresh it is served while it is made anew.
        max_body_bytes: Longest body that is stored; longer ones are passed on as they come.
        version: Any text; another one begins anew. Change it where the application's responses change.

    Attributes:
        responses: The cached function that makes the responses, for its `info()` and for metrics.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is not acceptable.
    """

    def __init__(  # noqa: PLR0913 (keywords, each with a default that serves)
        self,
        app: App,
        *,
        store: AsyncKVStore | None = None,
        ttl: float = 60,
        vary: Iterable[str] = (),
        ignore: Iterable[str] = (),
        stale_while_revalidate: float = 0,
        max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
        version: str = "1",
    ) -> None:
        self._app = app
        self._vary = _names_of("vary", vary)
        self._ignored = frozenset(name.encode() for name in _names_of("ignore", ignore))
        if unknown := {name.decode() for name in self._ignored}.difference(_PERSONAL):
            raise ValueError(f"ignore takes 'cookie' and 'authorization', not {unknown.pop()!r}")
        if isinstance(max_body_bytes, bool) or not isinstance(max_body_bytes, int) or max_body_bytes < 0:
            raise ValueError(f"max_body_bytes must be an int of 0 or more, not {max_body_bytes!r}")
        self._rules = Rules(ttl_seconds("ttl", ttl), self._vary, max_body_bytes)

        async def respond(request: tuple[str, ...], exchange: _Exchange) -> str:  # noqa: ARG001 (the key)
            return await exchange.begin()

        self.responses = kv_cached(
            ttl=fresh_seconds_of,
            when=bool,
            store=store,
            key=lambda request, _: request,
            prefix="response",
            version=version,
            stale_while_revalidate=stale_while_revalidate,
            early=0,
        )(respond)

    async def __call__(self, scope: _Scope, receive: _Receive, send: Send) -> None:
        """Answer a request; see the ASGI specification."""
        if scope["type"] != "http" or scope["method"] not in {"GET", "HEAD"}:
            await self._app(scope, receive, send)
            return
        if self._ignored:
            visible = [header for header in scope["headers"] if header[0].lower() not in self._ignored]
            scope = {**scope, "headers": visible}
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        values = {name.decode("latin-1"): value for name, value in headers}
        is_personal = any(name in values and name not in self._vary for name in _PERSONAL)
        if scope["method"] == "HEAD" or "range" in values or is_personal or _has_body(values):
            await self._app(scope, receive, send)
            return
        request = (
            scope.get("scheme", "http"),
            values.get("host", b"").decode("latin-1"),
            scope.get("root_path", ""),
            scope["path"],
            _raw_path_of(scope),
            scope.get("query_string", b"").decode("latin-1"),
            *(b",".join(value for held, value in headers if held == name.encode()).decode("latin-1") for name in self._vary),
        )
        # Without extensions, by which a body can come in other ways than in messages.
        unconditional = {**scope, "headers": [one for one in headers if one[0] not in _CONDITIONS], "extensions": {}}
        exchange = _Exchange(self._app, unconditional, receive, send, self._rules)
        try:
            text = await self.responses(request, exchange)
            # Not where it was made for another caller. If this call made one all the same, that was in the background.
            is_own = exchange.task is not None and text == exchange.text
            exchange.take(is_own)
            response = read_response(text) if text else None
            if response is not None:
                await response.send(values.get("if-none-match", b""), send, is_stored=not is_own)
            elif not is_own:
                if text:
                    # Damaged in the store. If it stays there, the application answers as often as it is read.
                    with suppress(Exception):
                        await self.responses.invalidate(request, exchange)
                # Or another caller's response, which is that caller's alone.
                await self._app(scope, receive, send)
            if is_own and exchange.task is not None:
                # The rest of a response that is passed on, and what the application does after it.
                await exchange.task
        finally:
            exchange.take(False)


class _Exchange:
    """One call of the application: its response is kept to be shared, or passed on as it comes."""

    def __init__(self, app: App, scope: _Scope, receive: _Receive, send: Send, rules: Rules) -> None:
        self._app = app
        self._scope = scope
        self._receive_on = receive
        self._send_on = send
        self._rules = rules
        self._has_received = False
        self._start: Message = {}
        self._body: list[bytes] = []
        self._size_bytes = 0
        self._passes = False
        self._known = asyncio.Event()
        # Whether the caller takes a response that is passed on; it knows only when its call of the cache has ended.
        self._taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None
        self.text: str | None = None

    async def begin(self) -> str:
        """Call the application; return its response as text, or "" where it is not to be shared, as soon as that is known."""
        task = self.task = asyncio.create_task(self._call(), name="aiokv response")
        _running.add(task)
        task.add_done_callback(self._end)
        try:
            await self._known.wait()
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait([task])
            raise
        if self.text is None:
            # It failed, or ended without a response.
            self.text = ""
            await task
        return self.text

    def take(self, is_taken: bool) -> None:  # noqa: FBT001 (a fact)
        """Say whether the caller takes what is passed on; the first word counts."""
        if not self._taken.done():
            self._taken.set_result(is_taken)

    async def _call(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    def _end(self, task: "asyncio.Task[None]") -> None:
        _running.discard(task)
        self._known.set()
        is_left = self._taken.done() and not self._taken.result()
        if is_left and not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an application failed whose response nobody waits for: %s", type(error).__qualname__)

    async def _receive(self) -> Message:
        if not self._has_received:
            self._has_received = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._known.wait()
        if not self._passes:
            # The response is not this caller's alone, so the end of its connection does not matter.
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
        if not await asyncio.shield(self._taken):
            return {"type": "http.disconnect"}
        message = await self._receive_on()
        # The first one is the request, which the application has.
        return await self._receive_on() if message["type"] == "http.request" else message

    async def _send(self, message: Message) -> None:
        if self._passes:
            await self._pass(message)
        elif message["type"] == "http.response.start":
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            self._start = {**message, "headers": headers}
            if self._rules.fresh_seconds(message["status"], headers, 0, is_whole=False) is None:
                await self._pass_on()
        elif message["type"] == "http.response.body":
            self._body.append(message.get("body", b""))
            self._size_bytes += len(self._body[-1])
            status, headers, is_last = self._start["status"], self._start["headers"], not message.get("more_body", False)
            seconds = self._rules.fresh_seconds(status, headers, self._size_bytes, is_whole=is_last)
            if seconds is None:
                await self._pass_on()
                await self._pass({"type": "http.response.body", "body": b"".join(self._body), "more_body": not is_last})
                self._body.clear()
            elif is_last:
                self.text = self._rules.write(status, headers, b"".join(self._body), seconds)
                self._known.set()

    async def _pass_on(self) -> None:
        self._passes = True
        self.text = ""
        self._known.set()
        await self._pass(self._start)

    async def _pass(self, message: Message) -> None:
        if await asyncio.shield(self._taken):
            await self._send_on(message)
        elif self.task is not None and message.get("more_body", False):
            # Nobody reads it, and it may have no end.
            self.task.cancel()
            await asyncio.sleep(0)


def cached_route(
    store: AsyncKVStore | None = None,
    *,
    ttl: float = 60,
    route_class: "type[APIRoute] | None" = None,
    **options: Any,
) -> "type[APIRoute]":
    """Make a class of FastAPI's routes whose GET responses are cached: `APIRouter(route_class=cached_route(store, ttl=60))`.

    Dependencies, validation and exception handlers of the route run for those requests alone that reach the endpoint. What
    must run for each request, such as a check of access, belongs into a middleware.

    Args:
        store: As for `ResponseCache`.
        ttl: As for `ResponseCache`.
        route_class: The class to begin with; None takes FastAPI's own.
        **options: Those of `ResponseCache`.

    Returns:
        The class.

    Raises:
        ImportError: FastAPI is not installed.
        TypeError: As for `ResponseCache`.
        ValueError: As for `ResponseCache`.
    """
    try:
        from fastapi.routing import APIRoute  # noqa: PLC0415 (Starlette's users have none)
    except ImportError as missing:
        raise ImportError("cached_route needs the package fastapi: pip install 'aiokv[fastapi]'") from missing
    # Refuses what no route would take.
    ResponseCache(_nothing, store=store, ttl=ttl, **options)

    class CachedRoute(route_class or APIRoute):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.app: App = ResponseCache(self.app, store=store, ttl=ttl, **options)

    return CachedRoute


async def _nothing(*_: object) -> None:
    """Stand for an application that is never called."""


def _names_of(option: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{option} must be a list of header names, such as ['accept-language'], not str")
    return tuple(dict.fromkeys(name.lower() for name in names))


def _has_body(values: dict[str, bytes]) -> bool:
    return "transfer-encoding" in values or values.get("content-length", b"0").strip(b"0 ") != b""


def _raw_path_of(scope: _Scope) -> str:
    """Return the path as the client sent it, percent-encoded, which tells `/a%2Fb` from `/a/b`."""
    raw_path: bytes | None = scope.get("raw_path")
    return quote(scope["path"]) if raw_path is None else raw_path.decode("latin-1")
