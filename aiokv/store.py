"""`AsyncKVStore`: the store that users await, whatever holds its values."""

import asyncio
import contextlib
import copy
import weakref
from asyncio import get_running_loop
from collections.abc import Hashable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Self

import orjson

from aiokv import pooling
from aiokv.backends.base import Backend, check_backend
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.observed import ObservedBackend
from aiokv.backends.registry import (
    canonical_url,
    check_url,
    open_backend,
    preload,
    redacted_url,
    resolve_url,
    with_client_options,
)
from aiokv.backends.scheme import ClientOptions, refuse_with_backend
from aiokv.batch import call_each
from aiokv.errors import AioKVError, DecodeError, truncated
from aiokv.limits import check_db_name, check_entries, check_entry, check_ttl, check_value, check_values
from aiokv.target import Target, TargetAttribute
from aiokv.telemetry import Observer

DEFAULT_CONCURRENCY = 32


class AsyncKVStore:
    """A key-value store of strings, every entry of which expires.

    Nothing is opened before the first call. One store may be used by many tasks, in several event loops and threads, and
    after a fork. Connections belong to the loop and the process that opened them; all stores of one configuration share them.
    `async with` and `aclose` close them, as does the end of the loop in `asyncio.run`; a later call opens them anew.
    A store that is dropped without either leaves them to the next one of its configuration, until the loop ends.
    A store can be pickled: its configuration travels, its connections do not. Credentials, an observer and a backend that
    were passed to it travel too, and must be such as can be pickled.

    Args:
        db_name: The namespace: any non-empty text without `/` and NUL; each is isolated from every other.
        url: Where values live: `https://host`, `sqlite:///kv.db`, `memory://`. None takes the environment's `AIOKV_URL`,
            else fal's service, at the first call.
        backend: Any object with the four methods of `Backend`, in place of a URL. Whoever made it closes it: `aclose` of the
            store does not. The store works in every event loop and process that the backend works in.
        credentials: For `http(s)` URLs: `"<id>:<secret>"`, or an object with `async def authorization(self) -> str`.
            None takes fal's own credentials for fal's hosts, and the environment's `AIOKV_KEY` for any other.
        retry: For `http(s)` URLs: attempts, timeouts and waits.
        http: For `http(s)` URLs: the connection pool.
        hedge: For `http(s)` URLs: whether a `get` that is late is sent a second time, and when; `True` takes the defaults.
        observer: Any function of one argument, called with each event of each call, such as
            `aiokv.otel.OpenTelemetryObserver()`.
        concurrency: How many calls a `*_many` method makes at once, 1 or more.

    Raises:
        TypeError: An argument is of another type, or `backend` comes with an argument that is for URLs alone.
        ValueError: `db_name` or `concurrency` is not acceptable.
        ConfigurationError: `url` is not acceptable, or `credentials` is a text of another form.
    """

    target = TargetAttribute()
    """Which values this store means, as a hashable object: canonical URL, namespace and credentials.

    Stores with equal targets are one store. It is computed at the first use and stays until the store is closed, whatever
    becomes of the environment's `AIOKV_URL` and of the working directory meanwhile.
    """

    def __init__(  # noqa: PLR0913 (keywords, each with a default that serves)
        self,
        db_name: str,
        *,
        url: str | None = None,
        backend: Backend | None = None,
        credentials: str | Credentials | None = None,
        retry: RetryPolicy | None = None,
        http: HttpOptions | None = None,
        hedge: bool | HedgePolicy = False,
        observer: Observer | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
    ) -> None:
        check_db_name(db_name)
        if url is not None:
            check_url(url)
        if backend is not None:
            check_backend(backend)
            refuse_with_backend(url=url, credentials=credentials, retry=retry, http=http, hedge=hedge or None)
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency must be an int of 1 or more, not {concurrency!r}")
        _check_observer(observer)
        self._db_name = db_name
        self._url = url
        self._backend = backend
        self._client = ClientOptions.of_arguments(credentials, retry, http, hedge)
        self._observer = observer
        self._concurrency = concurrency
        if backend is None:
            preload(self.url)
        self._binding: _Binding = _UNBOUND
        self._target: Target | None = None
        # For each store that this one was derived from, and last for itself: it and all that with_options derived from it.
        self._derived: tuple[weakref.WeakSet[AsyncKVStore], ...] = (weakref.WeakSet([self]),)

    @property
    def db_name(self) -> str:
        """The namespace."""
        return self._db_name

    @property
    def url(self) -> str:
        """Where values live, as this process would resolve it now; for a backend that was passed in, its type."""
        return resolve_url(self._url) if self._backend is None else f"backend://{type(self._backend).__name__}"

    def __repr__(self) -> str:
        credentials = "" if self._client.credentials is None else ", credentials='***'"
        return f"{type(self).__name__}({truncated(self._db_name)}, url={redacted_url(self.url)!r}{credentials})"

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in {"target", "_target", "_binding", "_derived"}
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _binding=_UNBOUND, _target=None, _derived=(weakref.WeakSet([self]),))

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def with_options(
        self,
        *,
        timeout: float | timedelta | None = None,
        retry: RetryPolicy | None = None,
        hedge: bool | HedgePolicy | None = None,
        observer: Observer | None = None,
    ) -> Self:
        """Return a store with other options that shares everything else, connections included: for a few calls.

        Args:
            timeout: How long a call may take in all, in seconds or as a `timedelta`; more than 0.
            retry: As for the constructor; where `timeout` is given, too, that is its total.
            hedge: As for the constructor; None leaves it as it is.
            observer: As for the constructor; None leaves it as it is.

        Returns:
            The other store. It need not be closed: closing this one closes it, too.

        Raises:
            TypeError: An argument is of another type, or this store's backend was passed in and knows only `observer`.
            ValueError: `timeout` is not acceptable.
        """
        _check_observer(observer)
        if self._backend is not None:
            refuse_with_backend(timeout=timeout, retry=retry, hedge=hedge)
        client = self._client.derive(timeout, retry, hedge)
        other = copy.copy(self)
        other.__dict__.update(_client=client, _observer=self._observer if observer is None else observer)
        other._target = self._target  # noqa: SLF001 (of this class)
        pooling.join(other, self._derived)
        other._derived = (*self._derived, weakref.WeakSet([other]))  # noqa: SLF001 (of this class)
        return other

    async def get(self, key: str) -> str | None:
        """Read a value.

        Args:
            key: Any non-empty text without NUL that fits a request line, other than `.` and `..`.

        Returns:
            The value, or None where the key is absent or has expired.

        Raises:
            TypeError: The key is not a string.
            ValueError: The key is not acceptable; nothing was sent.
            CallError: The call failed; the subclass and the fields say how.
        """
        check_entry(self._db_name, key)
        backend = self._backend_here() or await self._open()
        return await backend.get(self._db_name, key)

    async def set(self, key: str, value: str, ttl: int | timedelta | None = None) -> None:
        """Store a value; replace the present one. The last write wins.

        Args:
            key: As for `get`.
            value: Any text of at most 1,900,000 bytes of UTF-8.
            ttl: Whole seconds from 60 to 2,592,000 (30 days), or a `timedelta`; None means 30 days.

        Raises:
            TypeError: The key or the value is not a string; `set_json` takes other values.
            ValueError: The key, the value or the ttl is not acceptable; nothing was sent.
            ValueTooLargeError: The value is over the limit; nothing was stored.
            CallError: The call failed; `maybe_applied` is true where the value may be stored all the same.
        """
        check_entry(self._db_name, key)
        check_value(value)
        ttl_seconds = check_ttl(ttl)
        if type(value) is not str:
            # Only the text of a subclass is stored, so that every store returns the same.
            value = str.__str__(value)
        backend = self._backend_here() or await self._open()
        await backend.set(self._db_name, key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        """Delete an entry; succeed where there is none.

        Args:
            key: As for `get`.

        Raises:
            TypeError: The key is not a string.
            ValueError: The key is not acceptable; nothing was sent.
            CallError: The call failed; `maybe_applied` is true where the entry may be gone all the same.
        """
        check_entry(self._db_name, key)
        backend = self._backend_here() or await self._open()
        await backend.delete(self._db_name, key)

    async def get_json(self, key: str, default: Any = None) -> Any:
        """Read a value and decode it as JSON.

        Args:
            key: As for `get`.
            default: The result where the key is absent; tells it from a stored `null`.

        Returns:
            The decoded value, or `default`.

        Raises:
            DecodeError: The value is not JSON.
            CallError: As for `get`.
        """
        text = await self.get(key)
        if text is None:
            return default
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as error:
            # Not chained: the decoder's error holds the whole value.
            place = f"line {error.lineno} column {error.colno}"
        raise DecodeError(
            f"the value of {truncated(key)} in db {truncated(self._db_name)} is not JSON at {place}; read it with get"
        )

    async def set_json(self, key: str, value: Any, ttl: int | timedelta | None = None) -> None:
        """Encode a value as JSON and store it.

        Args:
            key: As for `get`.
            value: What orjson encodes: dict, list, str, int, float, bool, None, dataclass, datetime, UUID.
                A tuple comes back as a list, NaN as None.
            ttl: As for `set`.

        Raises:
            TypeError: The value cannot be encoded.
            ValueTooLargeError: The JSON is over 1,900,000 bytes; nothing was stored.
            CallError: As for `set`.
        """
        check_entry(self._db_name, key)
        try:
            text = orjson.dumps(value).decode()
        except orjson.JSONEncodeError as error:
            reason = str(error)
        except UnicodeDecodeError:
            # From an orjson.Fragment; the error holds the value.
            reason = "it is not UTF-8"
        else:
            return await self.set(key, text, ttl)
        raise TypeError(f"value of type {type(value).__name__} cannot be encoded as JSON: {reason}")

    async def get_many(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Read several values at once; a repeated key is read once.

        Args:
            keys: Keys as for `get`.

        Returns:
            Each key with its value, or None where it is absent, in the order of first appearance.

        Raises:
            TypeError: A key is not a string, or `keys` is one.
            ValueError: A key is not acceptable; nothing was sent.
            BatchError: A call failed; it holds the results of the calls that succeeded.
        """
        return await call_each(check_entries(self._db_name, keys), self.get, self._concurrency)

    async def set_many(self, values: Mapping[str, str], ttl: int | timedelta | None = None) -> None:
        """Store several values at once, each by a call of its own: there is no transaction.

        Args:
            values: Keys and values as for `set`.
            ttl: As for `set`, the same for all.

        Raises:
            TypeError: A key or a value is not a string.
            ValueError: A key, a value or the ttl is not acceptable; the message names the key, and nothing was sent.
            BatchError: A call failed; it lists the keys that were stored, that failed and that were not attempted.
        """
        values = dict(values)
        check_ttl(ttl)
        keys = check_entries(self._db_name, values)
        check_values(values)
        await call_each(keys, lambda key: self.set(key, values[key], ttl), self._concurrency)

    async def delete_many(self, keys: Iterable[str]) -> None:
        """Delete several entries at once; a repeated key is deleted once.

        Args:
            keys: Keys as for `get`.

        Raises:
            TypeError: A key is not a string, or `keys` is one.
            ValueError: A key is not acceptable; nothing was sent.
            BatchError: A call failed; it lists the keys that were deleted, that failed and that were not attempted.
        """
        await call_each(check_entries(self._db_name, keys), self.delete, self._concurrency)

    async def aclose(self) -> None:
        """Close the running loop's connections, this store's and those of the stores derived by `with_options`.

        Safe to call twice. Connections stay open as long as another store shares them, and a backend that was passed in is
        not closed. Where this was the last store, calls of other tasks that are under way finish or fail with
        `StoreClosedError`.
        """
        try:
            sharing_key = self._sharing_key(self.target)
        except AioKVError:
            # The environment names no place, so nothing of this store alone can be open.
            sharing_key = None
        await pooling.release(self._derived[-1], sharing_key)

    def _unbind(self) -> None:
        self._binding = _UNBOUND
        self._target = None
        with contextlib.suppress(AttributeError):
            object.__delattr__(self, "target")

    def _backend_here(self) -> Backend | None:
        loop, generation, backend = self._binding
        return backend if loop is get_running_loop() and generation == pooling.fork_generation else None

    async def _open(self) -> Backend:
        backend, target = self._backend, self.target
        if backend is None:
            sharing_key = self._sharing_key(target)
            backend = await pooling.acquire(self, sharing_key, lambda: open_backend(target.url, self._client))
            backend = with_client_options(backend, target.url, self._client)
        if self._observer is not None:
            backend = ObservedBackend(backend, self._observer, self.url)
        self._binding = (get_running_loop(), pooling.fork_generation, backend)
        return backend

    def _find_target(self) -> Target:
        # In one variable: another thread may unbind the store meanwhile.
        target = self._target
        if target is None:
            url, backend, credentials = self.url, self._backend, None
            if backend is None:
                credentials = self._client.credentials if check_url(url).takes_credentials else None
                url = canonical_url(url)
            target = self._target = Target(url, self._db_name, credentials, backend)
        return target

    def _sharing_key(self, target: Target) -> Hashable:
        pools = self._backend is None and check_url(target.url).with_client_options is not None
        return (target.connection, self._client.http if pools else None)


# The last loop that the store was used in, the fork generation and the backend there. One tuple, so that another thread never
# sees half an update.
_Binding = tuple[asyncio.AbstractEventLoop | None, int, Backend | None]
_UNBOUND: _Binding = (None, 0, None)
_NOT_PICKLED = {"target", "_target", "_binding", "_derived"}


def _check_observer(observer: Observer | None) -> None:
    if observer is not None and not callable(observer):
        raise TypeError(f"observer must be a function of one argument, not {type(observer).__name__}")
