"""The forms of cached functions of many ids: coroutine functions, and plain ones, whose methods block."""

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

from aiokv.caching.binding import AwaitedCallable, BlockingCallable, CachedCallable
from aiokv.caching.callers import run_here
from aiokv.caching.flights import ABSENT, Call
from aiokv.caching.management import invalidate, peek, prime
from aiokv.caching.modes import Mode, cache_mode
from aiokv.caching.near import MISSED
from aiokv.caching.peeked import Peeked
from aiokv.errors import AioKVError, BatchError
from aiokv.store import AsyncKVStore
from aiokv.target import Target

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
P = ParamSpec("P")

# The calls for each store.
Parts = Mapping[AsyncKVStore, Sequence[Call]]

F = TypeVar("F", bound=Callable[..., Any])


def _ids_by_name(method: F) -> F:
    """Let the ids of a method be passed as `ids=`, or by the name of the function's parameter."""

    @functools.wraps(method)
    def call(self: "_OfManyResults[Any, ..., Any]", /, *args: Any, **kwargs: Any) -> Any:
        position = 1 if self._lacks_instance() else 0
        if len(args) == position and kwargs:
            name = self._ids_name()
            if name not in kwargs and name != "ids" and "ids" not in inspect.signature(self._cache.function).parameters:
                name = "ids"
            if name in kwargs:
                args = (*args, kwargs.pop(name))
        return method(self, *args, **kwargs)

    return cast("F", call)


class _OfManyResults(CachedCallable, Generic[K, P, V]):
    """A cached function of many ids, of either kind."""

    __slots__ = ()

    def key(self, id_: K, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key that an id's result is stored under.

        Returns:
            `prefix:version:digest`.
        """
        self._check_binding()
        before, one, after = self._split((id_, *args))
        return self._call((*before, one, *after), kwargs, len(before)).key

    async def _peek(self, calls: Mapping[K, Call], parts: Parts) -> dict[K, Peeked[V]]:
        peeked = await _together(peek(self._cache, store, part) for store, part in parts.items())
        by_key = {key: one for part in peeked for key, one in part.items()}
        return {id_: by_key[call.key] for id_, call in calls.items() if call.key in by_key}

    def _primings(
        self, values: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[AsyncKVStore, Sequence[Call], list[Any]]]:
        """Return for each store what is to be stored there: the calls and their results."""
        self._check_binding()
        given: object = args[0] if self._lacks_instance() and args else values
        if not isinstance(given, Mapping):
            raise TypeError(f"prime takes a mapping from ids to results, not {type(given).__name__}")
        calls = self._calls((values, *args), kwargs)
        values = dict(given)
        by_call = {id(call): values[id_] for id_, call in calls.items()}
        return [(store, part, [by_call[id(call)] for call in part]) for store, part in self._by_store(calls).items()]

    async def _prime(self, primings: Iterable[tuple[AsyncKVStore, Sequence[Call], list[Any]]]) -> None:
        await _together(prime(self._cache, *priming) for priming in primings)

    async def _invalidate(self, calls: Mapping[K, Call], parts: Parts) -> None:
        failures = await _together(invalidate(self._cache, store, part) for store, part in parts.items())
        failed = {key: error for part in failures for key, error in part.items()}
        errors: dict[Any, Exception] = {}
        for id_, call in calls.items():
            error = failed.get(call.key)
            if isinstance(error, AioKVError):
                errors[id_] = error
            elif error is not None:
                # Of a backend of the program's own: as it would come from a single call.
                raise error
        if errors:
            raise BatchError(errors, dict.fromkeys([id_ for id_ in calls if id_ not in errors]), ())

    def _lacks_instance(self) -> bool:
        return not self._bound and self._cache.stores.first in {"self", "cls"}

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]]:
        """Return the arguments before the ids, the ids, and the arguments after them."""
        arguments = (*self._bound, *args)
        position = 1 if self._bound or self._lacks_instance() else 0
        if len(arguments) <= position:
            raise TypeError(f"{self._cache.function.__qualname__}() misses its argument {self._ids_name()!r}")
        return arguments[:position], arguments[position], arguments[position + 1 :]

    def _calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[K, Call]:
        """Return a call for each id."""
        before, ids, after = self._split(args)
        return {id_: self._call((*before, id_, *after), kwargs, len(before)) for id_ in self._unique(ids)}

    def _unique(self, ids: Any) -> Iterable[K]:
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise TypeError(f"{self._ids_name()} must be an iterable of ids, not {type(ids).__name__}; put one id in a list")
        return dict.fromkeys(ids)

    def _call(self, arguments: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> Call:
        key, is_settled = self._cache.keys.make(arguments, kwargs)
        return Call(key, is_settled, arguments, kwargs, position)

    def _ids_name(self) -> str:
        names = list(inspect.signature(self._cache.function).parameters)
        position = 1 if self._bound or self._lacks_instance() else 0
        return names[position] if position < len(names) else "ids"

    def _by_store(self, calls: Mapping[K, Call]) -> Parts:
        """Return the calls by store, those of one target under one store. The function in `store` runs in this thread."""
        by_target: dict[Target, AsyncKVStore] = {}
        by_store: dict[AsyncKVStore, list[Call]] = {}
        for call in calls.values():
            store = self._cache.stores.of(call.args, call.kwargs)
            if store not in by_store:
                store = by_target.setdefault(store.target, store)
            by_store.setdefault(store, []).append(call)
        return by_store

    def _begin(
        self, mode: Mode | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[K, Any], dict[K, Call], Mode]:
        """Return what this process remembers of several ids, the calls of the others, and what to do with these."""
        cache, mode = self._cache, mode or cache_mode.get()
        before, ids, after = self._split(args)
        results: dict[K, Any] = dict.fromkeys(self._unique(ids), MISSED)
        if mode == "use" and cache.near is not None:
            for id_ in results:
                results[id_] = cache.near.quick_hit((*before, id_, *after), kwargs)
        calls = {
            id_: self._call((*before, id_, *after), kwargs, len(before)) for id_, result in results.items() if result is MISSED
        }
        return results, calls, mode

    async def _fetch(self, calls: Mapping[K, Call], parts: Parts, mode: Mode) -> dict[K, Any]:
        """Return the results of calls, from the store or computed."""
        # The one thread of a plain call computes for one store after the other.
        together = _one_by_one if self._cache.computations.is_plain else _together
        read = await together(self._read_through(store, part, mode) for store, part in parts.items())
        by_key = {key: result for part in read for key, result in part.items()}
        return {id_: by_key[call.key] for id_, call in calls.items()}

    async def _read_through(self, store: AsyncKVStore, calls: Sequence[Call], mode: Mode) -> dict[str, Any]:
        cache = self._cache
        results: dict[str, Any] = {}
        if cache.near is not None and mode == "use":
            target = cache.flights_of(store).target
            results = {call.key: cache.near.get((target, call.key)) for call in calls}
            calls = [call for call in calls if results[call.key] is MISSED]
        if calls:
            results.update(zip([call.key for call in calls], await cache.read_through(store, calls, mode), strict=True))
        return results


class CachedManyFunction(AwaitedCallable, _OfManyResults[K, P, V], Generic[K, P, V]):
    """A coroutine function from ids to a mapping, each id's result of which is shared; made by `kv_cached_many`."""

    __slots__ = ()

    decorator_name = "kv_cached_many"

    if TYPE_CHECKING:

        def __get__(self, instance: Any, owner: type | None = None) -> "CachedManyFunction[K, P, V]":
            """Bind to an instance, as a function in a class does."""
            raise NotImplementedError

    @_ids_by_name
    def __call__(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> "CoroutineType[Any, Any, dict[K, V]]":
        """Return the results of several ids, those that are stored and those that are computed now.

        Args:
            ids: The ids; one that stands twice is asked for once. They may also be passed as `ids=`, whatever the function
                calls them.
            *args: The function's other arguments.
            **kwargs: Likewise.

        Returns:
            Each id that has a result with it, in the order of the ids.
        """
        return cast("CoroutineType[Any, Any, dict[K, V]]", self._get(None, (ids, *args), kwargs))

    @_ids_by_name
    async def peek(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> dict[K, Peeked[V]]:
        """Look at what is stored of several ids, without computing.

        Returns:
            Each id that has a stored result with it, in the order of the ids.
        """
        self._check_binding()
        calls = self._calls((ids, *args), kwargs)
        return await self._peek(calls, self._by_store(calls))

    @_ids_by_name
    async def refresh(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> dict[K, V]:
        """Compute several ids anew and store that; several refreshes of an id at once compute it once.

        Returns:
            The new results, as from a call.
        """
        self._check_binding()
        return await self._get("refresh", (ids, *args), kwargs)

    async def prime(self, values: Mapping[K, V], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store results that were computed elsewhere, as if a call had returned them.

        Args:
            values: Results by id.
            *args: The function's other arguments.
            **kwargs: Likewise.

        Raises:
            TypeError: Values of this type would come back changed.
            ValueError: A value cannot be stored.
            CallError: A value is not known to be stored.
        """
        await self._prime(self._primings(values, args, kwargs))

    @_ids_by_name
    async def invalidate(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> None:
        """Delete the results of several ids, in the store and here; computations under way in this process are not stored.

        Raises:
            BatchError: The store failed for some of them; it lists by id what was deleted and what may still be stored. Other
                processes may serve the latter, this one serves nothing older.
        """
        self._check_binding()
        calls = self._calls((ids, *args), kwargs)
        await self._invalidate(calls, self._by_store(calls))

    async def _get(self, mode: Mode | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[K, V]:
        results, calls, mode = self._begin(mode, args, kwargs)
        if mode == "bypass":
            computed = await self._cache.computations.compute_all(list(calls.values())) if calls else []
            results.update(zip(calls, computed, strict=True))
        elif calls:
            results.update(await self._fetch(calls, self._by_store(calls), mode))
        return {id_: result for id_, result in results.items() if result is not ABSENT}


class PlainCachedManyFunction(BlockingCallable, _OfManyResults[K, P, V], Generic[K, P, V]):
    """A plain function from ids to a mapping, each id's result of which is shared; made by `kv_cached_many`.

    Calls and methods block, as those of `PlainCachedFunction`. With `batch_size`, one batch is computed after the other.
    """

    __slots__ = ()

    decorator_name = "kv_cached_many"

    if TYPE_CHECKING:

        def __get__(self, instance: Any, owner: type | None = None) -> "PlainCachedManyFunction[K, P, V]":
            """Bind to an instance, as a function in a class does."""
            raise NotImplementedError

    @_ids_by_name
    def __call__(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> dict[K, V]:
        """Return the results of several ids, those that are stored and those that are computed now.

        Args:
            ids: The ids; see `CachedManyFunction`.
            *args: The function's other arguments.
            **kwargs: Likewise.

        Returns:
            Each id that has a result with it, in the order of the ids.
        """
        return self._get(None, (ids, *args), kwargs)

    @_ids_by_name
    def peek(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> dict[K, Peeked[V]]:
        """Look at what is stored of several ids, without computing; see `CachedManyFunction.peek`."""
        self._check_binding()
        calls = self._calls((ids, *args), kwargs)
        parts = self._by_store(calls)
        return self._wait(lambda: self._peek(calls, parts))

    @_ids_by_name
    def refresh(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> dict[K, V]:
        """Compute several ids anew and store that; see `CachedManyFunction.refresh`."""
        self._check_binding()
        return self._get("refresh", (ids, *args), kwargs)

    def prime(self, values: Mapping[K, V], /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store results that were computed elsewhere; see `CachedManyFunction.prime`."""
        primings = self._primings(values, args, kwargs)
        self._wait(lambda: self._prime(primings))

    @_ids_by_name
    def invalidate(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> None:
        """Delete the results of several ids; see `CachedManyFunction.invalidate`."""
        self._check_binding()
        calls = self._calls((ids, *args), kwargs)
        parts = self._by_store(calls)
        self._wait(lambda: self._invalidate(calls, parts))

    def _get(self, mode: Mode | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[K, V]:
        results, calls, mode = self._begin(mode, args, kwargs)
        if mode == "bypass":
            computations = self._cache.computations
            batches = computations.batches(list(calls.values()))
            computed = [value for batch in batches for value in run_here(computations.compute(batch))]
            results.update(zip(calls, computed, strict=True))
        elif calls:
            parts = self._by_store(calls)
            results.update(self._wait(lambda: self._fetch(calls, parts, mode)))
        return {id_: result for id_, result in results.items() if result is not ABSENT}


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do the same with several stores at once; with one at once, since a task would let others go first."""
    works = list(works)
    return [await works[0]] if len(works) == 1 else await asyncio.gather(*works)


async def _one_by_one(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do the same with one store after the other."""
    works = list(works)
    try:
        return [await work for work in works]
    finally:
        for work in works:
            work.close()


class CachedManyClassMethod(Generic[K, P, V]):
    """A cached class method of ids; asked of a class or an instance, it gives a `CachedManyFunction` bound to the class."""

    def __init__(self, cached: CachedManyFunction[K, ..., V]) -> None:
        # Named as that of a classmethod.
        self.__func__ = cached

    def __get__(self, instance: object, owner: type) -> CachedManyFunction[K, P, V]:
        """Bind to the class that it is asked of."""
        return cast("CachedManyFunction[K, P, V]", self.__func__.bound_to(owner))


class PlainCachedManyClassMethod(Generic[K, P, V]):
    """A cached plain class method of ids, which gives a `PlainCachedManyFunction` bound to the class."""

    def __init__(self, cached: PlainCachedManyFunction[K, ..., V]) -> None:
        # Named as that of a classmethod.
        self.__func__ = cached

    def __get__(self, instance: object, owner: type) -> PlainCachedManyFunction[K, P, V]:
        """Bind to the class that it is asked of."""
        return cast("PlainCachedManyFunction[K, P, V]", self.__func__.bound_to(owner))
