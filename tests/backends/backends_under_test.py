"""Every backend that the suites of the contract run against; a new one is a function here and a class in the test files."""

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


def over_http(open_values: Opener) -> Opener:
    """Open a client of a real server on loopback, which keeps its values in another backend and asks for a key."""

    @contextlib.asynccontextmanager
    async def open_http(folder: Path, clock: FakeClock) -> AsyncGenerator[Backend]:
        key = add_key(folder / "access", "contract")
        async with (
            open_values(folder, clock) as backend,
            running_server(backend, access=AccessFile(folder / "access")) as address,
        ):
            client = RemoteBackend(URL(address), credentials=key)
            yield client
            await client.aclose()

    return open_http


open_http_memory = over_http(open_memory)
open_http_sqlite = over_http(open_sqlite)
