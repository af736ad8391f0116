"""HTTP responses in a store: a middleware for `aiohttp.ClientSession` that caches by RFC 9111.

```python
from aiohttp import ClientSession
from aiokv import AsyncKVStore
from aiokv.adapters.aiohttp_client import caching, outcome_of

async with AsyncKVStore("http") as store, caching(store) as cache, ClientSession(middlewares=[cache]) as session:
    async with session.get("https://api.example.com/rates") as response:
        print(await response.json(), outcome_of(response))
```

The package hishel decides what may be stored, served and validated. `docs/http-responses.md` tells the rest.
"""

import asyncio
import logging
from asyncio import AbstractEventLoop, get_running_loop
from typing import Final, Self

from aiohttp import ClientHandlerType, ClientRequest, ClientResponse, hdrs

try:
    from hishel import CacheMiss, Headers, InvalidateEntries, NeedRevalidation, NeedToBeUpdated, Response, StoreAndUse
except ImportError as missing:
    raise ImportError("aiokv.adapters.aiohttp_client needs the package hishel: pip install 'aiokv[http-cache]'") from missing

from aiokv import clock
from aiokv.adapters import _http_entries as entries
from aiokv.adapters._http_entries import StoredResponse
from aiokv.adapters._http_flights import FAILURES, Flight, Landed, Retry
from aiokv.adapters._http_responses import (
    COUNTS,
    Outcome,
    ResponseCacheInfo,
    build,
    can_be_whole,
    conditional_request,
    copy_request,
    gateway_timeout,
    mark,
    outcome_of,
    read_up_to,
)
from aiokv.adapters._http_rules import ENTRY_ID, Views, as_lists, as_received, freshen
from aiokv.adapters._http_store import Exchange, ResponseStore, url_of
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.store import AsyncKVStore

__all__ = ["Outcome", "ResponseCache", "ResponseCacheInfo", "caching", "outcome_of"]

DEFAULT_MAX_BODY_BYTES: Final = 1_400_000
"""As base64, which takes a third more, with 30,000 bytes of headers, this fits a value of 1.9 MB."""

DEFAULT_REVALIDATE_SECONDS: Final = 86_400

logger = logging.getLogger("aiokv")

_METHODS: Final = ("GET", "HEAD")
_REFRESH_SECONDS: Final = 60.0
_MAX_UNSHARED: Final = 1_024
# What answers a refresh in this way is what the origin has now.
_REPLACING: Final = frozenset({200, 404, 410})
# RFC 5861, section 4.
_SERVER_ERRORS: Final = frozenset({500, 502, 503, 504})


class ResponseCache:
    """The middleware that `caching` makes: `ClientSession(middlewares=[cache])`; it may serve several sessions and loops.

    `async with` or `aclose` ends what it does in the background.
    """

    def __init__(self, responses: ResponseStore, views: Views, max_body_bytes: int) -> None:
        self._responses = responses
        self._views = views
        self._max_body_bytes = max_body_bytes
        self._flights: dict[tuple[AbstractEventLoop, str], Flight] = {}
        self._refreshes: set[asyncio.Task[None]] = set()
        # Keys whose last response could not be stored: nobody waits for the next one.
        self._unshared: dict[str, None] = {}

    def info(self) -> ResponseCacheInfo:
        """Return the counts of all requests so far."""
        return ResponseCacheInfo(**self._responses.counts)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Give refreshes up, and wait for writes to the store; the store and the sessions stay open."""
        here = [task for task in self._refreshes if task.get_loop() is get_running_loop()]
        for task in here:
            task.cancel()
        if here:
            await asyncio.wait(here)
        await self._responses.aclose()

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Answer a request; aiohttp calls this.

        Args:
            request: The request.
            handler: What sends it.
        """
        if request.method not in _METHODS:
            response = await self._pass_on(request, handler)
        elif request.body or hdrs.UPGRADE in request.headers or _has_own_trust(request):
            response = mark(await handler(request), "bypass")
        else:
            primary = self._responses.primary(request, request.method)
            response = await self._answer(Exchange(request, handler, self._responses.access(), primary))
        self._responses.counts[COUNTS[outcome_of(response) or "miss"]] += 1
        return response

    async def _answer(self, exchange: Exchange) -> ClientResponse:
        while True:
            stored = await self._responses.look_up(exchange)
            if stored is not None and (response := self._from_store(exchange, stored)) is not None:
                return response
            if "only-if-cached" in exchange.directives:
                return gateway_timeout(exchange.request)
            if not exchange.may_be_shared() or exchange.key in self._unshared:
                return (await self._fetch(exchange, stored))[0]
            flight = self._flights.get((exchange.access.loop, exchange.key))
            if flight is None:
                return await self._lead(exchange, stored, self._take_off(exchange))
            landed = await flight.wait(exchange.request, exchange.handler)
            if landed is Retry:
                continue
            if isinstance(landed, StoredResponse) and (response := self._of_another(exchange, landed)) is not None:
                return response
            return (await self._fetch(exchange, stored))[0]

    def _from_store(self, exchange: Exchange, stored: StoredResponse) -> ClientResponse | None:
        """Return what is stored, where it may be served without the origin."""
        request, view = exchange.request, exchange.view()
        age = self._views.fresh_age(view, stored)
        if age is not None:
            return build(request, stored, age, "hit")
        found = entries.directives(stored.header("cache-control"))
        age = self._views.stale_age(view, stored, entries.seconds_of(found, "stale-while-revalidate") or 0)
        if age is None:
            return None
        if "only-if-cached" not in exchange.directives:
            self._refresh(exchange, stored)
        return build(request, stored, age, "stale")

    def _of_another(self, exchange: Exchange, landed: StoredResponse) -> ClientResponse | None:
        """Return the response that another request has fetched, where it may answer this one too."""
        chosen_by = exchange.chosen_by(entries.names_of(landed.header("vary")) or ())
        if not exchange.can_read(landed):
            return None
        age = self._views.fresh_age(exchange.view(chosen_by), landed)
        return None if age is None else build(exchange.request, landed, age, "shared")

    def _take_off(self, exchange: Exchange) -> Flight:
        place = (exchange.access.loop, exchange.key)
        flight = self._flights[place] = Flight(place, exchange.primary, exchange.request, exchange.handler)
        exchange.flight = flight
        return flight

    def _end(self, flight: Flight, landed: Landed) -> None:
        if self._flights.get(flight.place) is flight:
            del self._flights[flight.place]
        flight.land(landed)

    async def _lead(self, exchange: Exchange, stored: StoredResponse | None, flight: Flight) -> ClientResponse:
        """Fetch a response for all requests that wait for it."""
        landed: Landed = Retry
        try:
            response, landed = await self._fetch(exchange, stored)
        except FAILURES as error:
            flight.fail(error)
            raise
        finally:
            exchange.flight = None
            self._end(flight, landed)
        return response

    def _refresh(self, exchange: Exchange, stored: StoredResponse) -> None:
        """Fetch a response anew, behind a request that got a stale one."""
        if (exchange.access.loop, exchange.key) in self._flights:
            return
        # The caller's own goes with its response.
        exchange.request = copy_request(exchange.request)
        flight = self._take_off(exchange)

        async def refresh() -> None:
            try:
                async with asyncio.timeout(_REFRESH_SECONDS):
                    response = await self._lead(exchange, stored, flight)
            except Exception:  # noqa: BLE001 (nobody waits for it)
                self._responses.counts["refresh_errors"] += 1
            else:
                # Its body has been stored, or nobody wants it.
                response.close()

        def end(task: "asyncio.Task[None]") -> None:
            self._refreshes.discard(task)
            # One that is cancelled before it begins.
            self._end(flight, Retry)

        task = asyncio.create_task(refresh())
        self._refreshes.add(task)
        task.add_done_callback(end)

    async def _fetch(self, exchange: Exchange, stored: StoredResponse | None) -> tuple[ClientResponse, StoredResponse | None]:
        """Ask the origin by hishel's states; return the response, and what others may have of it."""
        state = self._views.ask(exchange.view(), stored)
        while True:
            request = (
                conditional_request(exchange.request, state.request.headers)
                if isinstance(state, NeedRevalidation)
                else exchange.request
            )
            try:
                response = await exchange.handler(request)
            except FAILURES:
                if (stale := self._stale_on_error(exchange, stored)) is None:
                    raise
                return stale, None
            if response.status in _SERVER_ERRORS and (stale := self._stale_on_error(exchange, stored)) is not None:
                response.release()
                return stale, None
            now = clock.now()
            pairs, extra_age = as_received(tuple(response.headers.items()), now)
            state = state.next(Response(response.status, Headers(as_lists(pairs))))
            if isinstance(state, InvalidateEntries):
                if ENTRY_ID in state.entry_ids:
                    await self._responses.delete(exchange.access, [exchange.key])
                state = state.next()
            if isinstance(state, CacheMiss):
                # A 304 that confirms nothing of what is stored.
                response.release()
                continue
            if isinstance(state, NeedToBeUpdated) and stored is not None:
                response.release()
                merged = state.updating_entries[-1].response.headers
                return await self._confirm(exchange, freshen(stored, merged, pairs, extra_age), pairs)
            mark(response, "miss")
            if not isinstance(state, StoreAndUse) or "no-store" in exchange.directives:
                await self._leave_out(exchange, stored, response)
                return response, None
            # hishel takes out what counts for one connection alone.
            kept = state.response.headers
            pairs = tuple([pair for pair in pairs if pair[0] in kept])
            fresh = StoredResponse(response.status, response.reason or "", pairs, b"", {}, True, now, extra_age)
            return response, await self._keep_body(exchange, stored, response, fresh)

    async def _confirm(
        self, exchange: Exchange, fresh: StoredResponse, received: entries.Pairs
    ) -> tuple[ClientResponse, StoredResponse | None]:
        """Serve a stored response that a 304 has confirmed, and store it where others may have what the 304 says."""
        answer = build(exchange.request, fresh, str(entries.age_of(fresh)), "revalidated")
        effect = self._views.confirmation(received, is_authorized=hdrs.AUTHORIZATION in exchange.request.headers)
        if effect == "keep":
            await self._keep(exchange, fresh)
            return answer, fresh
        if effect == "drop":
            await self._responses.delete(exchange.access, [exchange.key])
        return answer, None

    async def _leave_out(self, exchange: Exchange, stored: StoredResponse | None, response: ClientResponse) -> None:
        """Store nothing, and delete what the origin does not have any more."""
        is_own = hdrs.RANGE in exchange.request.headers or "no-store" in exchange.directives
        if stored is not None and response.status in _REPLACING and not is_own:
            await self._responses.delete(exchange.access, [exchange.key])
        self._not_shared(exchange)

    async def _keep_body(
        self, exchange: Exchange, stored: StoredResponse | None, response: ClientResponse, fresh: StoredResponse
    ) -> StoredResponse | None:
        """Read a body and store the response; return it where others may have it."""
        body: bytes | None = None
        source = response.content
        if self._responses.is_worth_keeping(fresh) and can_be_whole(response):
            body = (
                b"" if response.method == hdrs.METH_HEAD else await read_up_to(response, self._max_body_bytes, exchange.flight)
            )
            if body is None and source.exception() is None:
                self._responses.counts["too_large"] += 1
        if body is None:
            # A body that broke off does not say what the origin has.
            await self._leave_out(exchange, stored if source.exception() is None else None, response)
            return None
        fresh.vary = exchange.chosen_by(entries.names_of(fresh.header("vary")) or ())
        fresh.body = body
        fresh.is_decoded = source.total_compressed_bytes is not None if body else exchange.request.session.auto_decompress
        self._unshared.pop(exchange.key, None)
        await self._keep(exchange, fresh)
        return fresh

    async def _keep(self, exchange: Exchange, fresh: StoredResponse) -> None:
        # Those who wait need not wait for the store.
        if exchange.flight is not None:
            exchange.flight.land(fresh)
        await self._responses.keep(exchange, fresh)

    async def _pass_on(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        """Send a request that the store cannot answer, and delete what it makes invalid."""
        url = url_of(request)
        state = self._views.ask_without_answer(request.method, url)
        try:
            response = await handler(request)
        except BaseException:
            # The origin may have done what was asked. A task that is cancelled does not wait.
            if isinstance(state.next(Response(200)), InvalidateEntries):
                self._invalidate(request, is_done=False)
            raise
        state = state.next(Response(response.status, Headers(as_lists(response.headers.items()))))
        if isinstance(state, InvalidateEntries):
            await asyncio.wait([self._invalidate(request)], timeout=self._responses.wait_seconds)
        return mark(response, "bypass")

    def _invalidate(self, request: ClientRequest, *, is_done: bool = True) -> "asyncio.Task[None]":
        """Begin to delete what is stored of a URL."""
        self._responses.counts["invalidated"] += 1
        primaries = [self._responses.primary(request, method) for method in _METHODS]
        for flight in [flight for flight in self._flights.values() if flight.primary in primaries]:
            # What comes may be older than the change.
            del self._flights[flight.place]
        return self._responses.begin_delete(self._responses.access(), primaries, is_awaited=is_done)

    def _stale_on_error(self, exchange: Exchange, stored: StoredResponse | None) -> ClientResponse | None:
        """Return a stale response in place of a failure, where that is allowed."""
        if stored is None:
            return None
        found = entries.directives(stored.header("cache-control")), exchange.directives
        window = max([entries.seconds_of(one, "stale-if-error") or 0 for one in found])
        age = self._views.stale_age(exchange.view(), stored, window)
        return None if age is None else build(exchange.request, stored, age, "stale")

    def _not_shared(self, exchange: Exchange) -> None:
        if exchange.may_be_shared():
            self._unshared[exchange.key] = None
            if len(self._unshared) > _MAX_UNSHARED:
                self._unshared.pop(next(iter(self._unshared)), None)


def _has_own_trust(request: ClientRequest) -> bool:
    """Return whether a request has TLS settings of its own, so that its response is not for those who trust otherwise."""
    if not request.is_ssl() or (request.ssl is True and request.server_hostname is None):
        return False
    logger.debug("a request with ssl= or server_hostname= of its own is not cached: pass ssl= to the session's connector")
    return True


def caching(
    store: AsyncKVStore,
    *,
    shared: bool = True,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    revalidate_seconds: int = DEFAULT_REVALIDATE_SECONDS,
    store_timeout: float = 1.0,
) -> ResponseCache:
    """Make a middleware that keeps responses in a store, by the rules of HTTP (RFC 9111 and RFC 5861).

    Pass it as the last of the session's middlewares, so that it sees the headers that the others add:
    `ClientSession(middlewares=[authenticate, caching(store)])`.

    Args:
        store: Where responses are kept.
        shared: Whether responses may be served to others than those who asked for them. False also keeps responses for one
            user alone, each under the `Authorization` and `Cookie` of its request.
        max_body_bytes: Largest body that is kept, in bytes. A larger one goes to its reader as it comes.
        revalidate_seconds: For how many seconds a response is kept beyond its freshness if the origin can confirm it by its
            `ETag` or `Last-Modified`.
        store_timeout: Seconds that a request waits for the store at most, for each read and write.

    Returns:
        The middleware, for as many sessions as you like. `async with` ends its work in the background.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of its range.
    """
    if not isinstance(store, AsyncKVStore):
        raise TypeError(f"store must be an AsyncKVStore, not {type(store).__name__}; pass AsyncKVStore('http')")
    if isinstance(max_body_bytes, bool) or not isinstance(max_body_bytes, int):
        raise TypeError(f"max_body_bytes must be int, not {type(max_body_bytes).__name__}")
    if not 0 <= max_body_bytes <= MAX_VALUE_BYTES:
        raise ValueError(f"max_body_bytes must be from 0 to {MAX_VALUE_BYTES:,}, the largest value, not {max_body_bytes:,}")
    if isinstance(revalidate_seconds, bool) or not isinstance(revalidate_seconds, int):
        raise TypeError(f"revalidate_seconds must be int, not {type(revalidate_seconds).__name__}")
    if not 0 <= revalidate_seconds <= MAX_TTL_SECONDS:
        raise ValueError(f"revalidate_seconds must be from 0 to {MAX_TTL_SECONDS:,} (30 days), not {revalidate_seconds:,}")
    if isinstance(store_timeout, bool) or not isinstance(store_timeout, int | float):
        raise TypeError(f"store_timeout must be a number of seconds, not {type(store_timeout).__name__}")
    if not 0 < store_timeout <= 60:  # noqa: PLR2004 (a minute)
        raise ValueError(f"store_timeout must be above 0 and at most 60 seconds, not {store_timeout}")
    responses = ResponseStore(store, is_shared=shared, revalidate_seconds=revalidate_seconds, wait_seconds=store_timeout)
    return ResponseCache(responses, Views(is_shared=shared), max_body_bytes)
