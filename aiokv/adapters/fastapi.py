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
import base64
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import orjson

from aiokv import clock
from aiokv.caching.decorator import kv_cached
from aiokv.caching.options import ttl_seconds
from aiokv.store import AsyncKVStore

if TYPE_CHECKING:
    from fastapi.routing import APIRoute

logger = logging.getLogger("aiokv")

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Send = Callable[[_Message], Awaitable[None]]
_Receive = Callable[[], Awaitable[_Message]]
App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

DEFAULT_MAX_BODY_BYTES: Final = 1_000_000

# Of these, with a lifetime of their own; 200 with the cache's, too (RFC 9110, 15.1, without 206, 405, 414 and 501).
_OK: Final = 200
_NO_CONTENT: Final = 204
_STATUSES: Final = frozenset({_OK, 203, _NO_CONTENT, 300, 301, 308, 404, 410})
_FORBIDDING: Final = frozenset({"no-store", "no-cache", "private"})
_PERSONAL: Final = ("authorization", "cookie")
_IN_304: Final = frozenset({b"cache-control", b"content-location", b"date", b"etag", b"expires", b"vary"})
# Of the connection, or made anew for each response.
_NOT_STORED: Final = frozenset({b"age", b"connection", b"date", b"keep-alive", b"server", b"trailer", b"transfer-encoding"})
# The application must make a whole response, whatever this client has already.
_CONDITIONS: Final = frozenset({b"if-none-match", b"if-modified-since"})
# The loop holds its tasks weakly.
_running: "set[asyncio.Task[None]]" = set()


class ResponseCache:
    """An ASGI application that answers GET requests with what another one answered before, until that is no longer fresh.

    Equal requests at once make one call of the application, in all workers as far as `kv_cached` can. A response is stored
    where it is 200 or has `max-age` or `s-maxage` of its own, and neither `no-store`, `no-cache`, `private`, `Set-Cookie`
    nor a `Vary` that names another header than `vary` does. A failing store means that the application is called.

    Requests with `Authorization`, `Cookie` or `Range` go to the application, and so does every method but GET. A response gets
    an `ETag`, a `Cache-Control` and a `Vary` unless it has them, and its `Age` where it was stored; `If-None-Match` is
    answered by 304. `Cache-Control` of requests is ignored, so that clients cannot make the application work.

    Args:
        app: The application, such as a FastAPI app or the `app` of a route.
        store: Where responses live; None takes `default_store()`.
        ttl: Seconds that a response of status 200 is fresh where it does not say so itself; from 1 to 2,592,000 (30 days).
        vary: Names of request headers that responses depend on, such as `accept-language`. Each value has responses of its
            own. With `authorization` or `cookie` among them, so does each user.
        ignore: `cookie`, `authorization` or both, which then keep no request from the cache. The application never sees them.
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
        self._max_body_bytes = max_body_bytes

        self._ttl = ttl_seconds("ttl", ttl)

        async def respond(request: tuple[str, ...], exchange: _Exchange) -> str:  # noqa: ARG001 (the key)
            return await exchange.begin()

        self.responses = kv_cached(
            ttl=lambda text: _head_of(text)["fresh_seconds"],
            when=bool,
            store=store,
            key=lambda request, _: request,
            prefix="response",
            version=version,
            stale_while_revalidate=stale_while_revalidate,
            early=0,
        )(respond)

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answer a request; see the ASGI specification."""
        if scope["type"] != "http" or scope["method"] != "GET":
            await self._app(scope, receive, send)
            return
        headers = [(name.lower(), value) for name, value in scope["headers"] if name.lower() not in self._ignored]
        values = {name.decode("latin-1"): value for name, value in headers}
        if "range" in values or any(name in values and name not in self._vary for name in _PERSONAL):
            await self._app(scope, receive, send)
            return
        request = (
            scope.get("scheme", "http"),
            values.get("host", b"").decode("latin-1"),
            scope.get("root_path", ""),
            scope["path"],
            scope.get("query_string", b"").decode("latin-1"),
            *(b",".join(value for held, value in headers if held == name.encode()).decode("latin-1") for name in self._vary),
        )
        # Without extensions, by which a body can come in other ways than in messages.
        unconditional = {**scope, "headers": [one for one in headers if one[0] not in _CONDITIONS], "extensions": {}}
        exchange = _Exchange(self._app, unconditional, send, self)
        try:
            text = await self.responses(request, exchange)
            # Not where it was made for another caller. If this call made one all the same, that was in the background.
            is_own = exchange.task is not None and text == exchange.text
            exchange.take(is_own)
            if text:
                await _send(text, values.get("if-none-match", b""), send, is_stored=not is_own)
            elif not is_own:
                # Another caller's response, which is that caller's alone.
                await self._app(scope, receive, send)
            if is_own and exchange.task is not None:
                # The rest of a response that is passed on, and what the application does after it.
                await exchange.task
        finally:
            exchange.take(False)

    def fresh_seconds(self, status: int, headers: list[tuple[bytes, bytes]], size_bytes: int) -> float | None:
        """Return for how many seconds a response is fresh, or None where it must not be stored; names are in lower case."""
        values = _joined(headers)
        directives = dict(_directives_of(values.get("cache-control", "")))
        lifetime = _number_of(directives.get("s-maxage", directives.get("max-age", "")))
        seconds = self._ttl if lifetime is None else lifetime - (_number_of(values.get("age", "")) or 0)
        may_be_stored = (
            status in _STATUSES
            and (status == _OK or lifetime is not None)
            and seconds > 0
            and "set-cookie" not in values
            and _FORBIDDING.isdisjoint(directives)
            and {*_items_of(values.get("vary", ""))} <= {*self._vary}
            and max(size_bytes, _number_of(values.get("content-length", "")) or 0) <= self._max_body_bytes
        )
        return seconds if may_be_stored else None

    def write(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes, fresh_seconds: float) -> str:
        """Return what a response is stored as: a line of JSON, then the body as it is after `t`, or as base64 after `b`."""
        values = _joined(headers)
        kept = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in headers if name not in _NOT_STORED]
        if "content-length" not in values and status != _NO_CONTENT:
            kept.append(["content-length", str(len(body))])
        if "etag" not in values:
            # Weak, since a compressing middleware may change the bytes.
            kept.append(["etag", f'W/"{blake2b(body, digest_size=16).hexdigest()}"'])
        if not {"max-age", "s-maxage"} & {name for name, _ in _directives_of(values.get("cache-control", ""))}:
            kept.append(["cache-control", f"max-age={int(fresh_seconds)}"])
        if missing := [name for name in self._vary if name not in _items_of(values.get("vary", ""))]:
            kept.append(["vary", ", ".join(missing)])
        head = orjson.dumps(
            {"status": status, "headers": kept, "made_at": clock.now(), "fresh_seconds": fresh_seconds}
        ).decode()
        try:
            return f"{head}\nt{body.decode()}"
        except UnicodeDecodeError:
            return f"{head}\nb{base64.b64encode(body).decode()}"


class _Exchange:
    """One call of the application: its response is kept to be shared, or passed on as it comes."""

    def __init__(self, app: App, scope: _Scope, send: _Send, rules: ResponseCache) -> None:
        self._app = app
        self._scope = scope
        self._send_on = send
        self._rules = rules
        self._has_received = False
        self._start: _Message = {}
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

    async def _receive(self) -> _Message:
        if not self._has_received:
            self._has_received = True
            return {"type": "http.request", "body": b"", "more_body": False}
        # The response is not this caller's alone, so the end of its connection does not matter.
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    async def _send(self, message: _Message) -> None:
        if self._passes:
            await self._pass(message)
        elif message["type"] == "http.response.start":
            headers = [(bytes(name).lower(), bytes(value)) for name, value in message.get("headers", ())]
            self._start = {**message, "headers": headers}
            if self._rules.fresh_seconds(message["status"], headers, 0) is None:
                await self._pass_on()
        elif message["type"] == "http.response.body":
            self._body.append(message.get("body", b""))
            self._size_bytes += len(self._body[-1])
            status, headers, is_last = self._start["status"], self._start["headers"], not message.get("more_body", False)
            seconds = self._rules.fresh_seconds(status, headers, self._size_bytes)
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

    async def _pass(self, message: _Message) -> None:
        if await asyncio.shield(self._taken):
            await self._send_on(message)


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


async def _send(text: str, if_none_match: bytes, send: _Send, *, is_stored: bool) -> None:
    """Send a response that was made before, or 304 where the client has it."""
    head = _head_of(text)
    kind, body_text = text[text.index("\n") + 1], text[text.index("\n") + 2 :]
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in head["headers"]]
    if is_stored:
        headers.append((b"age", str(max(0, int(clock.now() - head["made_at"]))).encode()))
    etag = next(value for name, value in headers if name == b"etag").removeprefix(b"W/")
    offered = [one.strip().removeprefix(b"W/") for one in if_none_match.split(b",")]
    if head["status"] == _OK and (etag in offered or offered == [b"*"]):
        headers = [header for header in headers if header[0] in _IN_304 or header[0] == b"age"]
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return
    body = body_text.encode() if kind == "t" else base64.b64decode(body_text)
    await send({"type": "http.response.start", "status": head["status"], "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _head_of(text: str) -> Mapping[str, Any]:
    head: Mapping[str, Any] = orjson.loads(text[: text.index("\n")])
    return head


def _joined(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return each header's values, joined by commas."""
    values: dict[str, str] = {}
    for name_bytes, value in headers:
        name = name_bytes.decode("latin-1")
        values[name] = f"{values[name]},{value.decode('latin-1')}" if name in values else value.decode("latin-1")
    return values


def _items_of(text: str) -> list[str]:
    return [item.strip().lower() for item in text.split(",") if item.strip()]


def _names_of(option: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{option} must be a list of header names, such as ['accept-language'], not str")
    return tuple(dict.fromkeys(name.lower() for name in names))


def _directives_of(text: str) -> Iterable[tuple[str, str]]:
    for directive in text.split(","):
        name, _, value = directive.partition("=")
        yield name.strip().lower(), value.strip().strip('"')


def _number_of(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None
