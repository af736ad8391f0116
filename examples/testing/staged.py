"""A backend of the app's own: one engine for several stages, such as `test` and `production`, that do not see one another."""

from aiokv import Backend


class StagedBackend:
    """A backend whose namespaces begin with a stage.

    Args:
        stage: The stage, without `-`.
        engine: Where the values live.
    """

    def __init__(self, stage: str, engine: Backend) -> None:
        self._stage = stage
        self._engine = engine

    async def get(self, db_name: str, key: str) -> str | None:
        """Return the value, or None."""
        return await self._engine.get(f"{self._stage}-{db_name}", key)

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value."""
        await self._engine.set(f"{self._stage}-{db_name}", key, value, ttl_seconds)

    async def delete(self, db_name: str, key: str) -> None:
        """Delete a value."""
        await self._engine.delete(f"{self._stage}-{db_name}", key)

    async def aclose(self) -> None:
        """Close the engine."""
        await self._engine.aclose()
