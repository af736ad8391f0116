"""The options of `kv_cached`, checked at decoration."""

import inspect
import math
from collections.abc import Callable
from datetime import timedelta
from types import EllipsisType
from typing import Any, Literal

from aiokv.caching.events import CacheEvent
from aiokv.caching.near import NearCache
from aiokv.limits import MAX_TTL_SECONDS, MIN_TTL_SECONDS, check_db_name
from aiokv.record import Record
from aiokv.store import AsyncKVStore
from aiokv.sync import KVStore

Ttl = int | float | timedelta
MIN_CACHE_TTL_SECONDS = 1.0


class CacheOptions(Record, kw_only=True):
    """The options of one cached function; see `kv_cached` for what each means."""

    ttl: Ttl | Callable[[Any], Ttl | None]
    store: AsyncKVStore | KVStore | Callable[..., AsyncKVStore | KVStore] | None = None
    db_name: str | None = None
    when: Callable[[Any], bool] | None = None
    none_ttl: Ttl | EllipsisType | None = ...
    jitter: float = 0.0
    early: float = 1.0
    stale_while_revalidate: Ttl = 0
    stale_if_error: Ttl = 0
    error_types: tuple[type[Exception], ...] = (Exception,)
    read_timeout: float = 1.0
    near: NearCache | None = None
    on_store_error: Literal["bypass", "raise"] = "bypass"
    write: Literal["await", "background"] = "await"
    on_oversize: Literal["skip", "raise"] = "skip"
    observer: Callable[[CacheEvent], None] | None = None

    def __post_init__(self) -> None:  # noqa: C901, PLR0912 (one check after the other)
        if inspect.iscoroutinefunction(self.ttl):
            raise TypeError(
                "ttl must be seconds, a timedelta or a plain function of the result, not a coroutine function; "
                "as a decorator, write @kv_cached(ttl=60) with its parentheses"
            )
        if not callable(self.ttl):
            ttl_seconds("ttl", self.ttl)
        if self.none_ttl is not ... and self.none_ttl is not None:
            ttl_seconds("none_ttl", self.none_ttl)
        if self.store is not None and self.db_name is not None:
            raise ValueError("db_name names a namespace of the default store; with store=, give the store that namespace")
        if isinstance(self.store, KVStore):
            object.__setattr__(self, "store", self.store.async_store)
        if not (isinstance(self.store, AsyncKVStore) or self.store is None or callable(self.store)):
            raise TypeError(
                f"store must be an AsyncKVStore, a KVStore or a function that gives one, not {type(self.store).__name__}"
            )
        for name, most in (("jitter", 1.0), ("early", math.inf)):
            if not 0 <= getattr(self, name) <= most or getattr(self, name) == math.inf:
                raise ValueError(f"{name} must be 0 or more{', at most 1' if most == 1 else ''}, not {getattr(self, name)!r}")
        for name in ("stale_while_revalidate", "stale_if_error"):
            if not 0 <= _seconds(name, getattr(self, name)) <= MAX_TTL_SECONDS:
                raise ValueError(f"{name} must be from 0 to {MAX_TTL_SECONDS:,} seconds, not {getattr(self, name)!r}")
        object.__setattr__(self, "read_timeout", _seconds("read_timeout", self.read_timeout))
        if not 0 < self.read_timeout < math.inf:
            raise ValueError(f"read_timeout must be more than 0 seconds, not {self.read_timeout!r}")
        for name, words in (
            ("on_store_error", {"bypass", "raise"}),
            ("write", {"await", "background"}),
            ("on_oversize", {"skip", "raise"}),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {sorted(words)}, not {getattr(self, name)!r}")
        for name in ("when", "observer"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise TypeError(f"{name} must be a function, not {type(getattr(self, name)).__name__}")
        if self.db_name is not None:
            check_db_name(self.db_name)
        kinds = self.error_types if isinstance(self.error_types, tuple) else (self.error_types,)
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in kinds):
            raise TypeError("error_types must be a tuple of exception classes")
        if self.near is not None and not isinstance(self.near, NearCache):
            raise TypeError(f"near must be a NearCache, not {type(self.near).__name__}")

    @property
    def stale_seconds(self) -> float:
        """`stale_while_revalidate` in seconds."""
        return _seconds("stale_while_revalidate", self.stale_while_revalidate)

    @property
    def error_seconds(self) -> float:
        """`stale_if_error` in seconds."""
        return _seconds("stale_if_error", self.stale_if_error)

    def ttl_of(self, result: object) -> float | None:
        """Return how long a result is fresh.

        Args:
            result: What the function returned.

        Returns:
            Seconds, without jitter; None where the result is not to be stored.

        Raises:
            ValueError: The program's ttl function returned NaN.
        """
        if self.when is not None and not self.when(result):
            return None
        if result is None and self.none_ttl is not ...:
            return None if self.none_ttl is None else ttl_seconds("none_ttl", self.none_ttl)
        if not callable(self.ttl):
            return _seconds("ttl", self.ttl)
        ttl = self.ttl(result)
        if ttl is None:
            return None
        seconds = _seconds("ttl", ttl)
        if math.isnan(seconds):
            raise ValueError("ttl must be a number of seconds, and its function returned NaN")
        return min(seconds, MAX_TTL_SECONDS) if seconds > 0 else None

    def kept_seconds(self, fresh_seconds: float) -> int:
        """Return how long the store is to hold a result.

        Args:
            fresh_seconds: How long the result is fresh.

        Returns:
            Whole seconds within the limits of the service, long enough to serve the result stale where that is allowed.
        """
        stale = max(self.stale_seconds, self.error_seconds)
        return min(max(math.ceil(fresh_seconds + stale), MIN_TTL_SECONDS), MAX_TTL_SECONDS)


def _seconds(name: str, value: Ttl) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be seconds or a timedelta, not {type(value).__name__}")
    return float(value)


def ttl_seconds(name: str, value: Ttl) -> float:
    """Check a time to live of a cached result.

    Args:
        name: The argument's name, for the message.
        value: Seconds, fractions allowed, or a `timedelta`.

    Returns:
        Seconds.

    Raises:
        TypeError: The value is of another type.
        ValueError: The value is less than a second, more than 30 days, or NaN.
    """
    seconds = _seconds(name, value)
    if not MIN_CACHE_TTL_SECONDS <= seconds <= MAX_TTL_SECONDS:
        raise ValueError(f"{name} must be from 1 to {MAX_TTL_SECONDS:,} seconds (30 days), not {seconds:,}")
    return seconds
