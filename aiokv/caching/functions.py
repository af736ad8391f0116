"""The forms of cached functions of one result: coroutine functions, and plain ones, whose methods block."""

from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, cast, overload

from aiokv import clock
from aiokv.caching.binding import AwaitedCallable, BlockingCallable, CachedCallable
from aiokv.caching.flights import Call
from aiokv.caching.management import invalidate, peek, prime
from aiokv.caching.modes import cache_mode
from aiokv.caching.near import MISSED
from aiokv.caching.peeked import Peeked
from aiokv.store import AsyncKVStore

_get_mode = cache_mode.get
P = ParamSpec("P")
P2 = ParamSpec("P2")
R = TypeVar("R")
S_contra = TypeVar("S_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class _TakesInstance(Protocol[S_contra, P2, R_co]):
    def __call__(self, instance: S_contra, /, *args: P2.args, **kwargs: P2.kwargs) -> Coroutine[Any, Any, R_co]: ...


class _TakesInstancePlainly(Protocol[S_contra, P2, R_co]):
    def __call__(self, instance: S_contra, /, *args: P2.args, **kwargs: P2.kwargs) -> R_co: ...


class _OfOneResult(CachedCallable, Generic[P]):
    """A cached function of one result, of either kind."""

    __slots__ = ()

    def key(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key that a call's result is stored under.

        Returns:
            `prefix:version:digest`.

        Raises:
            TypeError: The arguments do not fit, or one of them cannot be part of a key.
        """
        self._check_binding()
        return self._cache.keys(self._bound + args, kwargs)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[AsyncKVStore, Call]:
        self._check_binding()
        arguments = self._bound + args
        return self._cache.stores.of(arguments, kwargs), self._cache.call(arguments, kwargs)


class CachedFunction(AwaitedCallable, _OfOneResult[P], Generic[P, R]):
    """A coroutine function whose results are shared through a store; made by `kv_cached`."""

    __slots__ = ()

    decorator_name = "kv_cached"

    async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:  # noqa: C901 (one call from top to bottom)
        """Return the result of a call, cached or computed."""
        quick = self._quick
        if quick is not None and not kwargs:
            # What `NearView.quick_hit` does, written out: a call of it would cost as much as the rest of a hit.
            try:
                slot = quick(args)
            except TypeError:
                # An argument is not hashable.
                slot = None
            if slot is not None and _get_mode() == "use":
                kinds = slot.kinds
                if type(args[0]) is kinds or kinds == tuple(map(type, args)):
                    json, value = slot.json, slot.value
                    if clock.monotonic() < slot.until:
                        slot.visited = True
                        slot.counts["near_hit"] += 1
                        if json is None:
                            return value  # type: ignore[no-any-return]
                        result: R = self._cache.near.load(slot, json)  # type: ignore[union-attr]
                        if result is not MISSED:
                            return result
        cache = self._cache
        near = cache.near
        arguments = (*self._bound, *args) if self._bound else args
        if near is not None and (quick is None or kwargs or len(args) != near.direct_count):
            result = near.quick_hit(arguments, kwargs)
            if result is not MISSED:
                return result
        mode = cache_mode.get()
        if mode == "bypass":
            return await cache.function(*arguments, **kwargs)  # type: ignore[no-any-return]
        call = cache.call(arguments, kwargs)
        store = cache.stores.fixed or cache.stores.of(arguments, kwargs)
        if near is not None and mode == "use":
            result = near.get((cache.flights_of(store).target, call.key))
            if result is not MISSED:
                return result
        (result,) = await cache.read_through(store, (call,), mode)
        return result

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type | None = None) -> Self: ...

        # A method whose `self` is positional-only; see `Decorator`.
        @overload
        def __get__(
            self: "_TakesInstance[S_contra, P2, R_co]", instance: S_contra, owner: type | None = None
        ) -> "CachedFunction[P2, R_co]": ...

        # A static method, whose first parameter takes no instance.
        @overload
        def __get__(self, instance: object, owner: type | None = None) -> Self: ...

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """Bind to an instance, as a function in a class does."""

    async def peek(self, /, *args: P.args, **kwargs: P.kwargs) -> Peeked[R] | None:
        """Look at what is stored of a call, without computing.

        Returns:
            The result with its age, or None where there is none.
        """
        store, call = self._call(args, kwargs)
        return cast("Peeked[R] | None", (await peek(self._cache, store, (call,))).get(call.key))

    async def refresh(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute a call anew and store that; several refreshes at once compute once. Cached functions inside it are served.

        Where the store fails, this process serves nothing older all the same; other processes may.

        Returns:
            The new result.
        """
        store, call = self._call(args, kwargs)
        return cast("R", (await self._cache.read_through(store, (call,), "refresh"))[0])

    async def prime(self, value: R, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store a result that was computed elsewhere, as if the call had returned it.

        Args:
            value: The result.
            *args: The call's arguments.
            **kwargs: Likewise.

        Raises:
            TypeError: Values of this type would come back changed.
            ValueError: The value cannot be stored.
            CallError: The value is not known to be stored.
        """
        store, call = self._call(args, kwargs)
        await prime(self._cache, store, (call,), (value,))

    async def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Delete the result of a call, in the store and here; a computation under way in this process is not stored.

        Raises:
            CallError: The store failed: other processes may serve the result, this one does not. Or another event loop is still
                storing an older result, which may be served until that has ended.
        """
        store, call = self._call(args, kwargs)
        for error in (await invalidate(self._cache, store, (call,))).values():
            raise error


class CachedClassMethod(Generic[P, R]):
    """A cached class method; asked of a class or an instance, it gives a `CachedFunction` bound to the class."""

    def __init__(self, cached: CachedFunction[..., R]) -> None:
        # Named as that of a classmethod.
        self.__func__ = cached

    def __get__(self, instance: object, owner: type) -> CachedFunction[P, R]:
        """Bind to the class that it is asked of."""
        return cast("CachedFunction[P, R]", self.__func__.bound_to(owner))

    def __call__(self, owner: type, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Give the result of a call for a class."""
        return self.__func__(owner, *args, **kwargs)


class PlainCachedFunction(BlockingCallable, _OfOneResult[P], Generic[P, R]):
    """A plain function whose results are shared through a store; made by `kv_cached`.

    Calls and methods block. The function runs in the thread that calls; the store is asked in the background loop. So a call
    works in any thread, and where an event loop runs it blocks that. The function cannot be cancelled: an exception that
    arrives in its thread, such as `KeyboardInterrupt`, ends it and its call, and other callers of the key compute their own.
    """

    __slots__ = ()

    decorator_name = "kv_cached"

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the result of a call, cached or computed."""
        cache = self._cache
        near = cache.near
        arguments = (*self._bound, *args) if self._bound else args
        if near is not None:
            result: R = near.quick_hit(arguments, kwargs)
            if result is not MISSED:
                return result
        mode = cache_mode.get()
        if mode == "bypass":
            return cache.function(*arguments, **kwargs)  # type: ignore[no-any-return]
        call = cache.call(arguments, kwargs)
        store = cache.stores.fixed or cache.stores.of(arguments, kwargs)
        if near is not None and mode == "use":
            result = near.get((store.target, call.key))
            if result is not MISSED:
                return result
        return cast("R", self._wait(lambda: cache.read_through(store, (call,), mode))[0])

    if TYPE_CHECKING:

        @overload
        def __get__(self, instance: None, owner: type | None = None) -> Self: ...

        # A method whose `self` is positional-only; see `Decorator`.
        @overload
        def __get__(
            self: "_TakesInstancePlainly[S_contra, P2, R_co]", instance: S_contra, owner: type | None = None
        ) -> "PlainCachedFunction[P2, R_co]": ...

        # A static method, whose first parameter takes no instance.
        @overload
        def __get__(self, instance: object, owner: type | None = None) -> Self: ...

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            """Bind to an instance, as a function in a class does."""

    def peek(self, /, *args: P.args, **kwargs: P.kwargs) -> Peeked[R] | None:
        """Look at what is stored of a call, without computing; see `CachedFunction.peek`."""
        store, call = self._call(args, kwargs)
        return self._wait(lambda: peek(self._cache, store, (call,))).get(call.key)

    def refresh(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute a call anew and store that; see `CachedFunction.refresh`."""
        store, call = self._call(args, kwargs)
        return cast("R", self._wait(lambda: self._cache.read_through(store, (call,), "refresh"))[0])

    def prime(self, value: R, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store a result that was computed elsewhere; see `CachedFunction.prime`."""
        store, call = self._call(args, kwargs)
        self._wait(lambda: prime(self._cache, store, (call,), (value,)))

    def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Delete the result of a call; see `CachedFunction.invalidate`."""
        store, call = self._call(args, kwargs)
        for error in self._wait(lambda: invalidate(self._cache, store, (call,))).values():
            raise error


class PlainCachedClassMethod(Generic[P, R]):
    """A cached plain class method; asked of a class or an instance, it gives a `PlainCachedFunction` bound to the class."""

    def __init__(self, cached: PlainCachedFunction[..., R]) -> None:
        # Named as that of a classmethod.
        self.__func__ = cached

    def __get__(self, instance: object, owner: type) -> PlainCachedFunction[P, R]:
        """Bind to the class that it is asked of."""
        return cast("PlainCachedFunction[P, R]", self.__func__.bound_to(owner))

    def __call__(self, owner: type, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Give the result of a call for a class."""
        return self.__func__(owner, *args, **kwargs)


if TYPE_CHECKING:

    class CachedMethod(CachedFunction[Concatenate[Any, P], R], Generic[P, R]):
        """A cached method as it stands in its class: a `CachedFunction` at run time, and at each access."""

        @overload
        async def __call__(self, instance: Any, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

        # Pyright looks for the methods of a protocol without `__get__`.
        @overload
        async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

        async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
            """Return the result of a call; see `CachedFunction`."""

        @overload  # type: ignore[override]
        def __get__(self, instance: None, owner: type | None = None) -> CachedFunction[Concatenate[Any, P], R]: ...

        @overload
        def __get__(self, instance: object, owner: type | None = None) -> CachedFunction[P, R]: ...

        def __get__(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, instance: Any, owner: type | None = None
        ) -> Any:
            """Bind to an instance."""

    class PlainCachedMethod(PlainCachedFunction[Concatenate[Any, P], R], Generic[P, R]):
        """A cached plain method as it stands in its class; see `CachedMethod`."""

        @overload
        def __call__(self, instance: Any, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

        @overload
        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

        def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
            """Return the result of a call; see `PlainCachedFunction`."""

        @overload  # type: ignore[override]
        def __get__(self, instance: None, owner: type | None = None) -> PlainCachedFunction[Concatenate[Any, P], R]: ...

        @overload
        def __get__(self, instance: object, owner: type | None = None) -> PlainCachedFunction[P, R]: ...

        def __get__(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, instance: Any, owner: type | None = None
        ) -> Any:
            """Bind to an instance."""
