"""`kv_cached_many`: for a function from a list of ids to a mapping; each id's result is stored under a key of its own."""

import asyncio
import functools
import random
import time
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, cast

from aiokv.caching.cache import MISSED, Cache, CacheInfo, Call, Found, cache_mode
from aiokv.caching.codec import Codec, ResultCodec
from aiokv.caching.decorator import check_coroutine_function
from aiokv.caching.entry import Freshness
from aiokv.caching.flight import Flight
from aiokv.caching.keys import KeyMaker
from aiokv.caching.near import NearCache
from aiokv.caching.options import CacheEvent, CacheOptions, Ttl
from aiokv.errors import AioKVError, BatchError
from aiokv.store import AsyncKVStore

K = TypeVar("K")
V = TypeVar("V")
P = ParamSpec("P")


class CachedManyFunction(Generic[K, P, V]):
    """A coroutine function from ids to a mapping, each id's result of which is shared; made by `kv_cached_many`.

    Calls that overlap in time do not wait for each other: an id that both miss is computed by both.
    """

    def __init__(self, cache: Cache[V], bound: tuple[Any, ...] = ()) -> None:
        functools.update_wrapper(self, cache.function)
        self._cache = cache
        self._bound = bound

    def __get__(self, instance: Any, owner: type | None = None) -> "CachedManyFunction[K, P, V]":
        """Bind to an instance, as a function in a class does."""
        return self if instance is None else CachedManyFunction(self._cache, (*self._bound, instance))

    def __repr__(self) -> str:
        return f"<kv_cached_many {self._cache.keys.prefix}>"

    def __call__(self, ids: Iterable[K], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, dict[K, V]]:
        """Give the results of several ids, those that are stored and those that are computed now.

        Args:
            ids: The ids; one that stands twice is asked once.
            *args: The function's other arguments.
            **kwargs: Likewise.

        Returns:
            Each id that has a result with it, in the order of the ids.
        """
        return self._get(list(dict.fromkeys(ids)), args, kwargs)

    def key(self, id_: K, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Say under what key an id's result is stored.

        Returns:
            `prefix:version:digest`.
        """
        return self._cache.keys((*self._bound, id_, *args), kwargs)

    async def invalidate(self, ids: Iterable[K], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Forget the results of several ids, in the store and here.

        Raises:
            CallError: The store could not be reached for one of them, and may still serve it.
        """
        calls = [self._call(id_, args, kwargs) for id_ in ids]
        await asyncio.gather(*(self._cache.invalidate(call) for call in calls))

    def info(self) -> CacheInfo:
        """Say what has been served, computed and saved in this process, counted by id.

        Returns:
            The counts of all calls so far.
        """
        return self._cache.info()

    async def aclose(self) -> None:
        """Finish or cancel what this function still does behind its callers in the running loop."""
        await self._cache.aclose()

    def _call(self, id_: K, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        arguments = (*self._bound, id_, *args)
        return self._cache.call(self._cache.keys(arguments, kwargs), arguments, kwargs)

    async def _get(self, ids: list[K], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[K, V]:
        mode = cache_mode.get()
        if not ids:
            return {}
        if mode == "bypass":
            return dict(await self._function(ids, args, kwargs))
        calls = {id_: self._call(id_, args, kwargs) for id_ in ids}
        served: dict[K, V] = {}
        stale: dict[K, Found] = {}
        due: dict[K, Call] = {}
        store_failed = False
        if mode == "use":
            self._serve_near(calls, served)
            unread = {id_: call for id_, call in calls.items() if id_ not in served}
            found, store_failed = await self._read(unread)
            for id_, one in found.items():
                self._serve(id_, calls[id_], one, served, stale, due)
        missing = [id_ for id_ in ids if id_ not in served]
        if missing:
            for id_ in missing:
                self._cache.count("misses", "miss", calls[id_].key)
            served |= await self._compute(missing, calls, args, kwargs, stale, skip_write=store_failed)
        if due:
            self._cache.in_background(next(iter(due.values())).loop_state, self._refresh(due, args, kwargs))
        return {id_: served[id_] for id_ in ids if id_ in served}

    def _serve_near(self, calls: Mapping[K, Call], served: dict[K, V]) -> None:
        cache, near = self._cache, self._cache.options.near
        if near is None:
            return
        for id_, call in calls.items():
            slot = near.slots.get(cache.near_key(call))
            if slot is not None and (result := cache.near_hit(slot, call.key)) is not MISSED:
                served[id_] = cast("V", result)

    async def _read(self, calls: Mapping[K, Call]) -> tuple[dict[K, Found], bool]:
        if not calls:
            return {}, False
        cache, one = self._cache, next(iter(calls.values()))
        if cache.passes_by(one.state):
            return {}, True
        texts: Mapping[str, str | None] = {}
        failed = False
        try:
            async with asyncio.timeout(cache.options.read_timeout):
                writing = one.state.writing
                if pending := [writing[call.key] for call in calls.values() if call.key in writing]:
                    # What is being written or deleted comes before what is read.
                    await asyncio.wait(pending)
                texts = await one.store.get_many([call.key for call in calls.values()])
            one.state.breaker.succeeded()
        except BatchError as error:
            # What was had is of use.
            texts, failed = error.results, True
            cache.store_failed(one, next(iter(error.errors.values())))
        except (AioKVError, TimeoutError, OSError) as error:
            failed = True
            cache.store_failed(one, error)
        found = {id_: cache.found(call.key, texts.get(call.key)) for id_, call in calls.items()}
        return {id_: one for id_, one in found.items() if one is not None}, failed

    def _serve(  # noqa: PLR0913, PLR0917 (where the result may go)
        self, id_: K, call: Call, found: Found, served: dict[K, V], stale: dict[K, Found], due: dict[K, Call]
    ) -> None:
        cache, entry, now = self._cache, found.entry, self._cache.clock()
        freshness = entry.freshness(now, cache.stale_seconds)
        if freshness is Freshness.EXPIRED:
            stale[id_] = found
            return
        if freshness is Freshness.FRESH:
            cache.count("hits", "hit", call.key)
            cache.keep_near(call, found.payload, found.value, entry.fresh_until)
        else:
            cache.count("stale_hits", "stale_hit", call.key)
        early = cache.options.early
        if freshness is Freshness.STALE or (early and entry.due_early(now, early, 1.0 - random.random())):  # noqa: S311
            due[id_] = call
        cache.counts["seconds_saved"] += entry.compute_seconds
        served[id_] = cast("V", found.value)

    async def _function(self, ids: list[K], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[K, V]:
        function = cast("Callable[..., Awaitable[Mapping[K, V]]]", self._cache.function)
        return await function(*self._bound, ids, *args, **kwargs)

    async def _compute(  # noqa: PLR0913 (the call and what is known of it)
        self,
        missing: list[K],
        calls: Mapping[K, Call],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stale: Mapping[K, Found],
        *,
        skip_write: bool,
    ) -> dict[K, V]:
        cache = self._cache
        started, timer = cache.clock(), time.perf_counter()
        # Known to those who invalidate meanwhile.
        flights = {id_: Flight({}, calls[id_].key) for id_ in missing}
        apart = calls[missing[0]].state.apart
        apart.update(flights.values())
        try:
            return await self._computed(missing, calls, args, kwargs, stale, flights, started, timer, skip_write=skip_write)
        finally:
            apart.difference_update(flights.values())

    async def _computed(  # noqa: PLR0913, PLR0917 (the call and what is known of it)
        self,
        missing: list[K],
        calls: Mapping[K, Call],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stale: Mapping[K, Found],
        flights: Mapping[K, Flight],
        started: float,
        timer: float,
        *,
        skip_write: bool,
    ) -> dict[K, V]:
        cache = self._cache
        try:
            results = await self._function(missing, args, kwargs)
        except cache.options.error_types:
            usable = {id_: one for id_, one in stale.items() if cache.clock() < one.entry.fresh_until + cache.error_seconds}
            if not all(id_ in usable for id_ in missing):
                raise
            for id_ in missing:
                cache.count("stale_hits", "stale_on_error", calls[id_].key)
            return {id_: cast("V", usable[id_].value) for id_ in missing}
        seconds = time.perf_counter() - timer
        had = [id_ for id_ in missing if id_ in results]
        for id_ in had:
            cache.count("computations", "computed", calls[id_].key, seconds)
        outcomes = await asyncio.gather(
            *(cache.keep(calls[id_], flights[id_], results[id_], started, seconds, skip_write=skip_write) for id_ in had)
        )
        return {id_: cache.own_copy(outcome) for id_, outcome in zip(had, outcomes, strict=True)}

    async def _refresh(self, due: Mapping[K, Call], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mine = {id_: call for id_, call in due.items() if call.key not in call.state.behind}
        flights = [Flight(call.state.behind, call.key) for call in mine.values()]
        if not mine:
            return
        try:
            await self._compute(list(mine), mine, args, kwargs, {}, skip_write=False)
        finally:
            for flight in flights:
                flight.leave_map()


def kv_cached_many(  # noqa: PLR0913 (keywords, each with a default that serves)
    ttl: Ttl | Callable[[Any], Ttl | None],
    *,
    store: AsyncKVStore | Callable[..., AsyncKVStore] | None = None,
    db_name: str | None = None,
    key: Callable[..., object] | None = None,
    ignore: Iterable[str] = (),
    vary: Callable[..., object] | None = None,
    prefix: str | None = None,
    version: int | str = 0,
    returns: Any = None,
    codec: Codec | Sequence[Codec] | None = None,
    when: Callable[[Any], bool] | None = None,
    none_ttl: Ttl | EllipsisType | None = ...,
    jitter: float = 0.0,
    early: float = 1.0,
    stale_while_revalidate: Ttl = 0,
    stale_if_error: Ttl = 0,
    error_types: tuple[type[Exception], ...] = (Exception,),
    read_timeout: float = 1.0,
    near: NearCache | None = None,
    on_store_error: Literal["bypass", "raise"] = "bypass",
    write: Literal["await", "background"] = "await",
    on_oversize: Literal["skip", "raise"] = "skip",
    observer: Callable[[CacheEvent], None] | None = None,
) -> Callable[[Callable[Concatenate[list[K], P], Awaitable[Mapping[K, V]]]], CachedManyFunction[K, P, V]]:
    """Share the results of a function from a list of ids to a mapping, each id's under a key of its own.

    Stored ids are fetched together, and the function is called once with the rest. An id that its mapping leaves out has no
    result, and is asked for again the next time.

    Args:
        ttl: As for `kv_cached`, like all that follow; functions of the result get one id's, `key` and `vary` get one id in
            place of the list, and `returns` is the type of one result.
        store: See `kv_cached`.
        db_name: See `kv_cached`.
        key: See `kv_cached`.
        ignore: See `kv_cached`.
        vary: See `kv_cached`.
        prefix: See `kv_cached`.
        version: See `kv_cached`.
        returns: See `kv_cached`.
        codec: See `kv_cached`.
        when: See `kv_cached`.
        none_ttl: See `kv_cached`.
        jitter: See `kv_cached`.
        early: See `kv_cached`.
        stale_while_revalidate: See `kv_cached`.
        stale_if_error: See `kv_cached`.
        error_types: See `kv_cached`.
        read_timeout: See `kv_cached`.
        near: See `kv_cached`.
        on_store_error: See `kv_cached`.
        write: See `kv_cached`.
        on_oversize: See `kv_cached`.
        observer: See `kv_cached`.

    Returns:
        A decorator for coroutine functions whose first parameter, after `self`, is the list of ids.

    Raises:
        TypeError: What is decorated is no coroutine function, or an option is of another type.
        ValueError: An option is not acceptable, or a local function has no `key`.
    """
    options = CacheOptions(
        ttl=ttl,
        store=store,
        db_name=db_name,
        when=when,
        none_ttl=none_ttl,
        jitter=jitter,
        early=early,
        stale_while_revalidate=stale_while_revalidate,
        stale_if_error=stale_if_error,
        error_types=error_types,
        read_timeout=read_timeout,
        near=near,
        on_store_error=on_store_error,
        write=write,
        on_oversize=on_oversize,
        observer=observer,
    )

    def decorate(function: Callable[Concatenate[list[K], P], Awaitable[Mapping[K, V]]]) -> CachedManyFunction[K, P, V]:
        check_coroutine_function(function)
        keys = KeyMaker(function, prefix=prefix, version=version, ignore=ignore, key=key, vary=vary)
        results = ResultCodec(function, returns, codec, part=_value_type)
        return CachedManyFunction(Cache(cast("Callable[..., Awaitable[V]]", function), keys, results, options))

    return decorate


def _value_type(returns: Any) -> Any:
    if typing.get_origin(returns) is typing.Annotated:
        returns = typing.get_args(returns)[0]
    arguments = typing.get_args(returns)
    return arguments[1] if len(arguments) == 2 else Any  # noqa: PLR2004 (a mapping's key and value)
