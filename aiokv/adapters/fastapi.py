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

from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast
from urllib.parse import quote

from aiokv.adapters._asgi_exchange import App, Exchange, Receive, Scope
from aiokv.adapters._asgi_responses import Rules, Send, fresh_seconds_of, joined, read_response
from aiokv.caching.decorator import kv_cached
from aiokv.caching.options import ttl_seconds
from aiokv.store import AsyncKVStore

if TYPE_CHECKING:
    from fastapi.routing import APIRoute

    class CachedRoute(APIRoute):
        """What `cached_route` makes."""

        cache: ClassVar["ResponseCache"]


DEFAULT_MAX_BODY_BYTES: Final = 1_000_000

_PERSONAL: Final = ("authorization", "cookie")
# What middlewares outside make of these headers, Starlette's among them.
_MADE_OF_PERSONAL: Final = frozenset({"session", "user", "auth"})
_SERVER_ERROR: Final = 500
# The application must make a whole response, whatever this client has already.
_CONDITIONS: Final = frozenset({b"if-none-match", b"if-modified-since"})


class ResponseCache:
    """An ASGI application that answers GET requests with what another one answered before, until that is no longer fresh.

    Equal requests at once make one call of the application, in all workers as far as `kv_cached` can. A response is stored
    where it is 200 or has a lifetime of its own (`s-maxage`, `max-age`, `Expires`), and neither `no-store`, `no-cache`,
    `private`, `Set-Cookie`, the type `text/event-stream` nor a `Vary` that names another header than `vary` does. Any other is
    passed on as it comes. A store that fails, and a damaged value in it, mean that the application is called.

    Requests with `Authorization`, `Cookie`, `Range` or a body go to the application, and so does every method but GET. So do
    requests for which a middleware outside has found a user or a session, and no response is stored where the application
    has changed the session.

    A response gets an `ETag`, a `Cache-Control` and a `Vary` unless it has them, and its `Age` where it was stored;
    `If-None-Match` is answered by 304. `Cache-Control` of requests is ignored, so that clients cannot make the application
    work.

    Args:
        app: The application, such as a FastAPI app or the `app` of a route.
        store: Where responses live; None takes `default_store()`.
        ttl: Seconds that a response of status 200 is fresh where it does not say so itself; from 1 to 2,592,000 (30 days).
        vary: Names of request headers that responses depend on, such as `accept-language`. Each value has responses of its
            own. With `authorization` or `cookie` among them, so does each user.
        ignore: `cookie`, `authorization` or both, which then keep no request from the cache. The application sees them in no
            GET and no HEAD request, whether or not its response is stored, nor `session`, `user` and `auth` of middlewares
            outside.
        stale_while_revalidate: For how many seconds after a response was fresh it is served while it is made anew, unless it
            has `must-revalidate`, `proxy-revalidate`, `s-maxage` or a shorter `stale-while-revalidate`.
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

        async def respond(request: tuple[str, ...], exchange: Exchange) -> str:
            text = await exchange.begin()
            if not text and exchange.is_behind:
                if exchange.status >= _SERVER_ERROR:
                    # As where the application raises: the next attempt waits, and what is stored is served meanwhile.
                    raise _FailedBehindError(f"the application answered {exchange.status}")
                with suppress(Exception):
                    await self.responses.invalidate(request, exchange)
            return text

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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; see the ASGI specification."""
        await self.answer(self._app, scope, receive, send)

    async def answer(self, app: App, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request in the place of an application other than the cache's own.

        Args:
            app: The application; what it answers must depend on the URL and the headers of `vary` alone.
            scope: As in the ASGI specification.
            receive: Likewise.
            send: Likewise.
        """
        if scope["type"] != "http" or scope["method"] not in {"GET", "HEAD"}:
            await app(scope, receive, send)
            return
        if self._ignored:
            visible = [header for header in scope["headers"] if header[0].lower() not in self._ignored]
            kept = {name: value for name, value in scope.items() if name not in _MADE_OF_PERSONAL}
            scope = {**kept, "headers": visible}
        headers = [(name.lower(), value) for name, value in scope["headers"]]
        values = joined(headers)
        sent = [name for name in _PERSONAL if name in values]
        is_personal = any(name not in self._vary for name in sent) or (not sent and _has_user(scope))
        if scope["method"] == "HEAD" or "range" in values or is_personal or _has_body(values):
            await app(scope, receive, send)
            return
        request = (
            scope.get("scheme", "http"),
            values.get("host", ""),
            scope.get("root_path", ""),
            scope["path"],
            _raw_path_of(scope),
            scope.get("query_string", b"").decode("latin-1"),
            *[part for name in self._vary for part in (name, values.get(name, ""))],
        )
        # Without extensions, by which a body can come in other ways than in messages.
        unconditional = {**scope, "headers": [one for one in headers if one[0] not in _CONDITIONS], "extensions": {}}
        exchange = Exchange(app, unconditional, receive, send, self._rules)
        try:
            try:
                text = await self.responses(request, exchange)
            except _FailedBehindError:
                # This caller came too late for the older response. It gets the application's own answer, whatever that is.
                text = ""
            response = read_response(text) if text else None
            is_replacing = response is not None and text != exchange.text and response.is_past_use()
            if is_replacing:
                exchange.take(False)
                exchange = Exchange(app, unconditional, receive, send, self._rules)
                text = await self.responses.refresh(request, exchange)
                response = read_response(text) if text else None
            # Not where it was made for another caller. If this call made one all the same, that was in the background.
            is_own = exchange.task is not None and text == exchange.text
            exchange.take(is_own)
            exchange.is_behind = response is not None and not is_own
            if response is None and (text or is_replacing):
                # Damaged in the store, or there is no such response any more. If it stays, that costs a call each time.
                with suppress(Exception):
                    await self.responses.invalidate(request, exchange)
            if response is not None:
                await response.send(values.get("if-none-match", ""), send, is_stored=not is_own)
            elif not is_own:
                # Perhaps another caller's response, which is that caller's alone.
                await app(scope, receive, send)
            if is_own and exchange.task is not None:
                # The rest of a response that is passed on, and what the application does after it.
                await exchange.task
        finally:
            exchange.take(False)


class _FailedBehindError(Exception):
    """The application answered with an error where a response was made anew behind its caller."""


def cached_route(
    store: AsyncKVStore | None = None,
    *,
    ttl: float = 60,
    route_class: "type[APIRoute] | None" = None,
    **options: Any,
) -> "type[CachedRoute]":
    """Make a class of FastAPI's routes whose GET responses are cached: `APIRouter(route_class=cached_route(store, ttl=60))`.

    Dependencies, validation and exception handlers of the route run for those requests alone that reach the endpoint. What
    must run for each request, such as a check of access, belongs into a middleware.

    Args:
        store: As for `ResponseCache`.
        ttl: As for `ResponseCache`.
        route_class: The class to begin with; None takes FastAPI's own.
        **options: Those of `ResponseCache`.

    Returns:
        The class. Its attribute `cache` is the `ResponseCache` of all its routes.

    Raises:
        ImportError: FastAPI is not installed.
        RuntimeError: This release of FastAPI does not ask the class of a route for its answers.
        TypeError: As for `ResponseCache`.
        ValueError: As for `ResponseCache`.
    """
    try:
        from fastapi.routing import APIRoute  # noqa: PLC0415 (Starlette's users have none)
    except ImportError as missing:
        raise ImportError("cached_route needs the package fastapi: pip install 'aiokv[fastapi]'") from missing
    responses = ResponseCache(_nothing, store=store, ttl=ttl, **options)
    _check_that_routes_handle_requests()

    class Route(route_class or APIRoute):  # type: ignore[misc]
        cache = responses

        # Not `app`: where a router is included, FastAPI from 0.137 on makes another one for the same route.
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["method"] in self.methods:
                await responses.answer(super().handle, scope, receive, send)
            else:
                # A 405.
                await super().handle(scope, receive, send)

    return cast("type[CachedRoute]", Route)


@cache
def _check_that_routes_handle_requests() -> None:
    """Raise RuntimeError where FastAPI calls an endpoint without the `handle` of its route, which is then never cached."""
    from fastapi import APIRouter, FastAPI, __version__  # noqa: PLC0415 (Starlette's users have none)
    from fastapi.routing import APIRoute  # noqa: PLC0415 (likewise)

    called: list[str] = []

    class Route(APIRoute):
        async def handle(self, scope: Any, receive: Any, send: Any) -> None:  # noqa: ARG002 (only whether it is called)
            called.append("route")

    async def endpoint() -> None:
        called.append("endpoint")

    router, app = APIRouter(route_class=Route), FastAPI()
    router.add_api_route("/", endpoint)
    app.include_router(router)
    scope = {"type": "http", "method": "GET", "path": "/", "root_path": "", "query_string": b"", "headers": []}
    call = app(scope, _nothing, _nothing)  # type: ignore[arg-type]
    # It waits for nothing. One that fails proves nothing.
    with suppress(Exception):
        call.send(None)
        call.close()
    if called == ["endpoint"]:
        raise RuntimeError(
            f"cached_route cannot cache under FastAPI {__version__}, which does not ask the class of a route: "
            "use the middleware ResponseCache, or an older FastAPI"
        )


async def _nothing(*_: object) -> None:
    """Stand for an application that is never called."""


def _names_of(option: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{option} must be a list of header names, such as ['accept-language'], not str")
    return tuple(sorted({name.lower() for name in names}))


def _has_body(values: dict[str, str]) -> bool:
    return "transfer-encoding" in values or values.get("content-length", "0").strip("0 ") != ""


def _has_user(scope: Scope) -> bool:
    """Return whether a middleware outside has found out whose request it is."""
    user = scope.get("user")
    return bool(scope.get("session") or getattr(user, "is_authenticated", user is not None))


def _raw_path_of(scope: Scope) -> str:
    """Return the path as the client sent it, percent-encoded, which tells `/a%2Fb` from `/a/b`."""
    raw_path: bytes | None = scope.get("raw_path")
    return quote(scope["path"]) if raw_path is None else raw_path.decode("latin-1")
