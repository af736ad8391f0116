"""`kv_cached`: share the results of a coroutine function through a store."""

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from types import EllipsisType
from typing import Any, Concatenate, Generic, Literal, NamedTuple, ParamSpec, Protocol, Self, TypeVar, cast, overload

from aiokv.caching.binding import CachedCallable
from aiokv.caching.cache import MISSED, Cache, cache_mode
from aiokv.caching.codec import Codec, ResultCodec
from aiokv.caching.keys import KeyMaker
from aiokv.caching.near import NearCache
from aiokv.caching.options import CacheEvent, CacheOptions, Ttl
from aiokv.caching.state import Call
from aiokv.store import AsyncKVStore

P = ParamSpec("P")
P2 = ParamSpec("P2")
R = TypeVar("R")
S = TypeVar("S")

_mode = cache_mode.get


class Peeked(NamedTuple, Generic[R]):
    """What is stored of a call.

    Args:
        value: The result.
        age: Seconds since its computation began.
        fresh: Whether a call would be served with it without a thought.
    """

    value: R
    age: float
    fresh: bool


class CachedFunction(CachedCallable[R], Generic[P, R]):
    """A coroutine function whose results are shared through a store; made by `kv_cached`."""

    __slots__ = ("_near_slots", "_quick")

    decorator_name = "kv_cached"

    def __init__(self, cache: Cache[R]) -> None:
        super().__init__(cache)
        # Each is made once, and only ever changed in place.
        self._near_slots = cache.near_slots
        self._quick = cache.keys.quick

    def bound_to(self, instance: object) -> Self:
        """Bind; see `CachedCallable.bound_to`."""
        bound = super().bound_to(instance)
        bound._near_slots = self._near_slots  # noqa: SLF001 (of this class)
        bound._quick = self._quick  # noqa: SLF001 (likewise)
        return bound

    async def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Give the result of a call, cached or computed."""
        arguments = (*self._bound, *args) if self._bound else args
        if self._near_slots:
            # The shortest way to the near cache, for plain arguments: no key is made.
            try:
                slot = self._near_slots.get(self._quick(*arguments, **kwargs))
            except TypeError:
                # An argument is not hashable, or the arguments do not fit: the long way knows.
                slot = None
            if slot is not None and _mode() == "use" and (result := self._cache.near_hit(slot)) is not MISSED:
                return result
        return await self._cache.get(arguments, kwargs)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...

    @overload
    def __get__(
        self: "CachedFunction[Concatenate[S, P2], R]", instance: S, owner: type | None = None
    ) -> "CachedFunction[P2, R]": ...

    # A static method, whose first parameter takes no instance.
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> Self: ...

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind to an instance, as a function in a class does."""
        return self if instance is None else self.bound_to(instance)

    def key(self, /, *args: P.args, **kwargs: P.kwargs) -> str:
        """Say under what key a call's result is stored.

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
        cache = self._cache
        found, _ = await cache.read(self._call(args, kwargs))
        if found is None:
            return None
        now = cache.clock()
        return Peeked(cast("R", found.value), now - found.entry.started, now < found.entry.fresh_until)

    async def refresh(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute a call anew and store that; several at once compute once. What it calls is served as ever.

        Returns:
            The new result.
        """
        self._check_binding()
        return await self._cache.get((*self._bound, *args), kwargs, "refresh")

    async def prime(self, value: R, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Store a result that was had elsewhere, as if the call had given it.

        Args:
            value: The result.
            *args: The call's arguments.
            **kwargs: Likewise.

        Raises:
            TypeError: The value would come back changed.
        """
        await self._cache.prime(self._call(args, kwargs), value)

    async def invalidate(self, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """Forget the result of a call, in the store and here; a computation under way in this process is not stored.

        Raises:
            CallError: The store could not be reached, or another event loop is still writing the result: it may be served yet.
        """
        await self._cache.invalidate(self._call(args, kwargs))

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        self._check_binding()
        arguments = self._bound + args
        return self._cache.call(self._cache.keys(arguments, kwargs), arguments, kwargs)


class CachedClassMethod(Generic[P, R]):
    """A cached class method; asked of a class or an instance, it gives a `CachedFunction` bound to the class."""

    def __init__(self, cached: CachedFunction[..., R]) -> None:
        self._cached = cached

    def __get__(self, instance: object, owner: type) -> CachedFunction[P, R]:
        """Bind to the class that it is asked of."""
        return cast("CachedFunction[P, R]", self._cached.bound_to(owner))

    def __call__(self, owner: type, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Give the result of a call for a class."""
        return self._cached(owner, *args, **kwargs)


class Decorator(Protocol):
    """What `kv_cached` gives, as type checkers see it: a function whose first parameter is a class is a class method."""

    @overload
    def __call__(self, function: "classmethod[Any, P, Coroutine[Any, Any, R]]", /) -> CachedClassMethod[P, R]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[Concatenate[type[Any], P], Awaitable[R]], /
    ) -> CachedClassMethod[P, R]: ...

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> CachedFunction[P, R]: ...


def kv_cached(  # noqa: PLR0913 (keywords, each with a default that serves)
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
) -> Decorator:
    """Share a coroutine function's results through a store; only `ttl` needs to be said.

    Args:
        ttl: How long a result is fresh, from 1 second to 30 days, or a function of the result that says so, or None not to
            store it.
        store: Where results live: a store, or a function that gives it (from the instance, for methods); None takes
            `default_store()`.
        db_name: A namespace of the default configuration, where `store` is not given.
        key: Gives what identifies a call, from its arguments, in place of them.
        ignore: Parameters that do not count, such as `self` or a session.
        vary: Gives what a call depends on beside its arguments, such as a tenant.
        prefix: The readable beginning of keys; None takes module and qualified name.
        version: Raise it where results of old code must not be served.
        returns: The type to decode to, where the return annotation does not say it.
        codec: Steps between JSON and the store: `Zstd()`, `Encrypted(key)`, or a list of them.
        when: Whether a result is to be stored.
        none_ttl: `ttl` for a result of None; None not to store it, `...` as any other.
        jitter: Shortens each ttl by a random part of it, up to this share (0 to 1), so that not all expire at once.
        early: How eagerly to compute anew, in the background, before a result ceases to be fresh; 0 never.
        stale_while_revalidate: For how many seconds after that a result is served while it is computed anew behind.
        stale_if_error: For how many seconds after that a result is served where the function fails.
        error_types: What counts as such a failure.
        read_timeout: Seconds that a call waits for the store at most.
        near: A cache in this process in front of the store; nothing invalidates it from elsewhere.
        on_store_error: Whether a failing store is gone around or raises.
        write: Whether a caller waits until its result is stored, for `read_timeout` at most.
        on_oversize: Whether a result that is too large for the store is served without being stored, or raises.
        observer: Is told what happens to each call.

    Returns:
        A decorator for coroutine functions; in a class it stands below `@staticmethod` and above `@classmethod`. mypy binds
        a static method that is called on an instance, so call it on the class.

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
        cache: Cache[Any] = Cache(function, keys, ResultCodec(function, returns, codec), options)
        cached: CachedFunction[..., Any] = CachedFunction(cache)
        return CachedClassMethod(cached) if isinstance(decorated, classmethod) else cached

    return decorate


def check_coroutine_function(function: object) -> None:
    """Check what is decorated.

    Args:
        function: Anything.

    Raises:
        TypeError: It is no coroutine function.
    """
    name = getattr(function, "__qualname__", None)
    if name is None:
        raise TypeError(f"a {type(function).__name__} is not a coroutine function (async def); call it in one, and cache that")
    if isinstance(function, classmethod | staticmethod):
        raise TypeError(f"put it below @{type(function).__name__}, not above it")
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{name} is a generator: it has no one result; collect it into a list in a coroutine and cache that")
    if not (inspect.iscoroutinefunction(function) or isinstance(function, CachedFunction)):
        raise TypeError(
            f"{name} is not a coroutine function (async def); for a blocking one, await asyncio.to_thread inside one"
        )
