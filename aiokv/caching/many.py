"""`kv_cached_many`: for a function from a list of ids to a mapping; each id's result is stored under a key of its own."""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from types import CoroutineType, EllipsisType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from aiokv.caching.binding import CachedCallable, check_coroutine_function, make_cached
from aiokv.caching.codecs import Codec, check_codecs
from aiokv.caching.events import CacheEvent
from aiokv.caching.flights import ABSENT, Call
from aiokv.caching.management import invalidate, peek, prime
from aiokv.caching.mappings import compute_many, value_type
from aiokv.caching.modes import Mode, cache_mode
from aiokv.caching.near import MISSED, NearCache
from aiokv.caching.options import CacheOptions, Ttl
from aiokv.caching.peeked import Peeked
from aiokv.caching.shipping import Recipe
from aiokv.errors import AioKVError, BatchError
from aiokv.store import AsyncKVStore
from aiokv.target import Target

K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
P = ParamSpec("P")


F = TypeVar("F", bound=Callable[..., Any])


def _ids_by_name(method: F) -> F:
    """Let the ids of a method be passed as `ids=`, or by the name of the function's parameter."""

    @functools.wraps(method)
    def call(self: "CachedManyFunction[Any, ..., Any]", /, *args: Any, **kwargs: Any) -> Any:
        position = 1 if self._lacks_instance() else 0
        if len(args) == position and kwargs:
            name = self._ids_name()
            if name not in kwargs and name != "ids" and "ids" not in inspect.signature(self._cache.function).parameters:
                name = "ids"
            if name in kwargs:
                args = (*args, kwargs.pop(name))
        return method(self, *args, **kwargs)

    return cast("F", call)


class CachedManyFunction(CachedCallable, Generic[K, P, V]):
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

    def key(self, id_: K, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key that an id's result is stored under.

        Returns:
            `prefix:version:digest`.
        """
        self._check_binding()
        before, one, after = self._split((id_, *args))
        return self._call((*before, one, *after), kwargs, len(before)).key

    @_ids_by_name
    async def peek(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> dict[K, Peeked[V]]:
        """Look at what is stored of several ids, without computing.

        Returns:
            Each id that has a stored result with it, in the order of the ids.
        """
        self._check_binding()
        calls = self._calls((ids, *args), kwargs)
        peeked = await _together(peek(self._cache, store, part) for store, part in self._by_store(calls).items())
        by_key = {key: one for part in peeked for key, one in part.items()}
        return {id_: by_key[call.key] for id_, call in calls.items() if call.key in by_key}

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
        self._check_binding()
        given: object = args[0] if self._lacks_instance() and args else values
        if not isinstance(given, Mapping):
            raise TypeError(f"prime takes a mapping from ids to results, not {type(given).__name__}")
        calls = self._calls((values, *args), kwargs)
        values = dict(given)
        by_call = {id(call): values[id_] for id_, call in calls.items()}
        await _together(
            prime(self._cache, store, part, [by_call[id(call)] for call in part])
            for store, part in self._by_store(calls).items()
        )

    @_ids_by_name
    async def invalidate(self, ids: Iterable[K], *args: P.args, **kwargs: P.kwargs) -> None:
        """Delete the results of several ids, in the store and here; computations under way in this process are not stored.

        Raises:
            BatchError: The store failed for some of them; it lists by id what was deleted and what may still be stored. Other
                processes may serve the latter, this one serves nothing older.
        """
        self._check_binding()
        calls = self._calls((ids, *args), kwargs)
        parts = await _together(invalidate(self._cache, store, part) for store, part in self._by_store(calls).items())
        failed = {key: error for part in parts for key, error in part.items()}
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

    def _by_store(self, calls: Mapping[K, Call]) -> dict[AsyncKVStore, list[Call]]:
        """Return the calls by store, those of one target under one store."""
        by_target: dict[Target, AsyncKVStore] = {}
        by_store: dict[AsyncKVStore, list[Call]] = {}
        for call in calls.values():
            store = self._cache.stores.of(call.args, call.kwargs)
            if store not in by_store:
                store = by_target.setdefault(store.target, store)
            by_store.setdefault(store, []).append(call)
        return by_store

    async def _get(self, mode: Mode | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[K, V]:
        cache, mode = self._cache, mode or cache_mode.get()
        before, ids, after = self._split(args)
        results: dict[K, Any] = dict.fromkeys(self._unique(ids), MISSED)
        if mode == "use" and cache.near is not None:
            for id_ in results:
                results[id_] = cache.near.quick_hit((*before, id_, *after), kwargs)
        calls = {
            id_: self._call((*before, id_, *after), kwargs, len(before)) for id_, result in results.items() if result is MISSED
        }
        if mode == "bypass":
            computed = await cache.computations.compute_all(list(calls.values())) if calls else []
            results.update(zip(calls, computed, strict=True))
        else:
            parts = [(store, part) for store, part in self._by_store(calls).items() if part]
            read = await _together(self._read_through(store, part, mode) for store, part in parts)
            by_key = {key: result for part in read for key, result in part.items()}
            results.update({id_: by_key[call.key] for id_, call in calls.items()})
        return {id_: result for id_, result in results.items() if result is not ABSENT}

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


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Do the same with several stores at once; with one at once, since a task would let others go first."""
    works = list(works)
    return [await works[0]] if len(works) == 1 else await asyncio.gather(*works)


class CachedManyClassMethod(Generic[K, P, V]):
    """A cached class method of ids; asked of a class or an instance, it gives a `CachedManyFunction` bound to the class."""

    def __init__(self, cached: CachedManyFunction[K, ..., V]) -> None:
        # Named as that of a classmethod.
        self.__func__ = cached

    def __get__(self, instance: object, owner: type) -> CachedManyFunction[K, P, V]:
        """Bind to the class that it is asked of."""
        return cast("CachedManyFunction[K, P, V]", self.__func__.bound_to(owner))


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
    version: int | str | None = None,
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
    batch_size: int | None = None,
) -> ManyDecorator:
    """Share the results of a function from a list of ids to a mapping, each id's under a key of its own.

    Stored ids are fetched together, calls that overlap join, and the function is called once with the rest (once for each
    store, where `store` is a function that returns different ones). The function returns a `Mapping`, or None for an empty one.
    An id that it leaves out has no result, and is asked for again the next time. A result under an id of another type, such
    as `"1"` for 1, is a `TypeError`.

    Args:
        ttl: As for `kv_cached`, like all that follow; functions of the result get one id's, functions in `key`, `vary` and
            `store` get one id in place of the list, and `returns` is the type of one result.
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
        batch_size: How many ids the function takes at once, 1 or more; more ids are computed in several calls at the same
            time. None takes any number.

    Returns:
        A decorator for coroutine functions whose first parameter, after `self` or `cls`, is the list of ids; in a class it
        stands below `@staticmethod` and above `@classmethod`.

    Raises:
        TypeError: What is decorated is no coroutine function, an option is of another type, or `key`, `vary` or `store` is a
            function that cannot take the arguments.
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

    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
        raise TypeError(f"batch_size must be None or an int, not {type(batch_size).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")

    # It may be an iterator, and be needed again.
    ignored = ignore if isinstance(ignore, str) else tuple(ignore)

    def decorate(decorated: Any) -> Any:
        function = decorated.__func__ if isinstance(decorated, classmethod) else decorated
        check_coroutine_function(function)
        names = [name for name in inspect.signature(function).parameters if name not in {"self", "cls"}]
        if names and names[0] in ((ignored,) if isinstance(ignored, str) else ignored):
            raise TypeError(
                f"{function.__qualname__}: ignore names {names[0]!r}, the first parameter, which must be the list of ids; "
                "put the ids first"
            )
        recipe = Recipe(
            function=function,
            make_compute=compute_many,
            part=value_type,
            options=options,
            codecs=check_codecs(codec),
            keys={"prefix": prefix, "version": version, "ignore": ignored, "key": key, "vary": vary},
            returns=returns,
            batch_size=batch_size,
        )
        cached: CachedManyFunction[Any, ..., Any] = make_cached(CachedManyFunction, recipe)
        return CachedManyClassMethod(cached) if isinstance(decorated, classmethod) else cached

    return decorate
