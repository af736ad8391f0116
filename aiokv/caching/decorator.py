"""`kv_cached`: share the results of a function through a store."""

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, overload

from aiokv.caching.binding import is_plain_function, make_cached
from aiokv.caching.codecs import Codec, check_codecs
from aiokv.caching.events import CacheEvent
from aiokv.caching.flights import Call
from aiokv.caching.functions import CachedClassMethod, CachedFunction, PlainCachedClassMethod, PlainCachedFunction
from aiokv.caching.near import NearCache
from aiokv.caching.options import CacheOptions, Ttl
from aiokv.caching.shipping import Recipe
from aiokv.store import AsyncKVStore
from aiokv.sync import KVStore

if TYPE_CHECKING:
    from aiokv.caching.functions import CachedMethod, PlainCachedMethod

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


# Methods are told apart by the name of their first parameter, since `object`, `Any` and type variables accept every instance
# and every class.
class _Method(Protocol[P, R_co]):
    def __call__(_self, self: Any, *args: P.args, **kwargs: P.kwargs) -> R_co: ...  # noqa: N805


class _ClassFunction(Protocol[P, R_co]):
    def __call__(_self, cls: Any, *args: P.args, **kwargs: P.kwargs) -> R_co: ...  # noqa: N805


class Decorator(Protocol):
    """What `kv_cached` gives, as type checkers see it: functions whose first parameter is `self` or `cls` are methods."""

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: "classmethod[Any, P, Coroutine[Any, Any, R]]", /
    ) -> CachedClassMethod[P, R]: ...

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, function: _ClassFunction[P, Coroutine[Any, Any, R]], /
    ) -> CachedClassMethod[P, R]: ...

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, function: _Method[P, Coroutine[Any, Any, R]], /
    ) -> "CachedMethod[P, R]": ...

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> CachedFunction[P, R]: ...

    # Plain functions, likewise.
    @overload
    def __call__(self, function: "classmethod[Any, P, R]", /) -> PlainCachedClassMethod[P, R]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: _ClassFunction[P, R], /
    ) -> PlainCachedClassMethod[P, R]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: _Method[P, R], /
    ) -> "PlainCachedMethod[P, R]": ...

    @overload
    def __call__(self, function: Callable[P, R], /) -> PlainCachedFunction[P, R]: ...


def compute_one(function: Callable[..., Awaitable[Any]]) -> Callable[[Sequence[Call]], Coroutine[Any, Any, Sequence[Any]]]:
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
    store: AsyncKVStore | KVStore | Callable[..., AsyncKVStore | KVStore] | None = None,
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
    """Share a function's results through a store; only `ttl` needs to be said.

    A coroutine function (`async def`) stays one. A plain function (`def`) stays a plain one: it is called without `await`,
    runs in the thread that calls it, and blocks that while the store is asked. A coroutine function and a plain one of equal
    `prefix`, `version` and arguments share their results.

    Args:
        ttl: How long a result is fresh, from 1 second to 30 days, counted from the end of its computation; or a function of
            the result that returns this. Of a function, None, 0 or less means not to store it, and over 30 days means 30 days.
        store: Where results live: a store of either kind, or a function that returns one; None takes `default_store()`. The
            function gets those arguments of the call that its parameters name, defaults applied. Where it has a single
            parameter of another name, it gets the call's first argument: of a method the instance, whatever it is called. Its
            parameters with defaults are left to it.
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
            the arguments; it runs in the caller's own call where an argument is left out of the key or cannot be copied. Of
            a plain function, background means a thread of a pool of 4, with a copy of the caller's context variables.
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
        observer: Called with each event of each call; what it raises is logged. For a plain function this and functions of
            the result run in the thread of the background loop: they must not block.

    Returns:
        A decorator for functions; in a class it stands below `@staticmethod` and above `@classmethod`. Type checkers take
        functions whose first parameter is named `self` or `cls` for methods.

    Raises:
        TypeError: What is decorated is no function, a generator, or a method of an instance without `key`; an option is of
            another type; or `key`, `vary` or `store` is a function that cannot take the arguments.
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
        is_plain = is_plain_function(function, "kv_cached")
        recipe = Recipe(
            function=function,
            make_compute=compute_one,
            part=whole,
            options=options,
            codecs=check_codecs(codec),
            keys={"prefix": prefix, "version": version, "ignore": ignored, "key": key, "vary": vary},
            returns=returns,
            is_plain=is_plain,
        )
        if is_plain:
            plain: PlainCachedFunction[..., Any] = make_cached(PlainCachedFunction, recipe)
            return PlainCachedClassMethod(plain) if isinstance(decorated, classmethod) else plain
        cached: CachedFunction[..., Any] = make_cached(CachedFunction, recipe)
        return CachedClassMethod(cached) if isinstance(decorated, classmethod) else cached

    return decorate
