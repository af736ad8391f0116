"""Stores of every kind that can do more than get, set and delete, each of its own values."""

import contextlib
import uuid
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from aiokv import AsyncKVStore
from aiokv.backends.memory import MemoryBackend
from aiokv.server import running_server


@pytest.fixture(params=["memory", "sqlite", "http"])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[str]:
    """Return the address of an empty store."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "memory":
            yield f"memory://{uuid.uuid4().hex}"
        elif request.param == "sqlite":
            yield f"sqlite:///{tmp_path}/kv.db"
        else:
            yield await stack.enter_async_context(running_server(MemoryBackend()))


@pytest.fixture
async def able(url: str) -> AsyncGenerator[AsyncKVStore]:
    """Return a store that can do everything."""
    async with AsyncKVStore("db", url=url) as opened:
        yield opened


class DictBackend:
    """The smallest backend: four methods and no more."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], str] = {}

    async def get(self, db_name: str, key: str) -> str | None:
        return self.values.get((db_name, key))

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:  # noqa: ARG002 (a backend's)
        self.values[db_name, key] = value

    async def delete(self, db_name: str, key: str) -> None:
        self.values.pop((db_name, key), None)

    async def aclose(self) -> None:
        pass


@pytest.fixture
def unable() -> AsyncKVStore:
    """Return a store that can get, set and delete alone."""
    return AsyncKVStore("db", backend=DictBackend())
