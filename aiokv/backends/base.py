"""The waist of the house: what every place that holds values can do."""

from collections.abc import Callable
from typing import Protocol

Clock = Callable[[], float]
"""Gives the present as seconds since the epoch; injected so that tests can move time."""


class Backend(Protocol):
    """Hold expiring text values by namespace and key.

    Arguments are checked by the caller (`aiokv.limits`); a backend stores what it is given. Calls may run concurrently.
    Two writes of one key that do not overlap take effect in their order: the last one wins.
    """

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value.

        Args:
            db_name: The namespace, isolated from every other.
            key: The key.

        Returns:
            The value, or None where the key is absent or its time has come: an entry is never seen at or after its expiry.

        Raises:
            CallError: The value could not be read; the subclass says why.
        """
        ...

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value, in place of the one that is there.

        Args:
            db_name: The namespace.
            key: The key.
            value: The value.
            ttl_seconds: Seconds from now until the entry expires.

        Raises:
            CallError: The value could not be stored; `maybe_applied` says whether it may be there all the same.
        """
        ...

    async def delete(self, db_name: str, key: str) -> None:
        """Remove an entry; succeed where there is none.

        Args:
            db_name: The namespace.
            key: The key.

        Raises:
            CallError: The entry could not be removed; `maybe_applied` says whether it may be gone all the same.
        """
        ...

    async def aclose(self) -> None:
        """Finish what was begun and give every resource back; safe to call twice."""
        ...
