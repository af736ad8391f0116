"""`KVStore`: the store for code that does not await; every call blocks its thread, and runs in the background loop."""

import contextlib
import copy
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Mapping
from datetime import timedelta
from typing import Any, Self, TypeVar

from aiokv import background, pooling
from aiokv.backends.base import Backend
from aiokv.backends.capabilities import MAX_BATCH_KEYS, KeyInfo
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.redis.options import RedisOptions
from aiokv.backends.watching import Changed, Lost
from aiokv.changes import Changes
from aiokv.claiming import DEFAULT_CLAIM_SECONDS, Claim
from aiokv.configured import DEFAULT_CONCURRENCY
from aiokv.errors import AioKVError
from aiokv.limits import check_entries, check_mapping
from aiokv.store import AsyncKVStore
from aiokv.target import Target
from aiokv.telemetry import Observer

T = TypeVar("T")


class KVStore:
    """`AsyncKVStore` for blocking code, from any number of threads: its methods, without `await`.

    It takes the place of `fal.toolkit.kv.KVStore`. All stores of a process share one event loop in a thread of its own, which
    starts at the first call, and so they share connections. A call also works where an event loop runs, and blocks that loop,
    as in a cell of a notebook. A forked process opens connections of its own. At the end of the interpreter all are closed.

    In a process that has imported `fal.toolkit`, each `AioKVError` and each `ValueError` of a call is a `KVStoreException` as
    well: code that catches those catches these.

    Args:
        db_name: As for `AsyncKVStore`, as all that follow.
        url: Where values live; None takes the environment's `AIOKV_URL`, else fal's service, at the first call.
        backend: Any object with the four methods of `Backend`; it is called in the background loop.
        credentials: A text `"<id>:<secret>"`, or an object with `async def authorization(self) -> str`.
        retry: Attempts, timeouts and waits.
        http: The connection pool.
        hedge: Whether a `get` that is late is sent a second time.
        redis: Options of stores on Redis and Valkey.
        observer: A function that is called with each event, in the thread of the background loop: it must not block.
        concurrency: How many calls a `*_many` method makes at once.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is not acceptable.
        ConfigurationError: `url` or `credentials` is not acceptable.
    """

    def __init__(  # noqa: PLR0913 (those of AsyncKVStore)
        self,
        db_name: str,
        *,
        url: str | None = None,
        backend: Backend | None = None,
        credentials: str | Credentials | None = None,
        retry: RetryPolicy | None = None,
        http: HttpOptions | None = None,
        hedge: bool | HedgePolicy = False,
        redis: RedisOptions | None = None,
        observer: Observer | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
    ) -> None:
        self._store = AsyncKVStore(
            db_name,
            url=url,
            backend=backend,
            credentials=credentials,
            retry=retry,
            http=http,
            hedge=hedge,
            redis=redis,
            observer=observer,
            concurrency=concurrency,
        )

    @property
    def async_store(self) -> AsyncKVStore:
        """The store that this one calls, for the code of the same program that awaits."""
        return self._store

    @property
    def db_name(self) -> str:
        """The namespace."""
        return self._store.db_name

    @property
    def url(self) -> str:
        """Where values live; see `AsyncKVStore.url`."""
        return self._store.url

    @property
    def target(self) -> Target:
        """Which values this store means; see `AsyncKVStore.target`."""
        return self._store.target

    def __repr__(self) -> str:
        return repr(self._store).replace(type(self._store).__name__, type(self).__name__, 1)

    def __enter__(self) -> Self:
        _run(self._store.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def with_options(
        self,
        *,
        timeout: float | timedelta | None = None,
        retry: RetryPolicy | None = None,
        hedge: bool | HedgePolicy | None = None,
        observer: Observer | None = None,
    ) -> Self:
        """Return a store with other options that shares everything else; see `AsyncKVStore.with_options`."""
        other = copy.copy(self)
        store = _call(lambda: self._store.with_options(timeout=timeout, retry=retry, hedge=hedge, observer=observer))
        other._store = store  # noqa: SLF001 (of this class)
        return other

    def close(self) -> None:
        """Close the background loop's connections, unless other stores share them; a later call opens them anew.

        Watches of this store end, in other threads too. Safe to call twice.
        """
        # At the end of the interpreter, all are closed.
        if not background.has_ended():
            _run(self._store.aclose)

    def get(self, key: str) -> str | None:
        """Read a value; see `AsyncKVStore.get`."""
        return _run(lambda: self._store.get(key))

    def set(self, key: str, value: str, ttl: int | timedelta | None = None) -> None:
        """Store a value; see `AsyncKVStore.set`."""
        return _run(lambda: self._store.set(key, value, ttl))

    def delete(self, key: str) -> None:
        """Delete an entry; see `AsyncKVStore.delete`."""
        return _run(lambda: self._store.delete(key))

    def get_json(self, key: str, default: Any = None) -> Any:
        """Read a value and decode it as JSON; see `AsyncKVStore.get_json`."""
        return _run(lambda: self._store.get_json(key, default))

    def set_json(self, key: str, value: Any, ttl: int | timedelta | None = None) -> None:
        """Encode a value as JSON and store it; see `AsyncKVStore.set_json`."""
        return _run(lambda: self._store.set_json(key, value, ttl))

    def get_many(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Read several values at once; see `AsyncKVStore.get_many`."""
        names = self._names(keys)
        return _run(lambda: self._store.get_many(names))

    def set_many(self, values: Mapping[str, str], ttl: int | timedelta | None = None) -> None:
        """Store several values at once; see `AsyncKVStore.set_many`."""
        given = _call(lambda: check_mapping(values))
        return _run(lambda: self._store.set_many(given, ttl))

    def delete_many(self, keys: Iterable[str]) -> None:
        """Delete several entries at once; see `AsyncKVStore.delete_many`."""
        names = self._names(keys)
        return _run(lambda: self._store.delete_many(names))

    def keys(self, prefix: str = "") -> Generator[KeyInfo]:
        """List the keys of this namespace, `for info in store.keys():`; see `AsyncKVStore.keys`."""
        return _list(_call(lambda: self._store.keys(prefix)))

    def count(self, prefix: str = "") -> int:
        """Count the entries of this namespace; see `AsyncKVStore.count`."""
        return _run(lambda: self._store.count(prefix))

    def clear(self, prefix: str = "") -> int:
        """Delete all entries of this namespace; see `AsyncKVStore.clear`."""
        return _run(lambda: self._store.clear(prefix))

    def watch(self) -> "BlockingChanges":
        """Watch this namespace, `for change in store.watch():`; see `AsyncKVStore.watch`.

        The loop blocks its thread until the next change. To end it from another thread, close the store or what this returns.
        """
        return BlockingChanges(self._store.watch())

    def claim(self, key: str, seconds: float | timedelta = DEFAULT_CLAIM_SECONDS) -> "BlockingClaim":
        """Claim a key, `with store.claim("report") as claim:`; see `AsyncKVStore.claim`.

        The background loop renews the claim while the block runs.
        """
        return BlockingClaim(_call(lambda: self._store.claim(key, seconds)))

    def _names(self, keys: Iterable[str]) -> list[str]:
        """Read keys in the caller's thread: a generator may block, or call a store itself."""
        return _call(lambda: check_entries(self._store.db_name, keys))


class _OfOneProcess:
    """An object that belongs to the loop of the process that made it."""

    def __init__(self) -> None:
        self._generation = pooling.fork_generation

    @property
    def _is_here(self) -> bool:
        return self._generation == pooling.fork_generation

    def _run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if not self._is_here:
            raise RuntimeError(f"a {type(self).__name__} cannot go on in a forked process; make another one there")
        return _run(make)


class BlockingChanges(_OfOneProcess):
    """The changes of a namespace, read by one thread: `for change in store.watch()`; see `Changes`.

    Args:
        changes: The same in the background loop.
    """

    def __init__(self, changes: Changes) -> None:
        super().__init__()
        self._changes = changes

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Changed | Lost:
        try:
            return self._run(self._changes.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None
        except RuntimeError:
            if background.has_ended():
                # As when the store is closed: a thread that reads it goes on behind its loop.
                raise StopIteration from None
            raise

    def __enter__(self) -> Self:
        self._run(self._changes.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End: a thread that reads it goes on behind its loop. Safe to call twice, and from any thread."""
        if self._is_here and not background.has_ended():
            self._run(self._changes.aclose)


class BlockingClaim(_OfOneProcess):
    """A claim of a key for as long as a `with` block runs; see `Claim`.

    A forked process does not hold it, and does not release it where it leaves the block.

    Args:
        claim: The same in the background loop.
    """

    def __init__(self, claim: Claim) -> None:
        super().__init__()
        self._claim = claim

    @property
    def is_held(self) -> bool:
        """Whether this claim is held: nobody else can hold one of its key."""
        return self._is_here and self._claim.is_held

    @property
    def seconds_left(self) -> float:
        """Seconds until the claim ends unless it is renewed or released; see `Claim.seconds_left`."""
        return self._claim.seconds_left

    def __enter__(self) -> Self:
        self._run(self._claim.__aenter__)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_here and not background.has_ended():
            self._run(self._claim.__aexit__)


def _list(infos: AsyncGenerator[KeyInfo]) -> Generator[KeyInfo]:
    """Hand keys over a page at a time: one change of threads for each key would cost more than the listing."""
    generation = pooling.fork_generation
    try:
        while taken := _run(lambda: _take(infos, generation)):
            for info in taken:
                yield info
                _check_listing(generation)
    except GeneratorExit:
        # Not waited for: the collector closes what a program has left, in any thread.
        if generation == pooling.fork_generation:
            with contextlib.suppress(RuntimeError):
                background.submit(lambda: _leave(infos))
        raise


def _check_listing(generation: int) -> None:
    if generation != pooling.fork_generation:
        raise RuntimeError("a listing cannot go on in a forked process; call keys there")


async def _take(infos: AsyncGenerator[KeyInfo], generation: int) -> list[KeyInfo]:
    _check_listing(generation)
    taken: list[KeyInfo] = []
    async for info in infos:
        taken.append(info)
        if len(taken) == MAX_BATCH_KEYS:
            break
    return taken


async def _leave(infos: AsyncGenerator[KeyInfo]) -> None:
    await infos.aclose()


def _run(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in the background loop."""
    return _call(lambda: background.run(make))


def _call(call: Callable[[], T]) -> T:
    """Make a call; its errors are such as code for fal's own client catches."""
    try:
        return call()
    except (AioKVError, ValueError) as error:
        raised = _as_fals(error)
        if raised is error:
            raise
        raise raised.with_traceback(error.__traceback__) from error.__cause__


def _as_fals(error: Exception) -> Exception:
    """Return an error that is a `KVStoreException`, too, where the program knows that class."""
    # No program catches what it has not imported.
    fals = getattr(sys.modules.get("fal.toolkit.exceptions"), "KVStoreException", None)
    if not isinstance(fals, type) or not issubclass(fals, Exception) or isinstance(error, fals):
        return error
    with contextlib.suppress(TypeError):
        combined = _combine(type(error), fals)
        if type(error) is ValueError:
            # The class of a built-in exception cannot be changed.
            return combined(*error.args)
        error.__class__ = combined
    return error


_combined: dict[tuple[object, object], type[Exception]] = {}


def _combine(own: type[Exception], fals: type[Exception]) -> type[Exception]:
    """Return a class of the same name that is both; pickled, it is its own alone."""
    made = _combined.get((own, fals))
    if made is not None:
        return made

    def reduce(error: Exception, protocol: Any) -> Any:
        reduced = own.__reduce_ex__(error, protocol)
        return (own if reduced[0] is type(error) else reduced[0], *reduced[1:])

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__, "__reduce_ex__": reduce}
    made = _combined[own, fals] = type(own.__name__, (own, fals), names)
    return made
