"""`kv_cached_many`: for a function from a list of ids to a mapping; each id's result is stored under a key of its own."""

import asyncio
import collections
import logging
import random
import time
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from aiokv.caching.binding import CachedCallable
from aiokv.caching.breaker import is_cancelled
from aiokv.caching.cache import MAX_BACKGROUND_TASKS, MISSED, Cache, Found, Mode, cache_mode
from aiokv.caching.codec import Codec, ResultCodec
from aiokv.caching.decorator import check_coroutine_function
from aiokv.caching.entry import Entry, Freshness
from aiokv.caching.flight import Flight
from aiokv.caching.keys import KeyMaker
from aiokv.caching.near import NearCache
from aiokv.caching.options import CacheEvent, CacheOptions, Ttl
from aiokv.caching.state import Call, StoreState
from aiokv.errors import BatchError
from aiokv.store import DEFAULT_CONCURRENCY, AsyncKVStore

K = TypeVar("K")
V = TypeVar("V")
A = TypeVar("A")
T = TypeVar("T")
P = ParamSpec("P")

logger = logging.getLogger("aiokv")


class CachedManyFunction(CachedCallable[V], Generic[K, P, V]):
    """A coroutine function from ids to a mapping, each id's result of which is shared; made by `kv_cached_many`.

    Calls that overlap in time do not wait for each other: an id that both miss is computed by both.
    """

    __slots__ = ()

    decorator_name = "kv_cached_many"

    def __get__(self, instance: Any, owner: type | None = None) -> "CachedManyFunction[K, P, V]":
        """Bind to an instance, as a function in a class does."""
        return self if instance is None else self.bound_to(instance)

    def __call__(self, ids: Iterable[K], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, dict[K, V]]:
        """Give the results of several ids, those that are stored and those that are computed now.

        Args:
            ids: The ids; one that stands twice is asked once.
            *args: The function's other arguments.
            **kwargs: Likewise.

        Returns:
            Each id that has a result with it, in the order of the ids.
        """
        if self._lacks_instance():
            # As a function of a class is called with the instance first.
            return cast("Coroutine[Any, Any, dict[K, V]]", cast("Any", self.bound_to(ids))(*args, **kwargs))
        return self._get(list(dict.fromkeys(ids)), args, kwargs)

    def key(self, id_: K, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Say under what key an id's result is stored.

        Returns:
            `prefix:version:digest`.
        """
        if self._lacks_instance():
            self._check_binding()
            return cast("str", cast("Any", self.bound_to(id_)).key(*args, **kwargs))
        return self._cache.keys((*self._bound, id_, *args), kwargs)

    async def invalidate(self, ids: Iterable[K], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Forget the results of several ids, in the store and here; computations under way in this process are not stored.

        Raises:
            CallError: The store could not be reached for one of them, and may still serve it.
        """
        if self._lacks_instance():
            self._check_binding()
            await cast("Any", self.bound_to(ids)).invalidate(*args, **kwargs)
            return
        calls = [self._call(id_, args, kwargs) for id_ in dict.fromkeys(ids)]
        await _a_few_at_a_time(self._cache.invalidate, calls)

    def _lacks_instance(self) -> bool:
        return not self._bound and self._cache.first_parameter in {"self", "cls"}

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
        if mode == "use":
            self._serve_near(calls, served)
        else:
            for call in calls.values():
                self._cache.overtake(call)
        # Known to those who invalidate meanwhile, from before the store is read.
        flights = {id_: Flight({}, call.key) for id_, call in calls.items() if id_ not in served}
        for id_, flight in flights.items():
            calls[id_].state.set_apart(flight)
        try:
            if flights:
                await self._serve_rest(calls, flights, served, args, kwargs, mode)
        finally:
            for id_, flight in flights.items():
                calls[id_].state.forget_apart(flight)
        return {id_: served[id_] for id_ in ids if id_ in served}

    async def _serve_rest(  # noqa: PLR0913, PLR0917 (the call and what is known of it)
        self,
        calls: Mapping[K, Call],
        flights: Mapping[K, Flight],
        served: dict[K, V],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mode: Mode,
    ) -> None:
        stale: dict[K, Found] = {}
        due: dict[K, Entry] = {}
        store_failed = False
        if mode == "use":
            found, store_failed = await self._read({id_: calls[id_] for id_ in flights})
            for id_, one in found.items():
                self._serve(id_, calls[id_], flights[id_], one, served, stale, due)
        missing = {id_: flight for id_, flight in flights.items() if id_ not in served}
        for id_, flight in missing.items():
            flight.refreshes = mode == "refresh"
            self._cache.count("misses", "miss", calls[id_].key)
        if due:
            state = next(iter(calls.values())).loop_state
            if len(state.background) < MAX_BACKGROUND_TASKS:
                state.in_background(self._refresh({id_: calls[id_] for id_ in due}, due, args, kwargs))
        if missing:
            served |= await self._compute(missing, calls, args, kwargs, stale, skip_write=store_failed)

    def _serve_near(self, calls: Mapping[K, Call], served: dict[K, V]) -> None:
        cache, near = self._cache, self._cache.options.near
        if near is None:
            return
        for id_, call in calls.items():
            slot = near.slots.get(cache.near_key(call))
            if slot is not None and (result := cache.near_hit(slot, call.key)) is not MISSED:
                served[id_] = result

    async def _read(self, calls: Mapping[K, Call]) -> tuple[dict[K, Found], bool]:
        """Read what is stored of several calls; those of one store together."""
        by_state: dict[StoreState, dict[K, Call]] = {}
        for id_, call in calls.items():
            by_state.setdefault(call.state, {})[id_] = call
        if len(by_state) == 1:
            return await self._read_of_one_store(calls)
        read = await asyncio.gather(*(self._read_of_one_store(part) for part in by_state.values()))
        found = {id_: one for part, _ in read for id_, one in part.items()}
        return found, any(failed for _, failed in read)

    async def _read_of_one_store(self, calls: Mapping[K, Call]) -> tuple[dict[K, Found], bool]:
        cache, one = self._cache, next(iter(calls.values()))
        if cache.passes_by(one.state):
            return {}, True
        texts: Mapping[str, str | None] = {}
        failed = False
        try:
            async with asyncio.timeout(cache.options.read_timeout):
                writing = one.state.writing
                if pending := [writing[call.key].task for call in calls.values() if call.key in writing]:
                    # What is being written or deleted comes before what is read.
                    await asyncio.wait(pending)
                texts = await one.store.get_many([call.key for call in calls.values()])
            one.state.breaker.succeeded()
        except BatchError as error:
            # What was had is of use.
            texts, failed = error.results, True
            cache.store_failed(one, next(iter(error.errors.values())))
        except (Exception, asyncio.CancelledError) as error:
            if is_cancelled(error):
                raise
            failed = True
            cache.store_failed(one, error)
        found = {id_: cache.found(call.key, texts.get(call.key)) for id_, call in calls.items()}
        return {id_: one for id_, one in found.items() if one is not None}, failed

    def _serve(  # noqa: PLR0913, PLR0917 (where the result may go)
        self,
        id_: K,
        call: Call,
        flight: Flight,
        found: Found,
        served: dict[K, V],
        stale: dict[K, Found],
        due: dict[K, Entry],
    ) -> None:
        cache, entry, now = self._cache, found.entry, self._cache.clock()
        freshness = entry.freshness(now, cache.stale_seconds)
        if freshness is Freshness.EXPIRED:
            stale[id_] = found
            return
        if freshness is Freshness.FRESH:
            cache.count("hits", "hit", call.key)
            cache.keep_near(call, flight, found.payload, found.value, entry.fresh_until)
        else:
            cache.count("stale_hits", "stale_hit", call.key)
        early = cache.options.early
        if freshness is Freshness.STALE or (early and entry.due_early(now, early, 1.0 - random.random())):  # noqa: S311
            due[id_] = entry
        cache.counts["seconds_saved"] += entry.compute_seconds
        served[id_] = cast("V", found.value)

    async def _function(self, ids: list[K], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[K, V]:
        function = cast("Callable[..., Awaitable[Mapping[K, V] | None]]", self._cache.function)
        results = await function(*self._bound, ids, *args, **kwargs)
        return {} if results is None else results

    async def _compute(  # noqa: PLR0913 (the call and what is known of it)
        self,
        flights: Mapping[K, Flight],
        calls: Mapping[K, Call],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stale: Mapping[K, Found],
        *,
        skip_write: bool,
    ) -> dict[K, V]:
        """Run the function with the ids that flights are given for, and store what it gives."""
        cache, missing = self._cache, list(flights)
        cache.results.resolve()
        started, timer = cache.clock(), time.perf_counter()
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
        had = [id_ for id_ in flights if id_ in results]
        for id_ in had:
            cache.count("computations", "computed", calls[id_].key, seconds)
        gone = [id_ for id_, flight in flights.items() if flight.refreshes and id_ not in results]
        await _a_few_at_a_time(lambda id_: cache.remove(calls[id_]), gone)
        outcomes = await _a_few_at_a_time(
            lambda id_: cache.keep(calls[id_], flights[id_], results[id_], started, seconds, skip_write=skip_write), had
        )
        return {id_: cache.own_copy(outcome) for id_, outcome in zip(had, outcomes, strict=True)}

    async def _refresh(
        self, due: Mapping[K, Call], seen: Mapping[K, Entry], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Compute several ids anew together, but for those that another process has been faster with, or is at."""
        flights = {id_: Flight(call.state.behind, call.key) for id_, call in due.items() if call.key not in call.state.behind}
        try:
            await self._refresh_flights(flights, due, seen, args, kwargs)
        except Exception as error:  # noqa: BLE001 (the callers have their answers; the function's own errors may say anything)
            logger.debug("computing ids of %s anew behind a caller failed: %s", self._cache.keys.prefix, type(error).__name__)
        finally:
            for flight in flights.values():
                flight.leave_map()

    async def _refresh_flights(
        self,
        flights: Mapping[K, Flight],
        calls: Mapping[K, Call],
        seen: Mapping[K, Entry],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        cache = self._cache
        found, store_failed = await self._read({id_: calls[id_] for id_ in flights})
        newer = {id_: one for id_, one in found.items() if one.entry.started > seen[id_].started}
        for id_, one in newer.items():
            cache.keep_near(calls[id_], flights[id_], one.payload, one.value, one.entry.fresh_until)
        older = [id_ for id_ in flights if id_ not in newer]
        mine = older if store_failed else await self._claim(older, calls, seen)
        computing = {id_: flights[id_] for id_ in mine if not flights[id_].discarded}
        if computing:
            await self._compute(computing, calls, args, kwargs, {}, skip_write=store_failed)
        if others := [seen[id_].compute_seconds for id_ in older if id_ not in mine]:
            # Until those are likely to be done, there is no use in asking again.
            await asyncio.sleep(min(max(others), 1.0))

    async def _claim(self, ids: list[K], calls: Mapping[K, Call], seen: Mapping[K, Entry]) -> list[K]:
        claims = await _a_few_at_a_time(lambda id_: self._cache.claimed(calls[id_], seen[id_].compute_seconds), ids)
        return [id_ for id_, claimed in zip(ids, claims, strict=True) if claimed]


async def _a_few_at_a_time(work: Callable[[A], Awaitable[T]], items: Iterable[A]) -> list[T]:
    """Do the same to several items, to no more at once than a store is asked for."""
    turns = asyncio.Semaphore(DEFAULT_CONCURRENCY)

    async def one(item: A) -> T:
        async with turns:
            return await work(item)

    return await asyncio.gather(*map(one, items))


class CachedManyClassMethod(Generic[K, P, V]):
    """A cached class method of ids; asked of a class or an instance, it gives a `CachedManyFunction` bound to the class."""

    def __init__(self, cached: CachedManyFunction[K, ..., V]) -> None:
        self._cached = cached

    def __get__(self, instance: object, owner: type) -> CachedManyFunction[K, P, V]:
        """Bind to the class that it is asked of."""
        return cast("CachedManyFunction[K, P, V]", self._cached.bound_to(owner))


class ManyDecorator(Protocol):
    """What `kv_cached_many` gives, as type checkers see it: for class methods, functions, and methods of instances."""

    @overload
    def __call__(
        self, function: "classmethod[Any, Concatenate[list[K], P], Coroutine[Any, Any, Mapping[K, V] | None]]", /
    ) -> CachedManyClassMethod[K, P, V]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[list[K], P], Awaitable[Mapping[K, V] | None]], /
    ) -> CachedManyFunction[K, P, V]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[Concatenate[Any, list[K], P], Awaitable[Mapping[K, V] | None]], /
    ) -> CachedManyFunction[K, P, V]: ...


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
) -> ManyDecorator:
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
        A decorator for coroutine functions whose first parameter, after `self` or `cls`, is the list of ids; in a class it
        stands below `@staticmethod` and above `@classmethod`.

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

    def decorate(decorated: Any) -> Any:
        function = decorated.__func__ if isinstance(decorated, classmethod) else decorated
        check_coroutine_function(function)
        keys = KeyMaker(function, prefix=prefix, version=version, ignore=ignore, key=key, vary=vary)
        results = ResultCodec(function, returns, codec, part=value_type)
        cached: CachedManyFunction[Any, ..., Any] = CachedManyFunction(Cache(function, keys, results, options))
        return CachedManyClassMethod(cached) if isinstance(decorated, classmethod) else cached

    return decorate


def value_type(returns: Any) -> Any:
    """Find the type of one result in the return annotation of a function that gives a mapping.

    Args:
        returns: The annotation, resolved: a mapping type, or a union of such and None.

    Returns:
        The type of the mapping's values; `Any` where the annotation does not say it.

    Raises:
        TypeError: It is no mapping, or a `TypedDict`, whose values differ.
    """
    returns = _without_names(returns)
    if returns is Any or returns is object:
        return Any
    origin, arguments = typing.get_origin(returns), typing.get_args(returns)
    if origin in {typing.Union, types.UnionType}:
        parts = [value_type(part) for part in arguments if part is not type(None)]
        return typing.Union[tuple(parts)]  # noqa: UP007 (of parts that are not known here)
    kind = returns if origin is None else origin
    if isinstance(kind, type) and issubclass(kind, dict) and hasattr(kind, "__total__"):
        raise TypeError(
            f"the function returns the TypedDict {kind.__qualname__}, whose values are of several types; "
            "annotate a mapping from ids to results, or pass returns= with the type of one result"
        )
    if not (isinstance(kind, type) and issubclass(kind, Mapping)):
        raise TypeError(
            f"the function returns {getattr(kind, '__qualname__', kind)}, not a mapping from ids to results; "
            "make it return one, such as dict[int, User], and annotate that"
        )
    return _value_of_class(kind, arguments)


def _without_names(returns: Any) -> Any:
    """Look through metadata, aliases and new names to the type that they stand for."""
    while True:
        origin = typing.get_origin(returns)
        alias = returns if origin is None else origin
        if origin is typing.Annotated:
            returns = typing.get_args(returns)[0]
        elif hasattr(alias, "__value__") and hasattr(alias, "__type_params__"):
            # Of a `type` statement.
            returns = _with_arguments(alias.__value__, alias.__type_params__, typing.get_args(returns))
        elif hasattr(returns, "__supertype__"):
            returns = returns.__supertype__
        else:
            return returns


def _with_arguments(generic: Any, parameters: Sequence[Any], arguments: Sequence[Any]) -> Any:
    known = dict(zip(parameters, arguments, strict=False))
    wanted = getattr(generic, "__parameters__", ())
    return generic[tuple(known.get(parameter, Any) for parameter in wanted)] if wanted else generic


def _value_of_class(kind: type, arguments: tuple[Any, ...]) -> Any:
    if kind is collections.Counter:
        return int
    if kind.__module__ in {"builtins", "collections", "collections.abc", "types"}:
        return arguments[1] if len(arguments) == 2 else Any  # noqa: PLR2004 (a mapping's key and value)
    # A class of the program's: what it says of the mapping that it is.
    bases = kind.__dict__.get("__orig_bases__", kind.__bases__)
    parameters = dict.fromkeys(parameter for base in bases for parameter in getattr(base, "__parameters__", ()))
    for base in bases:
        origin = typing.get_origin(base) or base
        if isinstance(origin, type) and issubclass(origin, Mapping):
            said = _with_arguments(base, getattr(kind, "__parameters__", tuple(parameters)), arguments)
            return _value_of_class(origin, typing.get_args(said))
    return Any
