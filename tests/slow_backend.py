"""A backend in memory whose calls take a while, and which holds no claims."""

import asyncio


class SlowBackend:
    """A backend whose reads return what was there when they began."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.reading = asyncio.Event()
        """Set once a read has begun that found something."""

    async def get(self, db_name: str, key: str) -> str | None:
        value = self.values.get(f"{db_name}/{key}")
        if value is not None:
            self.reading.set()
        await asyncio.sleep(0.02)
        return value

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:  # noqa: ARG002
        self.values[f"{db_name}/{key}"] = value

    async def delete(self, db_name: str, key: str) -> None:
        self.values.pop(f"{db_name}/{key}", None)

    async def aclose(self) -> None:
        pass
