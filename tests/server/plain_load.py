"""Clients without retries that call a server all the time, and what they were answered."""

import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from server_clients import Answer, Connection, head, put

from aiokv.backends.sqlite import SqliteBackend

INTERRUPTIONS = (ConnectionError, asyncio.IncompleteReadError)
_PATIENCE_SECONDS = 15.0
_numbers = itertools.count()


class Load:
    """What the clients have seen so far.

    Args:
        port: The server's port at 127.0.0.1.
        stays: Whether a client connects again where its connection was closed in order.
        tolerates: Whether a client goes on after an interruption; where not, it is a failure.
    """

    def __init__(self, port: int, *, stays: bool, tolerates: bool) -> None:
        self._port = port
        self._stays = stays
        self._tolerates = tolerates
        self.is_over = False
        self.answers = 0
        self.interruptions = 0
        self.failures: list[str] = []
        self.acknowledged: dict[str, str] = {}

    async def answered(self, count: int) -> None:
        """Wait for further answers."""
        reached = self.answers + count
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while self.answers < reached:
                assert not self.failures, self.failures
                await asyncio.sleep(0.002)

    async def use(self, client: int) -> None:
        try:
            await self._use(client)
        except Exception as error:  # noqa: BLE001 (all of it is told at the end)
            self.failures.append(repr(error))

    async def _use(self, client: int) -> None:
        while not self.is_over:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            except INTERRUPTIONS as error:
                self._interrupt(error)
                await asyncio.sleep(0.01)
                continue
            try:
                connection = Connection(reader, writer)
                while not self.is_over:
                    if not await self._call(connection, f"{client}-{next(_numbers)}"):
                        break
            except INTERRUPTIONS as error:
                self._interrupt(error)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            if not self._stays:
                return

    async def _call(self, connection: Connection, key: str) -> bool:
        """Set and get; return whether the connection can be used further."""
        value = f"value of {key} " * 20
        stored = await self._ask(connection, put(f"/set/db/{key}", value.encode()))
        if stored.status == 200:
            self.acknowledged[key] = value
        if stored.headers.get("connection") == "close":
            return False
        read = await self._ask(connection, head("GET", f"/get/db/{key}"))
        if stored.status == 200 and read.status == 200:
            assert read.value() == value
        return read.headers.get("connection") != "close"

    async def _ask(self, connection: Connection, request: bytes) -> Answer:
        await connection.send(request)
        answer = await connection.answer()
        self.answers += 1
        if answer.status != 200:
            self.failures.append(f"{answer.status} {answer.error()}")
        return answer

    def _interrupt(self, error: Exception) -> None:
        self.interruptions += 1
        if not self._tolerates:
            self.failures.append(repr(error))


@contextlib.asynccontextmanager
async def load_on(port: int, clients: int = 16, *, stays: bool = True, tolerates: bool = False) -> AsyncGenerator[Load]:
    """Call a server at 127.0.0.1 from several clients for as long as the context lasts."""
    load = Load(port, stays=stays, tolerates=tolerates)
    tasks = [asyncio.create_task(load.use(client)) for client in range(clients)]
    try:
        yield load
    finally:
        load.is_over = True
        await asyncio.gather(*tasks)


async def lost(path: Path, acknowledged: dict[str, str]) -> Sequence[str]:
    """Return the keys whose value is not in the file."""
    backend = SqliteBackend(path)
    try:
        return [key for key, value in acknowledged.items() if await backend.get("db", key) != value]
    finally:
        await backend.aclose()


def damage(path: Path) -> list[str]:
    """Return what SQLite finds wrong with a file."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("PRAGMA integrity_check") if row[0] != "ok"]
