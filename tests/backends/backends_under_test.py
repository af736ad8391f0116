"""Every backend that the contract suite runs against; a new backend adds one line to `BACKENDS`."""

import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from helpers import FakeClock
from yarl import URL

from aiokv.backends.base import Backend
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.sqlite import SqliteBackend
from aiokv.server import AccessFile, add_key, running_server

Opener = Callable[[Path, FakeClock], AbstractAsyncContextManager[Backend]]


@contextlib.asynccontextmanager
async def open_memory(_folder: Path, clock: FakeClock) -> AsyncGenerator[Backend]:
    backend = MemoryBackend(clock)
    yield backend
    await backend.aclose()


@contextlib.asynccontextmanager
async def open_sqlite(folder: Path, clock: FakeClock) -> AsyncGenerator[Backend]:
    backend = SqliteBackend(folder / "kv.db", clock=clock)
    yield backend
    await backend.aclose()


@contextlib.asynccontextmanager
async def open_remote(folder: Path, clock: FakeClock) -> AsyncGenerator[Backend]:
    """A client of a real server on loopback, which keeps its values in SQLite and asks for a key."""
    key = add_key(folder / "access", "contract")
    async with (
        open_sqlite(folder, clock) as backend,
        running_server(backend, access=AccessFile(folder / "access")) as address,
    ):
        client = RemoteBackend(URL(address), credentials=key)
        yield client
        await client.aclose()


BACKENDS: dict[str, Opener] = {"memory": open_memory, "sqlite": open_sqlite, "remote": open_remote}
