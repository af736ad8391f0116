"""What a store is before its first call: its configuration, and the backend that it opens in each event loop."""

import asyncio
import contextlib
import copy
import weakref
from asyncio import get_running_loop
from collections.abc import Hashable
from datetime import timedelta
from typing import Any, Self

from aiokv import pooling
from aiokv.backends.base import Backend, check_backend
from aiokv.backends.capabilities import Capabilities, capabilities_of
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.observed import ObservedBackend
from aiokv.backends.redis.options import RedisOptions
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
from aiokv.changes import end_watches
from aiokv.claiming import end_renewals
from aiokv.errors import AioKVError, UnsupportedError, truncated
from aiokv.limits import check_db_name
from aiokv.target import Target, TargetAttribute
from aiokv.telemetry import Observer

DEFAULT_CONCURRENCY = 32


class ConfiguredStore:
    """A store without its calls; see `AsyncKVStore` for its arguments."""

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
        redis: RedisOptions | None = None,
        observer: Observer | None = None,
        concurrency: int = DEFAULT_CONCURRENCY,
    ) -> None:
        check_db_name(db_name)
        if url is not None:
            check_url(url)
        if backend is not None:
            check_backend(backend)
            refuse_with_backend(url=url, credentials=credentials, retry=retry, http=http, hedge=hedge or None, redis=redis)
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency must be an int of 1 or more, not {concurrency!r}")
        _check_observer(observer)
        self._db_name = db_name
        self._url = url
        self._backend = backend
        self._client = ClientOptions.of_arguments(credentials, retry, http, hedge, redis)
        self._observer = observer
        self._concurrency = concurrency
        if backend is None:
            preload(self.url)
        self._binding: _Binding = _UNBOUND
        self._target: Target | None = None
        # For each store that this one was derived from, and last for itself: it and all that with_options derived from it.
        self._derived: tuple[weakref.WeakSet[ConfiguredStore], ...] = (weakref.WeakSet([self]),)

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
        return {name: value for name, value in self.__dict__.items() if name not in _NOT_PICKLED}

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

    async def aclose(self) -> None:
        """Close the running loop's connections, this store's and those of the stores derived by `with_options`.

        Safe to call twice. Connections stay open as long as another store shares them, and a backend that was passed in is
        not closed. Where this was the last store, calls of other tasks that are under way finish or fail with
        `StoreClosedError`. Watches of these stores in this loop end, and their claims are not renewed any more.
        """
        try:
            sharing_key = self._sharing_key(self.target)
        except AioKVError:
            # The environment names no place, so nothing of this store alone can be open.
            sharing_key = None
        end_watches(self._derived[-1])
        end_renewals(self._derived[-1])
        await pooling.release(self._derived[-1], sharing_key)

    def _unbind(self) -> None:
        self._binding = _UNBOUND
        self._target = None
        with contextlib.suppress(AttributeError):
            object.__delattr__(self, "target")

    def _backend_here(self) -> Backend | None:
        loop, generation, backend, _ = self._binding
        return backend if loop is get_running_loop() and generation == pooling.fork_generation else None

    async def _open(self) -> Backend:
        return (await self._bind())[2]

    async def _abilities(self) -> Capabilities:
        """Return what the backend of the running loop can do beyond `Backend`."""
        loop, generation, _, capabilities = self._binding
        is_here = loop is get_running_loop() and generation == pooling.fork_generation
        return capabilities if is_here else (await self._bind())[3]

    def _unsupported(self, what: str) -> UnsupportedError:
        return UnsupportedError(
            f"the store at {redacted_url(self.url)} cannot {what}; stores at sqlite:///, memory:// and redis:// URLs can, "
            "and servers of `aiokv serve`"
        )

    async def _bind(self) -> "tuple[asyncio.AbstractEventLoop, int, Backend, Capabilities]":
        backend, target = self._backend, self.target
        if backend is None:
            sharing_key = self._sharing_key(target)
            backend = await pooling.acquire(self, sharing_key, lambda: open_backend(target.url, self._client))
            backend = with_client_options(backend, target.url, self._client)
        if self._observer is not None:
            backend = ObservedBackend(backend, self._observer, self.url)
        binding = (get_running_loop(), pooling.fork_generation, backend, capabilities_of(backend))
        self._binding = binding
        return binding

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
        return (target.connection, (self._client.http, self._client.redis) if pools else None)


# The last loop that the store was used in, the fork generation, the backend there and what it can do. One tuple, so that
# another thread never sees half an update.
_Binding = tuple[asyncio.AbstractEventLoop | None, int, Backend | None, Capabilities]
_UNBOUND: _Binding = (None, 0, None, Capabilities())
_NOT_PICKLED = {"target", "_target", "_binding", "_derived"}


def _check_observer(observer: Observer | None) -> None:
    if observer is not None and not callable(observer):
        raise TypeError(f"observer must be a function of one argument, not {type(observer).__name__}")
