"""The store's side of a cache of HTTP responses: what is looked up, kept and deleted for a request.

No failure of the store leaves here: what cannot be read counts as absent, and what cannot be written is not kept.
"""

import asyncio
from asyncio import get_running_loop
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, Final
from uuid import uuid4

from aiohttp import ClientHandlerType, ClientRequest, NamedPipeConnector, UnixConnector, hdrs
from hishel import Headers, Request

from aiokv import clock
from aiokv.adapters import _http_entries as entries
from aiokv.adapters._http_entries import StoredResponse
from aiokv.adapters._http_flights import Flight
from aiokv.caching.access import StoreAccess, access_of
from aiokv.caching.generations import generations_of
from aiokv.caching.writes import Write
from aiokv.errors import ValueTooLargeError
from aiokv.limits import MAX_TTL_SECONDS, MAX_VALUE_BYTES
from aiokv.store import AsyncKVStore

_PREFIX: Final = "http:"
_CONDITIONS: Final = (hdrs.RANGE, hdrs.IF_NONE_MATCH, hdrs.IF_MODIFIED_SINCE, hdrs.IF_MATCH, hdrs.IF_UNMODIFIED_SINCE)
# The content codings that aiohttp undoes.
_DECODED: Final = frozenset({"gzip", "deflate", "br", "zstd"})


def url_of(request: ClientRequest) -> str:
    """Return the URL that a request asks for, the same for all ways to write its address.

    Args:
        request: The request.
    """
    url = request.url
    return str(url.origin()) + url.raw_path_qs


def _way_of(request: ClientRequest) -> tuple[str, ...]:
    """Return what leads a request to another origin than that of its URL: its `Host`, a socket's path."""
    host, connector = _all_of(request, hdrs.HOST).lower(), request.session.connector
    path = connector.path if isinstance(connector, UnixConnector | NamedPipeConnector) else ""
    own = "" if host in {(request.url.host_port_subcomponent or "").lower(), ""} else host
    return ("way", own, path) if own or path else ()


def _all_of(request: ClientRequest, name: str) -> str:
    """Return all headers of a name; no value has a line feed."""
    return "\n".join(request.headers.getall(name, ()))


class Exchange:
    """One request on its way through the cache.

    Args:
        request: The request.
        handler: What sends it.
        access: The running loop's access to the store.
        primary: The key of its URL.
    """

    __slots__ = ("access", "directives", "flight", "generation", "handler", "key", "pointer", "primary", "request", "url")

    def __init__(self, request: ClientRequest, handler: ClientHandlerType, access: StoreAccess, primary: str) -> None:
        self.request = request
        self.handler = handler
        self.access = access
        self.url = url_of(request)
        # Of the URL, and of the response that the request's headers choose.
        self.primary = self.key = primary
        self.pointer: tuple[list[str], str] | None = None
        self.generation = 0
        # Those who wait for the response.
        self.flight: Flight | None = None
        has_control = hdrs.CACHE_CONTROL in request.headers
        self.directives = entries.directives(", ".join(request.headers.getall(hdrs.CACHE_CONTROL))) if has_control else {}

    def chosen_by(self, names: Sequence[str]) -> dict[str, str]:
        """Return digests of the request's headers of some names."""
        headers = self.request.headers
        return {name: entries.digest(", ".join(headers.getall(name))) for name in names if name in headers}

    def view(self, chosen_by: dict[str, str] | None = None) -> Request:
        """Return the request as hishel sees it, without secrets.

        Args:
            chosen_by: Digests of the headers that a response depends on, where the store does not say which.
        """
        headers: dict[str, Any] = {}
        for name in (hdrs.CACHE_CONTROL, hdrs.RANGE):
            if name in self.request.headers:
                headers[name.lower()] = self.request.headers.getall(name)
        if hdrs.AUTHORIZATION in self.request.headers:
            headers["authorization"] = "some"
        if chosen_by is None and self.pointer is not None:
            chosen_by = self.chosen_by(self.pointer[0])
        return Request(self.request.method, self.url, Headers(headers | chosen_by if chosen_by else headers))

    def may_be_shared(self) -> bool:
        """Return whether a request of the same moment may answer this one."""
        if not self.directives.keys().isdisjoint({"no-cache", "no-store"}):
            return False
        headers = self.request.headers
        return not any(name in headers for name in _CONDITIONS)

    def can_read(self, stored: StoredResponse) -> bool:
        """Return whether the session would have decoded a body as the stored one is."""
        is_as_wanted = stored.is_decoded == self.request.session.auto_decompress
        return is_as_wanted or stored.header("content-encoding").lower() not in _DECODED


class ResponseStore:
    """Responses in a store.

    Args:
        store: The store.
        is_shared: Whether the cache is a shared one.
        revalidate_seconds: For how long a response that can be validated is kept beyond its freshness.
        wait_seconds: How long a request waits for the store, for each read and write.
    """

    def __init__(self, store: AsyncKVStore, *, is_shared: bool, revalidate_seconds: int, wait_seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self._store = store
        self._is_shared = is_shared
        self._revalidate_seconds = revalidate_seconds
        self.wait_seconds = wait_seconds
        # Caches over one store supersede each other's fetches.
        self._generations = generations_of(_PREFIX)
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_access: StoreAccess | None = None

    def access(self) -> StoreAccess:
        """Return the running loop's access to the store."""
        access, target, loop = self._last_access, self._store.target, get_running_loop()
        if access is None or access.loop is not loop or access.target is not target:
            access = self._last_access = access_of(target)
            access.users.add(self)
        return access

    def primary(self, request: ClientRequest, method: str) -> str:
        """Return the key of a URL; a private cache keeps users apart.

        Args:
            request: A request for the URL.
            method: Whose responses are meant.
        """
        user: tuple[str, ...] = ()
        if not self._is_shared:
            user = (_all_of(request, hdrs.AUTHORIZATION), _all_of(request, hdrs.COOKIE))
        return _PREFIX + entries.digest(method, url_of(request), *user, *_way_of(request))

    async def look_up(self, exchange: Exchange) -> StoredResponse | None:
        """Return what is stored for a request, whether fresh or not; note the key that it has.

        Args:
            exchange: The request.
        """
        exchange.generation = self._generations.now
        exchange.key = exchange.primary
        exchange.pointer = None
        text = await self._read(exchange.access, exchange.primary)
        if text is not None and (pointer := entries.decode_pointer(text)) is not None:
            exchange.pointer = pointer
            exchange.key = _variant(exchange.primary, pointer, exchange.chosen_by(pointer[0]))
            text = await self._read(exchange.access, exchange.key)
        if text is None:
            return None
        stored = entries.decode(text)
        if stored is None or not entries.is_whole(stored, exchange.request.method):
            self.counts["undecodable"] += 1
            return None
        is_trusted = self._generations.trusts((exchange.access.target, exchange.primary), stored.received)
        return stored if is_trusted and exchange.can_read(stored) else None

    def is_worth_keeping(self, stored: StoredResponse) -> bool:
        """Return whether a response can be of use to a later request.

        Args:
            stored: The response.
        """
        return self._keep_seconds(stored) is not None and entries.names_of(stored.header("vary")) is not None

    async def keep(self, exchange: Exchange, fresh: StoredResponse) -> None:
        """Store a response, and where needed the pointer that leads to it, unless the request has been superseded.

        Args:
            exchange: The request.
            fresh: The response.
        """
        ttl_seconds, text = self._keep_seconds(fresh), entries.encode(fresh)
        names = entries.names_of(fresh.header("vary"))
        if ttl_seconds is None or names is None or text is None:
            return
        if len(text) > MAX_VALUE_BYTES:
            self.counts["too_large"] += 1
            return
        texts: dict[str, tuple[str, int]] = {}
        key = exchange.primary
        if names:
            pointer = exchange.pointer
            if pointer is None or pointer[0] != names:
                pointer = (names, uuid4().hex)
                texts[key] = (entries.encode_pointer(*pointer), MAX_TTL_SECONDS)
            key = _variant(key, pointer, exchange.chosen_by(names))
        texts[key] = (text, ttl_seconds)
        await self._write(exchange, texts)

    async def delete(self, access: StoreAccess, keys: Sequence[str]) -> None:
        """Delete what is stored, and let nothing older be stored or served.

        Args:
            access: The running loop's.
            keys: Of which URLs.
        """
        await self._wait_for(self.begin_delete(access, keys))

    def begin_delete(self, access: StoreAccess, keys: Sequence[str], *, is_awaited: bool = True) -> "asyncio.Task[None]":
        """Begin a delete, and let nothing older be stored.

        Args:
            access: The running loop's.
            keys: Of which URLs.
            is_awaited: False: nothing older is served from here on, either.
        """
        generations, started = self._generations, clock.now()
        places = {key: (access.target, key) for key in keys}
        raised = {key: generations.raise_for(place) for key, place in places.items()}
        if not is_awaited:
            for place in places.values():
                generations.distrust(place, started)
        writes = [Write(generations, places[key], raised[key], started, None, 0, is_decisive=True) for key in keys]

        async def write() -> None:
            errors, overtaken = await access.write(self._store, writes, self.wait_seconds)
            self.counts["store_errors"] += len(errors)
            for key in keys:
                if key in errors or key in overtaken:
                    generations.distrust(places[key], started)
                generations.land(places[key], raised[key])

        return self._begin(write())

    async def aclose(self) -> None:
        """Wait for the writes that are under way, as long as a request would; the store stays open."""
        here = [task for task in self._tasks if task.get_loop() is get_running_loop()]
        if here:
            await asyncio.wait(here, timeout=self.wait_seconds)
        access, self._last_access = self._last_access, None
        if access is not None and access.loop is get_running_loop():
            access.users.discard(self)
            if not access.users:
                await access.breaker.aclose()

    async def _read(self, access: StoreAccess, key: str) -> str | None:
        texts, failure = await access.read(self._store, [key], self.wait_seconds)
        if failure is not None:
            self.counts["store_errors"] += 1
        return texts.get(key)

    async def _write(self, exchange: Exchange, texts: dict[str, tuple[str, int]]) -> None:
        access, generations = exchange.access, self._generations
        if not generations.is_current((access.target, exchange.primary), exchange.generation):
            return
        if access.breaker.writes.is_open(self.wait_seconds):
            self.counts["store_errors"] += 1
            return
        started = clock.now()
        writes = [
            Write(generations, (access.target, key), exchange.generation, started, text, ttl_seconds, is_decisive=False)
            for key, (text, ttl_seconds) in texts.items()
        ]

        async def write() -> None:
            errors, _ = await access.write(self._store, writes, self.wait_seconds)
            for error in errors.values():
                self.counts["too_large" if isinstance(error, ValueTooLargeError) else "store_errors"] += 1
            self.counts["stored"] += not errors

        await self._wait_for(self._begin(write()))

    def _begin(self, write: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(write)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _wait_for(self, task: "asyncio.Task[None]") -> None:
        """Wait for a write, but not longer than a request waits for the store; it goes on in any case."""
        await asyncio.wait([task], timeout=self.wait_seconds)

    def _keep_seconds(self, stored: StoredResponse) -> int | None:
        return entries.keep_seconds(stored, is_shared=self._is_shared, revalidate_seconds=self._revalidate_seconds)


def _variant(primary: str, pointer: tuple[list[str], str], chosen_by: dict[str, str]) -> str:
    return _PREFIX + entries.digest(primary, pointer[1], *[part for pair in sorted(chosen_by.items()) for part in pair])
