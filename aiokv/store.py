"""`AsyncKVStore`: the store that users await, whatever holds its values."""

import asyncio
import copy
import os
import threading
import weakref
from asyncio import get_running_loop
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, Self, TypeVar

import orjson

from aiokv.backends.base import Backend
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions, check_key_form
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.registry import check_url, identity_of, open_backend, preload, resolve_url, shown_url, tailored
from aiokv.errors import AioKVError, BatchError, DecodeError, shown
from aiokv.limits import check_db_name, check_entry, check_ttl, check_value
from aiokv.telemetry import Observer

T = TypeVar("T")

DEFAULT_CONCURRENCY = 32


class AsyncKVStore:
    """A key-value store of strings, every entry of which expires.

    Nothing is opened before the first call. One store may be used by many tasks, in several event loops and threads, and
    after a fork: connections belong to the loop and the process that opened them, and all stores of one configuration share
    them. `async with` or `aclose` give them back, as does the end of the loop in `asyncio.run`; a later call opens them anew.
    A store that is dropped without either leaves them to the next one of its configuration, until the loop ends.
    A store can be pickled: its configuration travels, credentials and an observer that were passed to it among it, which must
    be such as can be pickled; its connections do not.

    Args:
        db_name: The namespace: any non-empty text without `/` and NUL; each is isolated from every other.
        url: Where values live: `https://host`, `sqlite:///kv.db`, `memory://`. None takes the environment's `AIOKV_URL`,
            else fal's service, at the first call.
        credentials: For `http(s)` URLs: `"<id>:<secret>"`, or an object with `async def authorization(self) -> str`.
            None takes fal's own credentials for fal's hosts, and the environment's `AIOKV_KEY` for any other.
        retry: For `http(s)` URLs: attempts, timeouts and waits.
        http: For `http(s)` URLs: the connection pool.
        hedge: For `http(s)` URLs: whether a `get` that is late is sent a second time, and when; `True` takes the defaults.
        observer: Is told what happens to each call, as with `aiokv.otel.OpenTelemetryObserver()`; any function of one argument.
        concurrency: How many calls a `*_many` method makes at once, 1 or more.

    Raises:
        TypeError: An argument is of another type.
        ValueError: `db_name` or `concurrency` is not acceptable.
        ConfigurationError: `url` is not acceptable, or `credentials` is a text of another form.
    """

    def __init__(  # noqa: PLR0913 (keywords, each with a default that serves)
        self,
        db_name: str,
        *,
        url: str | None = None,
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
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency must be an int of 1 or more, not {concurrency!r}")
        if isinstance(credentials, str):
            check_key_form(credentials, "credentials")
        elif credentials is not None and (isinstance(credentials, type) or not isinstance(credentials, Credentials)):
            raise TypeError(
                f"credentials must be '<id>:<secret>' or have `async def authorization`, not {type(credentials).__name__}"
            )
        _check_options(retry, hedge, observer)
        if http is not None and not isinstance(http, HttpOptions):
            raise TypeError(f"http must be HttpOptions, not {type(http).__name__}")
        self._db_name = db_name
        self._url = url
        self._credentials = credentials
        self._retry = RetryPolicy() if retry is None else retry
        self._http = HttpOptions() if http is None else http
        self._hedge = _hedge_policy(hedge)
        self._observer = observer
        self._concurrency = concurrency
        preload(self.url)
        self._bound: _Bound = _UNBOUND
        # Each with all that with_options has given of it: those of the stores that this one is of, and last its own.
        self._families: tuple[weakref.WeakSet[AsyncKVStore], ...] = (weakref.WeakSet([self]),)

    @property
    def db_name(self) -> str:
        """The namespace."""
        return self._db_name

    @property
    def url(self) -> str:
        """Where values live, as far as this process knows now."""
        return resolve_url(self._url)

    def __repr__(self) -> str:
        credentials = "" if self._credentials is None else ", credentials='***'"
        return f"{type(self).__name__}({shown(self._db_name)}, url={shown_url(self.url)!r}{credentials})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None, "_families": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _bound=_UNBOUND, _families=(weakref.WeakSet([self]),))

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
        """Give a store that differs in what is said here and shares all else, connections included: for a few calls.

        Args:
            timeout: How long a call may take in all, in seconds or as a `timedelta`; more than 0.
            retry: As for the constructor; where `timeout` is given, too, that is its total.
            hedge: As for the constructor; None leaves it as it is.
            observer: As for the constructor; None leaves it as it is.

        Returns:
            The other store; it need not be closed, since closing this one closes it, too.

        Raises:
            TypeError: An argument is of another type.
            ValueError: `timeout` is not acceptable.
        """
        _check_options(retry, False if hedge is None else hedge, observer)
        policy = self._retry if retry is None else retry
        if timeout is not None:
            policy = policy.within(timeout)
        other = copy.copy(self)
        other.__dict__.update(
            _bound=_UNBOUND,
            _retry=policy,
            _hedge=self._hedge if hedge is None else _hedge_policy(hedge),
            _observer=self._observer if observer is None else observer,
        )
        with _lock:
            for family in self._families:
                family.add(other)
        other._families = (*self._families, weakref.WeakSet([other]))  # noqa: SLF001 (of this class)
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
        """Store a value, in place of the one that is there; the last write wins.

        Args:
            key: As for `get`.
            value: Any text of at most 1,900,000 bytes of UTF-8.
            ttl: Whole seconds from 60 to 2,592,000 (30 days), or a `timedelta`; None means 30 days.

        Raises:
            TypeError: The key or the value is not a string; `set_json` takes other values.
            ValueError: The key, the value or the ttl is not acceptable; nothing was sent.
            ValueTooLargeError: The value is over the limit; nothing was stored.
            CallError: The call failed; `maybe_applied` says whether the value may be stored all the same.
        """
        check_entry(self._db_name, key)
        check_value(value)
        ttl_seconds = check_ttl(ttl)
        if type(value) is not str:
            # Of a subclass only the text is stored, and so only that comes back, from any store.
            value = str.__str__(value)
        backend = self._backend_here() or await self._open()
        await backend.set(self._db_name, key, value, ttl_seconds)

    async def delete(self, key: str) -> None:
        """Remove an entry; succeed where there is none.

        Args:
            key: As for `get`.

        Raises:
            TypeError: The key is not a string.
            ValueError: The key is not acceptable; nothing was sent.
            CallError: The call failed; `maybe_applied` says whether the entry may be gone all the same.
        """
        check_entry(self._db_name, key)
        backend = self._backend_here() or await self._open()
        await backend.delete(self._db_name, key)

    async def get_json(self, key: str, default: Any = None) -> Any:
        """Read a value and decode it as JSON.

        Args:
            key: As for `get`.
            default: What to give where the key is absent, to tell that from a stored `null`.

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
        raise DecodeError(f"the value of {shown(key)} in db {shown(self._db_name)} is not JSON at {place}; read it with get")

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
            # Of an orjson.Fragment; the error holds the value.
            reason = "it is not UTF-8"
        else:
            return await self.set(key, text, ttl)
        raise TypeError(f"value of type {type(value).__name__} cannot be encoded as JSON: {reason}")

    async def get_many(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Read several values at once; a key that stands twice is asked once.

        Args:
            keys: Keys as for `get`.

        Returns:
            Each key with its value, or None where it is absent, in the order of first appearance.

        Raises:
            TypeError: A key is not a string, or `keys` is one.
            ValueError: A key is not acceptable; nothing was sent.
            BatchError: A call failed; it holds every result that was had.
        """
        return await self._each(self._check_keys(keys), self.get)

    async def set_many(self, values: Mapping[str, str], ttl: int | timedelta | None = None) -> None:
        """Store several values at once, each for itself: there is no transaction.

        Args:
            values: Keys and values as for `set`.
            ttl: As for `set`, the same for all.

        Raises:
            TypeError: A key or a value is not a string.
            ValueError: A key, a value or the ttl is not acceptable; nothing was sent.
            BatchError: A call failed; it tells apart what was stored, what failed and what was not attempted.
        """
        values = dict(values)
        check_ttl(ttl)
        keys = self._check_keys(values)
        for value in values.values():
            check_value(value)
        await self._each(keys, lambda key: self.set(key, values[key], ttl))

    async def delete_many(self, keys: Iterable[str]) -> None:
        """Remove several entries at once; a key that stands twice is asked once.

        Args:
            keys: Keys as for `get`.

        Raises:
            TypeError: A key is not a string, or `keys` is one.
            ValueError: A key is not acceptable; nothing was sent.
            BatchError: A call failed; it tells apart what was removed, what failed and what was not attempted.
        """
        await self._each(self._check_keys(keys), self.delete)

    async def aclose(self) -> None:
        """Give back the running loop's connections, this store's and those of what `with_options` gave; safe to call twice.

        Where this was the last store that shared them, calls of other tasks that are under way either finish or fail with
        `StoreClosedError`.
        """
        loop, epoch, _, sharing_key = self._bound
        self._bound = _UNBOUND
        # What was opened, even where the environment names another store by now.
        here = loop is get_running_loop() and epoch == _epoch
        await _release(self._families[-1], sharing_key if here else self._sharing_key())

    def _unbind(self) -> None:
        self._bound = _UNBOUND

    def _check_keys(self, keys: Iterable[str]) -> list[str]:
        if isinstance(keys, str):
            raise TypeError("keys must be an iterable of str, not one str; put it in a list")
        unique = list(dict.fromkeys(keys))
        for key in unique:
            check_entry(self._db_name, key)
        return unique

    async def _each(self, keys: list[str], call: Callable[[str], Awaitable[T]]) -> dict[str, T]:
        remaining = iter(keys)
        results: dict[str, T] = {}
        errors: dict[str, Exception] = {}

        async def work() -> None:
            while not errors and (key := next(remaining, None)) is not None:
                try:
                    results[key] = await call(key)
                except AioKVError as error:
                    errors[key] = error

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._concurrency, len(keys))):
                group.create_task(work())
        if errors:
            texts = {key: value if isinstance(value, str) else None for key, value in results.items()}
            raise BatchError(errors, texts, list(remaining))
        return {key: results[key] for key in keys}

    def _backend_here(self) -> Backend | None:
        loop, epoch, backend, _ = self._bound
        return backend if loop is get_running_loop() and epoch == _epoch else None

    async def _open(self) -> Backend:
        sharing_key = self._sharing_key()
        backend = await _acquire(
            self,
            sharing_key,
            lambda: open_backend(self.url, credentials=self._credentials, http=self._http),
        )
        backend = tailored(backend, self.url, retry=self._retry, hedge=self._hedge, observer=self._observer)
        self._bound = (get_running_loop(), _epoch, backend, sharing_key)
        return backend

    def _sharing_key(self) -> Hashable:
        # A credentials object counts by identity: it may be equal to another, or not hashable.
        credentials = self._credentials if isinstance(self._credentials, str) else id(self._credentials)
        return (get_running_loop(), identity_of(self.url), credentials, self._http)


def _check_options(retry: RetryPolicy | None, hedge: bool | HedgePolicy, observer: Observer | None) -> None:  # noqa: FBT001
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise TypeError(f"retry must be a RetryPolicy, not {type(retry).__name__}")
    if not isinstance(hedge, bool | HedgePolicy):
        raise TypeError(f"hedge must be True, False or a HedgePolicy, not {type(hedge).__name__}")
    if observer is not None and not callable(observer):
        raise TypeError(f"observer must be a function of one argument, not {type(observer).__name__}")


def _hedge_policy(hedge: bool | HedgePolicy) -> HedgePolicy | None:  # noqa: FBT001 (as the caller said it)
    return (HedgePolicy() if hedge else None) if isinstance(hedge, bool) else hedge


_default: AsyncKVStore | None = None
DEFAULT_DB_NAME = "aiokv"


class DefaultStoreUser(Protocol):
    """Whoever keeps something that came from the default store."""

    def default_store_changed(self, store: AsyncKVStore | None) -> None:
        """Let go of what came from another store.

        Args:
            store: The default store from now on, or None where that is yet to be made.
        """
        ...


# Weakly: a cached function that is dropped need not be told.
_default_users: "weakref.WeakSet[DefaultStoreUser]" = weakref.WeakSet()


def default_store() -> AsyncKVStore:
    """Give the store that cached functions use where they name none.

    Returns:
        What `set_default_store` was given, else one of `AIOKV_URL` and the namespace `AIOKV_DB` (or `aiokv`).
    """
    store = _default
    if store is None:
        made = AsyncKVStore(os.environ.get("AIOKV_DB") or DEFAULT_DB_NAME)
        with _lock:
            store = _default
            if store is None:
                store = made
                _change_default(made)
    return store


def set_default_store(store: AsyncKVStore | None) -> None:
    """Choose the store that cached functions use where they name none.

    Args:
        store: The store, or None for that of the environment.

    Raises:
        TypeError: It is no store.
    """
    if store is not None and not isinstance(store, AsyncKVStore):
        raise TypeError(f"store must be an AsyncKVStore, not {type(store).__name__}")
    with _lock:
        _change_default(store)


def watch_default_store(user: DefaultStoreUser) -> None:
    """Tell somebody what the default store is, now and whenever it changes.

    Args:
        user: Whom, held weakly.
    """
    with _lock:
        _default_users.add(user)
        user.default_store_changed(_default)


def _change_default(store: AsyncKVStore | None) -> None:
    global _default  # noqa: PLW0603 (the one default of the process)
    _default = store
    for user in list(_default_users):
        user.default_store_changed(store)


_Bound = tuple[asyncio.AbstractEventLoop | None, int, Backend | None, Hashable]
_UNBOUND: _Bound = (None, 0, None, None)


@dataclass(slots=True, eq=False)
class _Shared:
    """A backend that is open in one loop, and the stores that share it."""

    loop: asyncio.AbstractEventLoop
    backend: Backend
    closing: AsyncGenerator[None, None]
    users: "weakref.WeakSet[AsyncKVStore]" = field(default_factory=weakref.WeakSet)


_shared: dict[Hashable, _Shared] = {}
_lock = threading.Lock()
# Counts forks, so that a child tells its parent's connections from its own.
_epoch = 0
# What a child inherits is neither used nor closed there: the connections are its parent's.
_inherited: list[dict[Hashable, _Shared]] = []


async def _acquire(store: AsyncKVStore, sharing_key: Hashable, open_: Callable[[], Backend]) -> Backend:
    with _lock:
        _forget_closed_loops()
        shared = _shared.get(sharing_key)
        is_new = shared is None
        if shared is None:
            backend = open_()
            shared = _Shared(get_running_loop(), backend, _close_with_loop(sharing_key, backend))
            _shared[sharing_key] = shared
        shared.users.add(store)
    if is_new:
        # To its first yield, which does not suspend: from here on the loop knows of it.
        await anext(shared.closing)
    return shared.backend


async def _release(stores: "weakref.WeakSet[AsyncKVStore]", sharing_key: Hashable) -> None:
    with _lock:
        for store in list(stores):
            store._unbind()  # noqa: SLF001 (this module's own)
        shared = _shared.get(sharing_key)
        if shared is None:
            return
        shared.users -= stores
        if shared.users:
            return
        del _shared[sharing_key]
    await shared.closing.aclose()


async def _close_with_loop(sharing_key: Hashable, backend: Backend) -> AsyncGenerator[None, None]:
    """Close a backend when its loop ends: `asyncio.run` finishes the generators that are still open."""
    try:
        yield
    finally:
        with _lock:
            shared = _shared.get(sharing_key)
            if shared is not None and shared.backend is backend:
                del _shared[sharing_key]
                for store in list(shared.users):
                    store._unbind()  # noqa: SLF001 (this module's own)
        await backend.aclose()


def _forget_closed_loops() -> None:
    for sharing_key in [key for key, shared in _shared.items() if shared.loop.is_closed()]:
        del _shared[sharing_key]


def _after_fork_in_child() -> None:
    global _lock, _epoch  # noqa: PLW0603 (a fork is the one event that changes them)
    _lock = threading.Lock()
    _epoch += 1
    _inherited.append(dict(_shared))
    _shared.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
