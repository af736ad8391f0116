"""`kv_cached`: share the results of a coroutine function through a store."""

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, Protocol, Self, TypeVar, cast, overload

from aiokv import clock
from aiokv.caching.binding import CachedCallable, check_coroutine_function, make_cached
from aiokv.caching.codecs import Codec, check_codecs
from aiokv.caching.events import CacheEvent
from aiokv.caching.flights import Call
from aiokv.caching.management import invalidate, peek, prime
from aiokv.caching.modes import cache_mode
from aiokv.caching.near import MISSED, NearCache
from aiokv.caching.options import CacheOptions, Ttl
from aiokv.caching.peeked import Peeked
from aiokv.caching.shipping import Recipe
from aiokv.store import AsyncKVStore

_get_mode = cache_mode.get
P = ParamSpec("P")
P2 = ParamSpec("P2")
R = TypeVar("R")
S_contra = TypeVar("S_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)


class _TakesInstance(Protocol[S_contra, P2, R_co]):
    def __call__(self, instance: S_contra, /, *args: P2.args, **kwargs: P2.kwargs) -> Coroutine[Any, Any, R_co]: ...


class CachedFunction(CachedCallable, Generic[P, R]):
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

    def key(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Return the key that a call's result is stored under.

        Returns:
            `prefix:version:digest`.

        Raises:
            TypeError: The arguments do not fit, or one of them cannot be part of a key.
        """
        self._check_binding()
        return self._cache.keys(self._bound + args, kwargs)

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

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[AsyncKVStore, Call]:
        self._check_binding()
        arguments = self._bound + args
        return self._cache.stores.of(arguments, kwargs), self._cache.call(arguments, kwargs)


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


# Methods are told apart by the name of their first parameter, since `object`, `Any` and type variables accept every instance
# and every class.
class _Method(Protocol[P, R_co]):
    def __call__(_self, self: Any, *args: P.args, **kwargs: P.kwargs) -> R_co: ...  # noqa: N805


class _ClassFunction(Protocol[P, R_co]):
    def __call__(_self, cls: Any, *args: P.args, **kwargs: P.kwargs) -> R_co: ...  # noqa: N805


class Decorator(Protocol):
    """What `kv_cached` gives, as type checkers see it: functions whose first parameter is `self` or `cls` are methods."""

    @overload
    def __call__(self, function: "classmethod[Any, P, Coroutine[Any, Any, R]]", /) -> CachedClassMethod[P, R]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: _ClassFunction[P, Awaitable[R]], /
    ) -> CachedClassMethod[P, R]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: _Method[P, Awaitable[R]], /
    ) -> "CachedMethod[P, R]": ...

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> CachedFunction[P, R]: ...


def compute_one(function: Callable[..., Awaitable[Any]]) -> Callable[[Sequence[Call]], Awaitable[Sequence[Any]]]:
    """Adapt a function to what a cache computes with.

    Args:
        function: The program's function.

    Returns:
        A function from one call to its result.
    """

    async def compute(calls: Sequence[Call]) -> Sequence[Any]:
        (call,) = calls
        return (await function(*call.args, **call.kwargs),)

    return compute


def whole(returns: Any) -> Any:
    """Return the type of a stored result: all that the function returns."""
    return returns


def kv_cached(  # noqa: PLR0913 (keywords, each with a default that serves)
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
) -> Decorator:
    """Share a coroutine function's results through a store; only `ttl` needs to be said.

    Args:
        ttl: How long a result is fresh, from 1 second to 30 days, counted from the end of its computation; or a function of
            the result that returns this. Of a function, None, 0 or less means not to store it, and over 30 days means 30 days.
        store: Where results live: a store, or a function that returns one; None takes `default_store()`. The function gets
            those arguments of the call that its parameters name, defaults applied. Where it has a single parameter of another
            name, it gets the call's first argument: of a method the instance, whatever it is called. Its parameters with
            defaults are left to it.
        db_name: A namespace of the default configuration, where `store` is not given.
        key: Returns what identifies a call, in place of its arguments. It gets all of them, defaults applied: by position as
            far as it takes them, the rest by name.
        ignore: Parameters that do not count, such as `self` or a session.
        vary: Returns what a call depends on beside its arguments, such as a tenant; called as `key` is.
        prefix: The readable beginning of keys; None takes module and qualified name.
        version: Pins the keys. None takes the fingerprint of the function's own source, so that a changed body is computed
            anew. Functions that it calls are not looked at: where these change, pass another version. Two functions of one
            prefix share results only where both pin the same version.
        returns: The type to decode to, where the return annotation does not say it.
        codec: Steps between JSON and the store: `Zstd()`, `Encrypted(key)`, or a list of them, `Encrypted` last.
        when: Whether a result is to be stored.
        none_ttl: `ttl` for a result of None; None not to store it, `...` as any other.
        jitter: Shortens each ttl by a random part of it, up to this share (0 to 1), so that not all expire at once.
        early: How eagerly to compute anew before a result stops being fresh; 0 never. That runs in the background, on copies of
            the arguments; it runs in the caller's own call where an argument is left out of the key or cannot be copied.
        stale_while_revalidate: For how many seconds after it stopped being fresh a result is served while it is computed anew
            in the background. Arguments that are left out of the key are used there as they are, after their caller has its
            answer: let them outlive the call.
        stale_if_error: For how many seconds after it stopped being fresh a result is served where the function fails. The next
            attempt waits 1 second, doubling to 30.
        error_types: What counts as such a failure.
        read_timeout: Seconds that a call waits for the store at most, for a read, and again for a write.
        near: A cache in this process in front of the store; no other process invalidates it.
        on_store_error: What a failing store means: `"bypass"` calls the function, `"raise"` raises the store's error.
        write: Whether a caller waits until its result is stored, for `read_timeout` at most.
        on_oversize: What a result that is too large for the store means: `"skip"` returns it and does not store it,
            `"raise"` raises.
        observer: Called with each event of each call; what it raises is logged.

    Returns:
        A decorator for coroutine functions; in a class it stands below `@staticmethod` and above `@classmethod`. Type
        checkers take functions whose first parameter is named `self` or `cls` for methods.

    Raises:
        TypeError: What is decorated is no coroutine function, an option is of another type, or `key`, `vary` or `store` is a
            function that cannot take the arguments.
        ValueError: An option is not acceptable, or a local function has no `key`.
        ConfigurationError: A step in `codec` is not usable, or `Encrypted` is not the last.
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

    # It may be an iterator, and be needed again.
    ignored = ignore if isinstance(ignore, str) else tuple(ignore)

    def decorate(decorated: Any) -> Any:
        function = decorated.__func__ if isinstance(decorated, classmethod) else decorated
        check_coroutine_function(function)
        recipe = Recipe(
            function=function,
            make_compute=compute_one,
            part=whole,
            options=options,
            codecs=check_codecs(codec),
            keys={"prefix": prefix, "version": version, "ignore": ignored, "key": key, "vary": vary},
            returns=returns,
        )
        cached: CachedFunction[..., Any] = make_cached(CachedFunction, recipe)
        return CachedClassMethod(cached) if isinstance(decorated, classmethod) else cached

    return decorate
