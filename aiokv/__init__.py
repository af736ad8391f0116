"""aiokv: an expiring key-value store that you await, in fal's service, a server of your own, or an embedded file."""

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
from aiokv.remote.options import Credentials, HttpOptions
from aiokv.remote.retry import RetryPolicy
from aiokv.store import AsyncKVStore

__all__ = [
    "DEFAULT_TTL_SECONDS",
    "MAX_TTL_SECONDS",
    "MAX_VALUE_BYTES",
    "MIN_TTL_SECONDS",
    "AioKVError",
    "AsyncKVStore",
    "AuthenticationError",
    "BatchError",
    "CallError",
    "CallTimeoutError",
    "ConfigurationError",
    "ConnectError",
    "Credentials",
    "CredentialsError",
    "DecodeError",
    "HttpOptions",
    "PoolTimeoutError",
    "RejectedError",
    "ResponseError",
    "RetryPolicy",
    "StorageError",
    "StorageFullError",
    "StoreClosedError",
    "ThrottledError",
    "TransportError",
    "UnavailableError",
    "ValueTooLargeError",
]
