"""A small app: forecasts of a slow service, shared by all processes, and the last city that somebody asked for."""

from collections.abc import Awaitable, Callable

from aiokv import AsyncKVStore, NearCache, kv_cached

Service = Callable[[str], Awaitable[str]]


# Where a test or the program says which store: `set_default_store`.
@kv_cached(ttl=600, ignore=("service",), stale_if_error=86400)
async def forecast(city: str, service: Service) -> str:
    """Return the forecast of a city; ask the service at most every ten minutes."""
    return await service(city)


@kv_cached(ttl=600, near=NearCache(ttl=5))
async def headline(city: str) -> str:
    """Return a headline; for five seconds from the memory of this process."""
    return f"Weather in {city}"


class LastCity:
    """The last city that somebody asked for."""

    def __init__(self, store: AsyncKVStore) -> None:
        self._store = store

    async def get(self) -> str | None:
        """Return the city, or None where nobody has asked within a day."""
        return await self._store.get("last-city")

    async def set(self, city: str) -> None:
        """Remember a city for a day."""
        await self._store.set("last-city", city, ttl=86400)
