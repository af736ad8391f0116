"""A backend with an observer; a store without an observer does not use it."""

from collections.abc import Sequence

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import (
    MAX_BATCH_KEYS,
    BatchBackend,
    Capabilities,
    ClaimBackend,
    ClaimOutcome,
    Cleared,
    Entry,
    Omitted,
    Page,
    ScanBackend,
    capabilities_of,
)
from aiokv.errors import CallError
from aiokv.telemetry import CallStarted, ObservedCall, Observer, Verb


class ObservedBackend:
    """A backend that notifies an observer of each call to another one.

    Args:
        backend: The other backend.
        observer: The observer.
        url: The store's URL, for the events.
    """

    def __init__(self, backend: Backend, observer: Observer, url: str) -> None:
        self._backend = backend
        self._observer = observer
        self._url = url
        batch, scan, claim, watch = capabilities_of(backend)
        self.capabilities = Capabilities(
            batch and _ObservedBatches(batch, self),
            scan and _ObservedScan(scan, self),
            claim and _ObservedClaims(claim, self),
            watch,
        )
        """What the other backend can do, with an observer; a watch makes no events."""

    def observe(self, verb: Verb, db_name: str, key: str, keys: int = 1) -> ObservedCall:
        """Return a call that is to be observed.

        Args:
            verb: As for `CallStarted`.
            db_name: The namespace.
            key: The key or prefix.
            keys: The number of keys.
        """
        return ObservedCall(self._observer, CallStarted(verb, db_name, key, self._url, keys))

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        with self.observe("get", db_name, key) as call:
            value = await self._backend.get(db_name, key)
            call.found = value is not None
            return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        with self.observe("set", db_name, key):
            await self._backend.set(db_name, key, value, ttl_seconds)

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        with self.observe("delete", db_name, key):
            await self._backend.delete(db_name, key)

    async def aclose(self) -> None:
        """Close the backend; see `Backend.aclose`."""
        await self._backend.aclose()


class _ObservedBatches:
    """Batches as calls of their own: an observer sees no key of them."""

    def __init__(self, backend: BatchBackend, observed: ObservedBackend) -> None:
        self._backend = backend
        self._observe = observed.observe

    @property
    def batches_are_atomic(self) -> bool:
        """See `BatchBackend.batches_are_atomic`."""
        return self._backend.batches_are_atomic

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Sequence[str | Omitted | CallError | None]:
        """Read values; see `BatchBackend.get_many`."""
        with self._observe("get_many", db_name, "", len(keys)) as call:
            outcomes = await self._backend.get_many(db_name, keys)
            call.errors = _errors_in(outcomes)
            return outcomes

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
        """Store values; see `BatchBackend.set_many`."""
        with self._observe("set_many", db_name, "", len(entries)) as call:
            outcomes = await self._backend.set_many(db_name, entries)
            call.errors = _errors_in(outcomes)
            return outcomes

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> Sequence[CallError | None]:
        """Delete entries; see `BatchBackend.delete_many`."""
        with self._observe("delete_many", db_name, "", len(keys)) as call:
            outcomes = await self._backend.delete_many(db_name, keys)
            call.errors = _errors_in(outcomes)
            return outcomes


class _ObservedScan:
    """Listings of which each page is a call."""

    def __init__(self, backend: ScanBackend, observed: ObservedBackend) -> None:
        self._backend = backend
        self._observe = observed.observe

    @property
    def scans_in_order(self) -> bool:
        """See `ScanBackend.scans_in_order`."""
        return self._backend.scans_in_order

    async def scan(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Page:
        """List keys; see `ScanBackend.scan`."""
        with self._observe("keys", db_name, prefix):
            return await self._backend.scan(db_name, prefix, cursor, limit)

    async def count(self, db_name: str, prefix: str = "") -> int:
        """Count entries; see `ScanBackend.count`."""
        with self._observe("count", db_name, prefix):
            return await self._backend.count(db_name, prefix)

    async def clear(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Cleared:
        """Delete some entries; see `ScanBackend.clear`."""
        with self._observe("clear", db_name, prefix):
            return await self._backend.clear(db_name, prefix, cursor, limit)


class _ObservedClaims:
    """Claims of which each request is a call; an observer sees no owner."""

    def __init__(self, backend: ClaimBackend, observed: ObservedBackend) -> None:
        self._backend = backend
        self._observe = observed.observe

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Take or renew a claim; see `ClaimBackend.claim`."""
        with self._observe("claim", db_name, key):
            return await self._backend.claim(db_name, key, owner, seconds)

    async def renew(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Renew a claim; see `ClaimBackend.renew`. An observer sees a claim, as where it was taken."""
        with self._observe("claim", db_name, key):
            return await self._backend.renew(db_name, key, owner, seconds)

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        """Give a claim back; see `ClaimBackend.release`."""
        with self._observe("release", db_name, key):
            return await self._backend.release(db_name, key, owner)


def _errors_in(outcomes: Sequence[object]) -> Sequence[BaseException]:
    return [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
