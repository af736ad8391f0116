"""aiokv: an expiring key-value store that you await, in fal's service, a server of your own, or an embedded file."""

from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.caching.cache import CacheInfo, cache_bypass, cache_refresh
from aiokv.caching.codec import JSON, Codec, Encrypted, Zstd
from aiokv.caching.decorator import CachedFunction, Peeked, kv_cached
from aiokv.caching.many import CachedManyFunction, kv_cached_many
from aiokv.caching.near import NearCache
from aiokv.caching.options import CacheEvent
from aiokv.errors import (
    AioKVError,
    AuthenticationError,
    BatchError,
    CallError,
    CallTimeoutError,
    ConfigurationError,
    ConnectError,
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
    ValueTooLargeError,
)
from aiokv.limits import DEFAULT_TTL_SECONDS, MAX_TTL_SECONDS, MAX_VALUE_BYTES, MIN_TTL_SECONDS
from aiokv.store import AsyncKVStore, default_store, set_default_store
from aiokv.telemetry import CallEnded, CallHedged, CallRetried, CallStarted, Event, Observer, TokenRenewed

__all__ = [
    "DEFAULT_TTL_SECONDS",
    "JSON",
    "MAX_TTL_SECONDS",
    "MAX_VALUE_BYTES",
    "MIN_TTL_SECONDS",
    "AioKVError",
    "AsyncKVStore",
    "AuthenticationError",
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
    "Codec",
    "ConfigurationError",
    "ConnectError",
    "Credentials",
    "CredentialsError",
    "DecodeError",
    "Encrypted",
    "Event",
    "HedgePolicy",
    "HttpOptions",
    "NearCache",
    "Observer",
    "Peeked",
    "PoolTimeoutError",
    "RejectedError",
    "ResponseError",
    "RetryPolicy",
    "StorageError",
    "StorageFullError",
    "StoreClosedError",
    "ThrottledError",
    "TokenRenewed",
    "TransportError",
    "UnavailableError",
    "ValueTooLargeError",
    "Zstd",
    "cache_bypass",
    "cache_refresh",
    "default_store",
    "kv_cached",
    "kv_cached_many",
    "set_default_store",
]
