"""A real HTTP server on loopback, whose answers and clock a test sets."""

import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

pytest.importorskip("hishel", reason="pip install 'aiokv[http-cache]'")

from aiokv import AsyncKVStore, clock
from aiokv.adapters.aiohttp_client import Outcome, ResponseCache, caching, outcome_of
from aiokv.testing import MovableClock, movable_clock

Answer = web.StreamResponse | Callable[[web.Request], web.StreamResponse | Awaitable[web.StreamResponse]]


def http_date(ahead_seconds: float = 0) -> str:
    """Return a time of the moved clock, as HTTP writes it."""
    return formatdate(int(clock.now()) + ahead_seconds, usegmt=True)


class Origin:
    """What a test asks for: `answers[path]`, or an empty 404; it notes the requests that reach it."""

    def __init__(self) -> None:
        self.base = ""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.answers: dict[str, Answer] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(
            (request.method, request.path_qs, {name.lower(): value for name, value in request.headers.items()})
        )
        answer = self.answers.get(request.path)
        if answer is None:
            return web.Response(status=404, headers={"Date": http_date()})
        if isinstance(answer, web.StreamResponse):
            return answer
        made = answer(request)
        return made if isinstance(made, web.StreamResponse) else await made

    def says(self, path: str, text: str = "hello", status: int = 200, **headers: str) -> None:
        """Answer a path by a text, and by 304 where the request has its ETag or Last-Modified."""

        def answer(request: web.Request) -> web.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            named.setdefault("Date", http_date())
            etag, modified = named.get("ETag"), named.get("Last-Modified")
            is_same = etag is not None and request.headers.get("If-None-Match") == etag
            is_same |= modified is not None and request.headers.get("If-Modified-Since") == modified
            if status == 200 and is_same:
                return web.Response(status=304, headers=named)
            return web.Response(text=text, status=status, headers=named)

        self.answers[path] = answer

    @property
    def hits(self) -> int:
        """How many requests have reached it."""
        return len(self.requests)


@contextlib.asynccontextmanager
async def running_origin() -> AsyncGenerator[Origin]:
    origin = Origin()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", origin.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    origin.base = f"http://127.0.0.1:{site.port}"
    try:
        yield origin
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def moved_hishel(monkeypatch: pytest.MonkeyPatch) -> Generator[MovableClock]:
    """Move hishel's time with aiokv's."""
    with movable_clock() as moved:
        monkeypatch.setattr("hishel._core._spec.time", SimpleNamespace(time=clock.now))
        # HTTP counts whole seconds: a test begins with one.
        moved.advance(1 - clock.now() % 1)
        yield moved


class Client:
    """A session with the middleware; `get` returns how a response came about, and its text."""

    def __init__(self, cache: ResponseCache, session: aiohttp.ClientSession, origin: Origin) -> None:
        self.cache = cache
        self.session = session
        self.origin = origin

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[Outcome | None, str]:
        response, text = await self.response(path, method, **headers)
        return outcome_of(response), text

    async def response(self, path: str, method: str = "GET", **headers: str) -> tuple[aiohttp.ClientResponse, str]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.request(method, self.origin.base + path, headers=named) as response:
            return response, await response.text()


@contextlib.asynccontextmanager
async def client_of(store: AsyncKVStore, origin: Origin, **options: Any) -> AsyncGenerator[Client]:
    async with caching(store, **options) as cache, aiohttp.ClientSession(middlewares=[cache]) as session:
        yield Client(cache, session, origin)


async def contents_of(store: AsyncKVStore) -> str:
    """Return all keys and values of a store."""
    return "".join([info.key + (await store.get(info.key) or "") async for info in store.keys("")])
