"""A store of py-key-value that keeps its values in an `AsyncKVStore`: for FastMCP and others that take an `AsyncKeyValue`.

```python
from fastmcp.server.middleware.caching import ResponseCachingMiddleware
from aiokv import AsyncKVStore
from aiokv.adapters.py_key_value_store import KVKeyValueStore

mcp.add_middleware(ResponseCachingMiddleware(cache_storage=KVKeyValueStore(AsyncKVStore("mcp"))))
```

`aiokv.adapters.py_key_value` is the other way: a store of py-key-value as a backend of aiokv.
"""

import json
from collections.abc import Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any
from urllib.parse import quote

from aiokv.adapters.entries import Entries, Held
from aiokv.store import AsyncKVStore

try:
    from key_value.aio.stores.base import (
        BaseContextManagerStore,
        BaseDestroyCollectionStore,
        BaseDestroyStore,
        BaseEnumerateKeysStore,
        ManagedEntry,
    )
except ImportError as missing:
    raise ImportError(
        "aiokv.adapters.py_key_value_store needs the package py-key-value-aio: pip install 'aiokv[py-key-value]'"
    ) from missing


class KVKeyValueStore(BaseEnumerateKeysStore, BaseDestroyCollectionStore, BaseDestroyStore, BaseContextManagerStore):
    """An `AsyncKeyValue` over an `AsyncKVStore`, exact in expiry; see `aiokv.adapters.entries` for the form.

    The key of an entry is `collection:key`, with the collection percent-encoded, and its value JSON. Entries without a `ttl`,
    or with one of more than 30 days, end after 30 days. Batches travel as batches. `keys`, `destroy_collection` and `destroy`
    need a store that can list its keys. Errors are aiokv's own.

    Args:
        store: Where values live, in a namespace of their own.
        default_collection: The collection of calls that name none; None takes py-key-value's own.
        close_store: Whether closing this object closes the store, too.

    Raises:
        TypeError: `store` is no `AsyncKVStore`.
    """

    def __init__(self, store: AsyncKVStore, *, default_collection: str | None = None, close_store: bool = False) -> None:
        self._entries = Entries(store)
        super().__init__(client_provided_by_user=not close_store, default_collection=default_collection, stable_api=True)

    async def _setup(self) -> None:
        if not self._client_provided_by_user:
            self._exit_stack.push_async_callback(self._entries.store.aclose)

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        return _entry_of(await self._entries.get(_prefix(collection) + key))

    async def _get_managed_entries(self, *, collection: str, keys: Sequence[str]) -> list[ManagedEntry | None]:
        prefix = _prefix(collection)
        return [_entry_of(held) for held in await self._entries.get_many(prefix + key for key in keys)]

    async def _put_managed_entry(self, *, collection: str, key: str, managed_entry: ManagedEntry) -> None:
        await self._entries.set(_prefix(collection) + key, managed_entry.value_as_json.encode(), managed_entry.ttl)

    async def _put_managed_entries(  # noqa: PLR0913 (py-key-value's own)
        self,
        *,
        collection: str,
        keys: Sequence[str],
        managed_entries: Sequence[ManagedEntry],
        ttl: float | None,
        created_at: datetime,  # noqa: ARG002 (likewise)
        expires_at: datetime | None,  # noqa: ARG002 (likewise)
    ) -> None:
        prefix = _prefix(collection)
        entries = zip(keys, managed_entries, strict=True)
        await self._entries.set_many({prefix + key: entry.value_as_json.encode() for key, entry in entries}, ttl)

    async def _delete_managed_entry(self, *, key: str, collection: str) -> bool:
        return await self._delete_managed_entries(keys=[key], collection=collection) == 1

    async def _delete_managed_entries(self, *, keys: Sequence[str], collection: str) -> int:
        prefix = _prefix(collection)
        names = list(dict.fromkeys(prefix + key for key in keys))
        held = await self._entries.get_many(names)
        await self._entries.delete_many(names)
        return sum(one is not None for one in held)

    async def _get_collection_keys(self, *, collection: str, limit: int | None = None) -> list[str]:
        prefix = _prefix(collection)
        keys: list[str] = []
        async with aclosing(self._entries.keys(prefix)) as listing:
            async for key in listing:
                if limit is not None and len(keys) >= limit:
                    break
                keys.append(key.removeprefix(prefix))
        return keys

    async def _delete_collection(self, *, collection: str) -> bool:
        return await self._entries.clear(_prefix(collection)) > 0

    async def _delete_store(self) -> bool:
        await self._entries.clear()
        return True


def _prefix(collection: str) -> str:
    return f"{quote(collection, safe=' /', errors='surrogatepass')}:"


def _entry_of(held: Held | None) -> ManagedEntry | None:
    if held is None:
        return None
    try:
        value: Any = json.loads(held.data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        # Another adapter wrote it.
        return None
    # From what is left, so that the time is right by the clock of py-key-value, too.
    return ManagedEntry.from_ttl(value=value, ttl=held.seconds_left) if held.seconds_left else ManagedEntry(value=value)
