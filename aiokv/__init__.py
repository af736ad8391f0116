"""aiokv: an expiring key-value store that you await, in fal's service, a server of your own, or an embedded file."""

from typing import TYPE_CHECKING

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import KeyInfo
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.redis.options import RedisOptions
from aiokv.backends.watching import Changed, Lost
from aiokv.changes import Changes
from aiokv.claiming import Claim
from aiokv.default_store import default_store, set_default_store
from aiokv.errors import (
    AioKVError,
    AuthenticationError,
    BatchError,
    CallError,
    CallTimeoutError,
    ConfigurationError,
    ConnectError,
    CorruptValueError,
    CredentialsError,
    DecodeError,
    PoolTimeoutError,
    RejectedError,
    ResponseError,
    StorageError,
    StorageFullError,
    StoreClosedError,
    ThrottledError,
    TransportError,
    UnavailableError,
    UnsupportedError,
    ValueTooLargeError,
)
from aiokv.limits import DEFAULT_TTL_SECONDS, MAX_TTL_SECONDS, MAX_VALUE_BYTES, MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore
from aiokv.target import Target
from aiokv.telemetry import CallEnded, CallHedged, CallRetried, CallStarted, Event, Observer, TokenRenewed

if TYPE_CHECKING:
    from aiokv.caching.codecs import JSON, Codec, Encrypted, Zstd
    from aiokv.caching.decorator import kv_cached
    from aiokv.caching.events import CacheEvent, CacheInfo
    from aiokv.caching.functions import CachedFunction, PlainCachedFunction
    from aiokv.caching.many import kv_cached_many
    from aiokv.caching.many_functions import CachedManyFunction, PlainCachedManyFunction
    from aiokv.caching.modes import cache_bypass, cache_refresh
    from aiokv.caching.near import NearCache
    from aiokv.caching.packed import Packed
    from aiokv.caching.peeked import Peeked
    from aiokv.sync import KVStore

__all__ = [
    "DEFAULT_TTL_SECONDS",
    "JSON",
    "MAX_TTL_SECONDS",
    "MAX_VALUE_BYTES",
    "MIN_TTL_SECONDS",
    "AioKVError",
    "AsyncKVStore",
    "AuthenticationError",
    "Backend",
    "BatchError",
    "CacheEvent",
    "CacheInfo",
    "CachedFunction",
    "CachedManyFunction",
    "CallEnded",
    "CallError",
    "CallHedged",
    "CallRetried",
    "CallStarted",
    "CallTimeoutError",
    "Changed",
    "Changes",
    "Claim",
    "Codec",
    "ConfigurationError",
    "ConnectError",
    "CorruptValueError",
    "Credentials",
    "CredentialsError",
    "DecodeError",
    "Encrypted",
    "Event",
    "HedgePolicy",
    "HttpOptions",
    "KVStore",
    "KeyInfo",
    "Lost",
    "NearCache",
    "Observer",
    "Packed",
    "Peeked",
    "PlainCachedFunction",
    "PlainCachedManyFunction",
    "PoolTimeoutError",
    "RedisOptions",
    "RejectedError",
    "ResponseError",
    "RetryPolicy",
    "StorageError",
    "StorageFullError",
    "StoreClosedError",
    "Target",
    "ThrottledError",
    "TokenRenewed",
    "TransportError",
    "UnavailableError",
    "UnsupportedError",
    "ValueTooLargeError",
    "Zstd",
    "cache_bypass",
    "cache_refresh",
    "default_store",
    "kv_cached",
    "kv_cached_many",
    "set_default_store",
]


if not TYPE_CHECKING:
    # A program that only awaits stores does not pay for the caching decorators, which are more than half of the package, nor
    # for the blocking store. Type checkers see the imports above alone, and so know a name that is not there.
    def __getattr__(name: str) -> object:
        if name in __all__:
            from importlib import import_module  # noqa: PLC0415

            if name == "KVStore":
                return globals().setdefault(name, import_module("aiokv.sync").KVStore)
            for module in ("decorator", "many", "functions", "codecs", "modes", "events", "packed"):
                home = vars(import_module(f"aiokv.caching.{module}"))
                if name in home:
                    return globals().setdefault(name, home[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
