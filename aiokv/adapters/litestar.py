"""A store for Litestar's sessions, response cache, rate limits and whatever else takes a `litestar.stores.base.Store`.

```python
from litestar import Litestar
from litestar.stores.registry import StoreRegistry
from aiokv import AsyncKVStore
from aiokv.adapters.litestar import KVLitestarStore

store = KVLitestarStore(AsyncKVStore("my-app"))
app = Litestar(stores=StoreRegistry({"root": store}, default_factory=store.with_namespace))
```
"""

import copy
import math
from datetime import timedelta
from types import TracebackType
from typing import Self
from urllib.parse import quote

from aiokv.adapters.entries import Entries, seconds_of
from aiokv.store import AsyncKVStore

try:
    from litestar.stores.base import NamespacedStore
except ImportError as missing:
    raise ImportError("aiokv.adapters.litestar needs the package litestar: pip install 'aiokv[litestar]'") from missing


class KVLitestarStore(NamespacedStore):
    """A Litestar store over an `AsyncKVStore`, exact in bytes and in seconds; see `aiokv.adapters.entries` for the form.

    A key is stored as `namespace:key`; `delete_all` of a store deletes what the stores made by its `with_namespace` hold, too.

    Values without an expiry, or with one of more than 30 days, end after 30 days. `renew_for` reads and writes: no
    other write of that key in this process and event loop comes between the two, while one of another process may.

    Args:
        store: Where values live, in a namespace of their own. Litestar closes it when the app ends.

    Raises:
        TypeError: `store` is no `AsyncKVStore`.
    """

    __slots__ = ("_entries",)

    def __init__(self, store: AsyncKVStore) -> None:
        self._entries = Entries(store)
        self.namespace = ""

    @property
    def _prefix(self) -> str:
        return f"{self.namespace}:"

    def with_namespace(self, namespace: str) -> Self:
        """Return a store whose keys are apart from this one's, over the same `AsyncKVStore`.

        Args:
            namespace: Any text, such as `"sessions"`.

        Returns:
            The other store.
        """
        other = copy.copy(self)
        other.namespace = f"{self.namespace}/{quote(namespace, safe='')}"
        return other

    async def set(self, key: str, value: str | bytes, expires_in: int | timedelta | None = None) -> None:
        """Store a value.

        Args:
            key: Any text.
            value: Bytes, or a text that is stored as UTF-8; at most about 1.9 MB, or 1.4 MB of bytes that are not UTF-8.
            expires_in: Seconds, from 1 on, or a `timedelta`; None and 0 for 30 days.

        Raises:
            TypeError: An argument is of another type.
            ValueTooLargeError: The value is too large; nothing was stored.
            CallError: The store failed.
        """
        data = value.encode() if isinstance(value, str) else bytes(value)
        async with self._entries.writing(self._prefix + key):
            # As Litestar's own stores: 0 sets no expiry.
            await self._entries.set(self._prefix + key, data, seconds_of(expires_in) or None)

    async def get(self, key: str, renew_for: int | timedelta | None = None) -> bytes | None:
        """Read a value.

        Args:
            key: Any text.
            renew_for: Seconds or a `timedelta` that a value with an expiry lives from now on; None leaves it as it is.

        Returns:
            The value, or None where it is absent or has expired.

        Raises:
            CallError: The store failed.
        """
        renewed_seconds = seconds_of(renew_for)
        if not renewed_seconds:
            held = await self._entries.get(self._prefix + key)
            return None if held is None else held.data
        async with self._entries.writing(self._prefix + key):
            held = await self._entries.get(self._prefix + key)
            if held is None:
                return None
            if held.expires_at is not None:
                await self._entries.set(self._prefix + key, held.data, renewed_seconds)
            return held.data

    async def delete(self, key: str) -> None:
        """Delete a value; succeed where there is none.

        Args:
            key: Any text.

        Raises:
            CallError: The store failed.
        """
        async with self._entries.writing(self._prefix + key):
            await self._entries.delete(self._prefix + key)

    async def delete_all(self) -> None:
        """Delete every value of this store, and of those that its `with_namespace` has made.

        Raises:
            UnsupportedError: The store cannot list its keys, as fal's service cannot.
            CallError: The store failed.
        """
        await self._entries.clear(self._prefix)
        await self._entries.clear(f"{self.namespace}/")

    async def exists(self, key: str) -> bool:
        """Return whether a value is there and has not expired.

        Args:
            key: Any text.

        Returns:
            Whether it is there.

        Raises:
            CallError: The store failed.
        """
        return await self._entries.get(self._prefix + key) is not None

    async def expires_in(self, key: str) -> int | None:
        """Return how long a value has to live.

        Args:
            key: Any text.

        Returns:
            Whole seconds; -1 where it was set without an expiry; None where it is absent or has expired.

        Raises:
            CallError: The store failed.
        """
        held = await self._entries.get(self._prefix + key)
        if held is None:
            return None
        return -1 if held.seconds_left is None else math.floor(held.seconds_left)

    async def __aenter__(self) -> None:
        """Open the store."""
        await self._entries.store.__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        """Close the store."""
        await self._entries.store.aclose()
