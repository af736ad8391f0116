"""A backend with an observer; a store without an observer does not use it."""

from aiokv.backends.base import Backend
from aiokv.telemetry import CallStarted, ObservedCall, Observer


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

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        with ObservedCall(self._observer, CallStarted("get", db_name, key, self._url)) as call:
            value = await self._backend.get(db_name, key)
            call.found = value is not None
            return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        with ObservedCall(self._observer, CallStarted("set", db_name, key, self._url)):
            await self._backend.set(db_name, key, value, ttl_seconds)

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        with ObservedCall(self._observer, CallStarted("delete", db_name, key, self._url)):
            await self._backend.delete(db_name, key)

    async def aclose(self) -> None:
        """Close the backend; see `Backend.aclose`."""
        await self._backend.aclose()
