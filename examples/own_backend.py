"""Give a store a backend of your own: any object with the four methods of `aiokv.Backend`, here over a dictionary."""

import asyncio
import time

from aiokv import AsyncKVStore


class DictBackend:
    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], tuple[str, float]] = {}

    async def get(self, db_name: str, key: str) -> str | None:
        value, expiry = self._entries.get((db_name, key), ("", 0.0))
        return value if time.time() < expiry else None

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        self._entries[db_name, key] = (value, time.time() + ttl_seconds)

    async def delete(self, db_name: str, key: str) -> None:
        self._entries.pop((db_name, key), None)

    async def aclose(self) -> None:
        self._entries.clear()


async def main() -> None:
    backend = DictBackend()
    store = AsyncKVStore("weather", backend=backend)
    await store.set("oslo", "3 °C, rain", ttl=600)
    print(store.target, await store.get("oslo"))
    # The store does not close what it was given.
    await backend.aclose()
    assert await store.get("oslo") is None


asyncio.run(main())
