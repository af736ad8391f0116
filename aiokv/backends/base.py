"""`Backend`: what every place that holds values can do."""

import inspect
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import NamedTuple, Protocol, runtime_checkable

from aiokv.errors import CallTimeoutError, ConfigurationError
from aiokv.record import Record

Clock = Callable[[], float]
"""Return the present as seconds since the epoch; injected so that tests can move time."""


is_patient: ContextVar[bool] = ContextVar("aiokv_is_patient", default=True)
"""Whether calls may wait for a store that takes no connections. A cache says no: to compute is quicker."""


class Backend(Protocol):
    """A place that holds expiring text values by namespace and key.

    The store checks arguments (`aiokv.limits`); a backend stores what it is given. Calls may run concurrently.
    Two writes of one key that do not overlap take effect in their order: the last one wins.
    """

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value.

        Args:
            db_name: The namespace, isolated from every other.
            key: The key.

        Returns:
            The value, or None where the key is absent or has expired: an entry is never seen at or after its expiry.

        Raises:
            CallError: The value could not be read; the subclass says why.
        """
        ...

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; replace the present one.

        Args:
            db_name: The namespace.
            key: The key.
            value: The value.
            ttl_seconds: Seconds from now until the entry expires.

        Raises:
            CallError: The value could not be stored; `maybe_applied` is true where it may be there all the same.
        """
        ...

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; succeed where there is none.

        Args:
            db_name: The namespace.
            key: The key.

        Raises:
            CallError: The entry could not be deleted; `maybe_applied` is true where it may be gone all the same.
        """
        ...

    async def aclose(self) -> None:
        """Finish the writes under way and release every resource; safe to call twice."""
        ...


@runtime_checkable
class ImmediateBackend(Protocol):
    """A backend whose reads mostly need no waiting, so that its server needs no task for them."""

    def get_now(self, db_name: str, key: str) -> str | None:
        """Read a value in this very step.

        Args:
            db_name: The namespace.
            key: The key.

        Returns:
            The value, or None where the key is absent or has expired.

        Raises:
            WouldWaitError: Only `get` can answer now; it says what is wrong, if anything is.
            CallError: The value could not be read.
        """
        ...


@runtime_checkable
class GatheringBackend(Protocol):
    """A backend of which many small values cost less in one step than in as many calls of `get_now`."""

    def get_all_now(self, names: Sequence[tuple[str, str]]) -> Sequence[str | Exception | None]:
        """Read values in this very step.

        Args:
            names: Namespace and key of each.

        Returns:
            For each its value; None where the key is absent or has expired; `WouldWaitError` where the value is better read by
            `get`, as large ones are; `CallError` where it could not be read.

        Raises:
            WouldWaitError: Only `get` can answer now.
            CallError: No value could be read.
        """
        ...


@runtime_checkable
class QueueingBackend(Protocol):
    """A backend that queues a set in one step and tells of its end, so that its server needs no task for it."""

    def set_soon(self, db_name: str, key: str, value: str, ttl_seconds: int, done: Callable[[Exception | None], None]) -> None:
        """Queue a set.

        Args:
            db_name: The namespace.
            key: The key.
            value: The value.
            ttl_seconds: Its time to live.
            done: Called once, in the loop and after this call has returned: with None once `set` would return, else with
                the error that it would raise.

        Raises:
            WouldWaitError: Nothing can be queued now; `set` waits until it can be.
            CallError: Nothing was queued.
        """
        ...


class UncopiedError(CallTimeoutError):
    """A write is stored, but in fewer copies than it should; the reason is for everybody who may write."""


class WouldWaitError(Exception):
    """A backend cannot answer in this very step; await its coroutine instead."""


class HostingOptions(Record, kw_only=True):
    """What a server asks of the file that holds its values; backends without a file ignore the first two.

    Args:
        min_free_bytes: Free disk below which nothing more is stored, unless pages of the file are free for it; 0 for no floor.
        ballast_bytes: Size of a file beside the store that is deleted when deletes need its room; 0 for none.
        quick_check: Whether the file is checked when it is opened.

    Raises:
        TypeError: A size is no integer.
        ConfigurationError: A size is negative.
    """

    min_free_bytes: int = 0
    ballast_bytes: int = 0
    quick_check: bool = False

    def __post_init__(self) -> None:
        for name, size in (("min_free_bytes", self.min_free_bytes), ("ballast_bytes", self.ballast_bytes)):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be int, not {type(size).__name__}")
            if size < 0:
                raise ConfigurationError(f"{name} is {size}; it must be 0 or more")


def account_of(db_name: str) -> str:
    """Return the account whose usage a namespace counts for.

    Args:
        db_name: The namespace.

    Returns:
        What stands before its first `:`, "" where there is none.
    """
    account, separator, _ = db_name.partition(":")
    return account if separator else ""


class Usage(NamedTuple):
    """What is stored: bytes of UTF-8 values and entries, expired ones too until they are swept."""

    value_bytes: int
    entries: int


class Gauges(NamedTuple):
    """What a backend tells its operator; None where it has no such thing."""

    entries: int
    value_bytes: int
    expired: int
    """Entries swept since it was opened."""
    commits: int | None = None
    """Transactions since it was opened; `committed_writes / commits` is the size of a group commit."""
    committed_writes: int | None = None
    wal_bytes: int | None = None
    disk_free_bytes: int | None = None
    failures: int = 0
    """Calls that failed by the backend's own fault since it was opened."""


@runtime_checkable
class CheckedBackend(Protocol):
    """A backend that can tell whether it is well."""

    async def health(self) -> str | None:
        """Try whether a write would succeed now.

        Returns:
            None where it would, else the reason, for a person: no value, no secret.
        """
        ...


@runtime_checkable
class HostedBackend(CheckedBackend, Protocol):
    """What a server asks of a backend beside its values: room, health and figures."""

    def usage(self, account: str) -> Usage:
        """Count what an account stores, cheaply enough for every set.

        Args:
            account: What stands before the first `:` of its namespaces; "" for the namespaces without one.

        Returns:
            The usage, those of other processes of the same store included; zero before the store is open. Writes that have not
            been answered are not in it.
        """
        ...

    def gauges(self) -> Gauges:
        """Return the present figures; cheap enough for every few seconds."""
        ...


def check_backend(backend: object) -> None:
    """Check that an object has the methods of a `Backend`.

    Args:
        backend: Any object.

    Raises:
        TypeError: It is a class, or lacks one of the four coroutine methods.
    """
    if isinstance(backend, type):
        raise TypeError(f"backend must be an object, not the class {backend.__name__}; write backend={backend.__name__}(...)")
    wrong = [name for name in ("get", "set", "delete", "aclose") if not _may_be_awaited(getattr(backend, name, None))]
    if wrong:
        raise TypeError(
            f"backend of type {type(backend).__name__} is no Backend: `async def {'`, `async def '.join(wrong)}` must be there "
            "(get(db_name, key), set(db_name, key, value, ttl_seconds), delete(db_name, key), aclose())"
        )


def _may_be_awaited(method: object) -> bool:
    """Return False for what is certainly no coroutine function; of compiled and wrapped ones nothing is known."""
    return (
        inspect.iscoroutinefunction(method) or (callable(method) and not inspect.isroutine(method)) or inspect.isbuiltin(method)
    )
