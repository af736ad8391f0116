"""`kv_cached_many`: for a function from a list of ids to a mapping; each id's result is stored under a key of its own."""

import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from aiokv.caching.binding import is_plain_function, make_cached
from aiokv.caching.codecs import Codec, check_codecs
from aiokv.caching.events import CacheEvent
from aiokv.caching.many_functions import (
    CachedManyClassMethod,
    CachedManyFunction,
    PlainCachedManyClassMethod,
    PlainCachedManyFunction,
)
from aiokv.caching.mappings import compute_many, value_type
from aiokv.caching.near import NearCache
from aiokv.caching.options import CacheOptions, Ttl
from aiokv.caching.shipping import Recipe
from aiokv.store import AsyncKVStore
from aiokv.sync import KVStore

K = TypeVar("K")
V = TypeVar("V")
P = ParamSpec("P")


class ManyDecorator(Protocol):
    """What `kv_cached_many` gives, as type checkers see it: for class methods, functions, and methods of instances."""

    @overload
    def __call__(
        self, function: "classmethod[Any, Concatenate[list[K], P], Coroutine[Any, Any, Mapping[K, V] | None]]", /
    ) -> CachedManyClassMethod[K, P, V]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[list[K], P], Coroutine[Any, Any, Mapping[K, V] | None]], /
    ) -> CachedManyFunction[K, P, V]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[Concatenate[Any, list[K], P], Coroutine[Any, Any, Mapping[K, V] | None]], /
    ) -> CachedManyFunction[K, P, V]: ...

    # Plain functions, likewise.
    @overload
    def __call__(
        self, function: "classmethod[Any, Concatenate[list[K], P], Mapping[K, V] | None]", /
    ) -> PlainCachedManyClassMethod[K, P, V]: ...

    @overload
    def __call__(
        self, function: Callable[Concatenate[list[K], P], Mapping[K, V] | None], /
    ) -> PlainCachedManyFunction[K, P, V]: ...

    @overload
    def __call__(  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[Concatenate[Any, list[K], P], Mapping[K, V] | None], /
    ) -> PlainCachedManyFunction[K, P, V]: ...


def kv_cached_many(  # noqa: PLR0913 (keywords, each with a default that serves)
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
            time, of a plain function one after the other. None takes any number.

    Returns:
        A decorator for functions, coroutine functions and plain ones, whose first parameter, after `self` or `cls`, is the
        list of ids; in a class it stands below `@staticmethod` and above `@classmethod`.

    Raises:
        TypeError: What is decorated is no function, or a generator; an option is of another type; or `key`, `vary` or `store`
            is a function that cannot take the arguments.
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
        is_plain = is_plain_function(function, "kv_cached_many")
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
            is_plain=is_plain,
        )
        if is_plain:
            plain: PlainCachedManyFunction[Any, ..., Any] = make_cached(PlainCachedManyFunction, recipe)
            return PlainCachedManyClassMethod(plain) if isinstance(decorated, classmethod) else plain
        cached: CachedManyFunction[Any, ..., Any] = make_cached(CachedManyFunction, recipe)
        return CachedManyClassMethod(cached) if isinstance(decorated, classmethod) else cached

    return decorate
