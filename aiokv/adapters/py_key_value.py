"""A store of the package py-key-value as a `Backend`: DynamoDB, MongoDB, PostgreSQL, S3, Memcached, files and others.

```python
from key_value.aio.stores.dynamodb import DynamoDBStore
from aiokv import AsyncKVStore
from aiokv.adapters.py_key_value import from_key_value

async with DynamoDBStore(table_name="kv") as engine:
    store = AsyncKVStore("weather", backend=from_key_value(engine))
    await store.set("oslo", "3 °C, rain", ttl=600)
```

A namespace is a collection. An entry is the document `{"value": "3 °C, rain", "expires_at": 1800000000.0}`; a value with NUL,
which some engines refuse, is `{"base64": ...}` instead of `{"value": ...}`.

The limits of such a store:

- **Names.** py-key-value joins collection and key by `::`, cuts long names or marks them by 32 bits of a digest, and many
  engines take only some characters. So `portable_names` writes what is no `a-z`, `0-9` or `-` as `_` and two hexadecimal
  digits for each byte, and ends a name that is too long by 160 bits of a digest. Two names never become one. A store then never
  sees more than 100 characters of a collection and 128 of a key.
- **Values.** Many engines take less than aiokv's 1.9 MB. What they refuse is a `CallError` of some kind.
- **Expiry.** It is exact by this process's clock: `expires_at` is checked at each read. The engine gets one second more, since
  some cut fractions off. A store that is full may drop entries before their expiry, and some never free expired ones.
- **Atomicity.** There is none across keys. A batch that fails may be in the store in part.
- **Deletes.** Whether there was an entry is not used, since stores disagree on it.
- **No listing, claims or watching**: py-key-value lists at most 10,000 keys, and has none of the others.
- **Failures.** A call is tried once; a write that fails has `maybe_applied` unless the store is known to have refused it.
  py-key-value's `RetryWrapper` and `TimeoutWrapper` add attempts and a bound in time. A cancelled write may be applied later.
- **Loops and threads.** Most stores belong to one event loop. Those for disks block it while they read and write.

`docs/adapters.md` has a table of the engines.
"""

import base64
import binascii
import errno
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any, Final, TypeVar

from aiokv import clock
from aiokv.backends.capabilities import MAX_BATCH_BYTES, OMITTED, Entry, Omitted
from aiokv.errors import (
    CallError,
    CallTimeoutError,
    ConnectError,
    CorruptValueError,
    RejectedError,
    ResponseError,
    StorageFullError,
    TransportError,
    UnavailableError,
    ValueTooLargeError,
)
from aiokv.limits import MAX_TTL_SECONDS

try:
    from key_value.aio import errors as kv_errors
    from key_value.aio.protocols.key_value import AsyncKeyValue
except ImportError as missing:
    raise ImportError(
        "aiokv.adapters.py_key_value needs the package py-key-value-aio: pip install 'aiokv[py-key-value]'"
    ) from missing

MAX_COLLECTION_CHARS: Final = 100
MAX_KEY_CHARS: Final = 128
"""Longest portable names. Together with `::` they fit the 240 characters that Memcached takes, the strictest engine."""

# Some engines cut a fraction of a second off; the document says exactly when the entry ends.
_SLACK_SECONDS: Final = 1
_FIRST_KEYS: Final = 32
_DIGEST_BYTES: Final = 20
_PLAIN: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")
_IS_PLAIN: Final = re.compile(r"[a-z0-9-]+").fullmatch
_METHODS: Final = ("get", "put", "delete", "get_many", "put_many", "delete_many")

# What a store is known to have refused, by the class of its exception: nothing was stored.
_REFUSALS: Final[tuple[tuple[type[Exception], type[CallError], str], ...]] = (
    (kv_errors.ValueTooLargeError, ValueTooLargeError, "the value is larger than the engine takes"),
    (kv_errors.EntryTooLargeError, ValueTooLargeError, "the value is larger than the store's wrapper allows"),
    (kv_errors.EntryTooSmallError, RejectedError, "the value is smaller than the store's wrapper allows"),
    (kv_errors.ReadOnlyError, RejectedError, "the store is read-only"),
    (kv_errors.InvalidKeyError, RejectedError, "the store does not take this name"),
    (kv_errors.InvalidTTLError, RejectedError, "the store does not take this time to live"),
    (kv_errors.PathSecurityError, RejectedError, "the store does not take this name"),
    (kv_errors.SerializationError, RejectedError, "the store cannot write this value"),
)
_DAMAGE: Final = (kv_errors.DeserializationError, kv_errors.EncryptionError)

_T = TypeVar("_T")


class KeyValueBackend:
    """A backend over a py-key-value store; `from_key_value` makes it."""

    def __init__(self, store: AsyncKeyValue, *, portable_names: bool, close_store: bool) -> None:
        self._store = store
        self._portable = portable_names
        self._close_store = close_store

    @property
    def batches_are_atomic(self) -> bool:
        """Return False: some keys of a batch may be stored and others not."""
        return False

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        collection, name = self._names(db_name, key)
        document = await self._call("get", db_name, key, partial(self._store.get, name, collection=collection))
        value = self._text_of(db_name, key, document)
        if isinstance(value, CallError):
            raise value
        return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        collection, name = self._names(db_name, key)
        document = self._document(value, ttl_seconds)
        put = partial(self._store.put, name, document, collection=collection, ttl=_engine_ttl(ttl_seconds))
        await self._call("set", db_name, key, put)

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        collection, name = self._names(db_name, key)
        await self._call("delete", db_name, key, partial(self._store.delete, name, collection=collection))

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Sequence[str | Omitted | CallError | None]:
        """Read values; see `BatchBackend.get_many`."""
        outcomes: list[str | Omitted | CallError | None] = []
        room = MAX_BATCH_BYTES
        # Few at first: a thousand of the largest values would be gigabytes.
        step = _FIRST_KEYS
        while len(outcomes) < len(keys) and (room > 0 or not outcomes):
            part = keys[len(outcomes) : len(outcomes) + step]
            names = [self._key(key) for key in part]
            get = partial(self._store.get_many, names, collection=self._collection(db_name))
            documents = await self._call("get", db_name, part[0], get)
            if len(documents) != len(part):
                reason = f"the store answered {len(documents)} of {len(part)} keys"
                raise self._error(ResponseError, reason, "get", db_name, part[0])
            for key, document in zip(part, documents, strict=True):
                outcome = self._text_of(db_name, key, document)
                room -= _size_of(key) + (_size_of(outcome) if isinstance(outcome, str) else 0)
                outcomes.append(outcome if room >= 0 or not outcomes else OMITTED)
            mean_bytes = max(1, (MAX_BATCH_BYTES - room) // len(outcomes))
            step = max(1, room // mean_bytes)
        return outcomes + [OMITTED] * (len(keys) - len(outcomes))

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
        """Store values; see `BatchBackend.set_many`."""
        # A time to live counts for a whole call of the store, and the order of equal keys is not promised there.
        of_ttl: dict[int, dict[str, str]] = {}
        for entry in {entry.key: entry for entry in entries}.values():
            of_ttl.setdefault(entry.ttl_seconds, {})[entry.key] = entry.value
        failures: dict[str, CallError] = {}
        collection = self._collection(db_name)
        for ttl_seconds, values in of_ttl.items():
            put = partial(
                self._store.put_many,
                [self._key(key) for key in values],
                [self._document(value, ttl_seconds) for value in values.values()],
                collection=collection,
                ttl=_engine_ttl(ttl_seconds),
            )
            failures |= await self._call_for_all("set", db_name, values, put)
        return [failures.get(entry.key) for entry in entries]

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> Sequence[CallError | None]:
        """Delete entries; see `BatchBackend.delete_many`."""
        unique = list(dict.fromkeys(keys))
        names = [self._key(key) for key in unique]
        delete = partial(self._store.delete_many, names, collection=self._collection(db_name))
        failures = await self._call_for_all("delete", db_name, unique, delete)
        return [failures.get(key) for key in keys]

    async def aclose(self) -> None:
        """Close the py-key-value store if `close_store` says so, else leave it open: it belongs to whoever made it."""
        close = getattr(self._store, "close", None)
        if self._close_store and close is not None:
            await self._call("", "", "", close)

    def _names(self, db_name: str, key: str) -> tuple[str, str]:
        return self._collection(db_name), self._key(key)

    def _collection(self, db_name: str) -> str:
        if self._portable:
            return _portable_collection(db_name)
        # py-key-value joins collection and key by `::`, so that a collection with a colon could be another one.
        return db_name.replace("%", "%25").replace(":", "%3A")

    def _key(self, key: str) -> str:
        return _portable_name(key, MAX_KEY_CHARS) if self._portable else key

    def _document(self, value: str, ttl_seconds: int) -> dict[str, Any]:
        expires_at = clock.now() + ttl_seconds
        if "\0" in value:
            return {"base64": base64.b64encode(value.encode(errors="surrogatepass")).decode(), "expires_at": expires_at}
        return {"value": value, "expires_at": expires_at}

    def _text_of(self, db_name: str, key: str, document: Mapping[str, Any] | None) -> str | CallError | None:
        """Return what a document holds, None where it has expired, or the error that it is none of ours."""
        if document is None:
            return None
        # A document without it was written by another program; the store itself counts its time.
        expires_at = document.get("expires_at")
        if isinstance(expires_at, int | float) and clock.now() >= expires_at:
            return None
        value = document.get("value")
        if value is None and isinstance(encoded := document.get("base64"), str):
            try:
                value = base64.b64decode(encoded, validate=True).decode(errors="surrogatepass")
            except (binascii.Error, UnicodeDecodeError):
                value = None
        if isinstance(value, str):
            return value
        return self._error(
            CorruptValueError, "the document there holds no text of aiokv's; set or delete the key", "get", db_name, key
        )

    async def _call(self, verb: str, db_name: str, key: str, call: Callable[[], Awaitable[_T]]) -> _T:
        """Await a call of the store; raise what it fails with as a `CallError`."""
        try:
            return await call()
        except CallError:
            raise
        except Exception as error:  # noqa: BLE001 (drivers raise anything)
            failure = self._failure(error, verb, db_name, key)
        # Not chained: a driver's message may hold the value.
        raise failure

    async def _call_for_all(
        self, verb: str, db_name: str, keys: Iterable[str], call: Callable[[], Awaitable[object]]
    ) -> dict[str, CallError]:
        """Await a write of several keys; return an error for each of them where it fails."""
        try:
            await call()
        except Exception as error:  # noqa: BLE001 (drivers raise anything)
            # The store may have written some of them before it refused one.
            return {key: self._failure(error, verb, db_name, key, is_batch=True) for key in keys}
        return {}

    def _failure(self, error: Exception, verb: str, db_name: str, key: str, *, is_batch: bool = False) -> CallError:
        """Return the error that stands for one of the store's, without its text."""
        is_write = verb in {"set", "delete"}
        for kind, ours, reason in _REFUSALS:
            if isinstance(error, kind):
                return self._error(ours, reason, verb, db_name, key, maybe_applied=is_batch)
        name = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
        if isinstance(error, kv_errors.StoreSetupError):
            return self._error(ConnectError, "the store could not be opened", verb, db_name, key)
        if isinstance(error, _DAMAGE):
            return self._error(CorruptValueError, f"the entry cannot be decoded ({name})", verb, db_name, key)
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return self._error(StorageFullError, "the store's disk is full", verb, db_name, key, maybe_applied=is_batch)
        kind, reason = UnavailableError, f"the store failed with {name}"
        if _is_named(error, "Timeout", "TimeoutError"):
            kind, reason = CallTimeoutError, f"the store did not answer in time ({name})"
        elif _is_named(error, "ConnectionError", "ConnectionFailure"):
            kind, reason = TransportError, f"the connection to the engine broke ({name})"
        return self._error(kind, reason, verb, db_name, key, maybe_applied=is_write)

    def _error(  # noqa: PLR0913 (each is a fact about the call)
        self, kind: type[CallError], reason: str, verb: str, db_name: str, key: str, *, maybe_applied: bool = False
    ) -> CallError:
        reason = f"{type(self._store).__name__} of py-key-value: {reason}"
        return kind(reason, verb=verb, db_name=db_name, key=key, attempts=1, maybe_applied=maybe_applied)


def from_key_value(store: AsyncKeyValue, *, portable_names: bool = True, close_store: bool = False) -> KeyValueBackend:
    """Make a `Backend` of a py-key-value store; see the module for its limits.

    Args:
        store: Any store or wrapper of py-key-value, such as `RedisStore(...)` or `RetryWrapper(...)`. It is opened at its first
            call, unless it is already.
        portable_names: Whether collections and keys are written in characters and lengths that every engine takes. False
            leaves keys as they are, which other programs of the same engine may want; keys that the engine cannot tell apart,
            or refuses, are then up to you. In a collection `%` and `:` are percent-encoded even then.
        close_store: Whether `aclose` of the backend closes the store, too. `AsyncKVStore` never closes a `backend=`.

    Returns:
        The backend, which takes batches, too.

    Raises:
        TypeError: The store lacks a method of py-key-value's protocol `AsyncKeyValue`.
    """
    absent = [name for name in _METHODS if not callable(getattr(store, name, None))]
    if isinstance(store, type) or absent:
        raise TypeError(
            f"store must be an object with py-key-value's protocol AsyncKeyValue, not {_kind_of(store)}"
            + (f", which lacks {', '.join(absent)}" if absent else "")
        )
    return KeyValueBackend(store, portable_names=portable_names, close_store=close_store)


def _is_named(error: Exception, *ends: str) -> bool:
    """Return whether a class of the error has such a name: drivers share no base class for these."""
    return any(kind.__name__.endswith(ends) for kind in type(error).__mro__)


def _kind_of(given: object) -> str:
    return f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__


def _engine_ttl(ttl_seconds: int) -> int:
    # Memcached takes more than 30 days for a date.
    return min(ttl_seconds + _SLACK_SECONDS, MAX_TTL_SECONDS)


def _size_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


@lru_cache(maxsize=256)
def _portable_collection(db_name: str) -> str:
    return _portable_name(db_name, MAX_COLLECTION_CHARS)


def _portable_name(name: str, max_chars: int) -> str:
    """Return a name of `a-z`, `0-9`, `-` and `_`, one for each name: it is escaped or, where too long, ends in a digest."""
    if len(name) <= max_chars and _IS_PLAIN(name):
        return name
    escaped = "".join(
        char if char in _PLAIN else "".join(f"_{byte:02x}" for byte in char.encode(errors="surrogatepass"))
        for char in name[: max_chars + 1]
    )
    if len(escaped) <= max_chars:
        return escaped
    digest = blake2b(name.encode(errors="surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    # An escape never has two `_`, so that no escaped name looks like this.
    return f"{escaped[: max_chars - len(digest) - 2]}__{digest}"
