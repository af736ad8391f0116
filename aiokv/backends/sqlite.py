"""Values in a SQLite file: durable, shared by the processes of one machine.

Reads run in the event loop's thread on a connection of their own: in WAL mode they wait for no writer, and a small read
costs less than handing it to a thread. Writes go to one writer thread (`sqlite_writer`).

Source: https://sqlite.org/wal.html for what WAL mode and `synchronous=FULL` promise.
"""

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from aiokv import clock as process_clock
from aiokv.backends import sqlite_file
from aiokv.backends.base import Clock
from aiokv.backends.sqlite_writer import SWEEP_INTERVAL_SECONDS, Write, Writer, fail, succeed
from aiokv.errors import StoreClosedError

T = TypeVar("T")


class SqliteBackend:
    """A SQLite file of values. One object serves one event loop; other loops and processes may use the same file.

    A set or delete returns once it is on the disk (WAL mode, `synchronous=FULL`).

    Args:
        path: The file. It is made where it is absent, its folder is not.
        clock: Returns the present as seconds since the epoch; every process on the file must agree on it. None takes
            `aiokv.clock.now`, looked up at each use.
        sweep_interval_seconds: The time between two deletions of expired entries, which go in small steps.
    """

    # For __del__, where the constructor has raised.
    _writer: "Writer | None" = None

    def __init__(
        self, path: str | Path, *, clock: Clock | None = None, sweep_interval_seconds: float = SWEEP_INTERVAL_SECONDS
    ) -> None:
        # Absolute: connections are opened at different times, and the process may change its working directory meanwhile.
        self._path = Path(path).absolute()
        self._clock = clock
        self._sweep_interval_seconds = sweep_interval_seconds
        self._reader: sqlite3.Connection | None = None
        self._closed = False

    def __del__(self) -> None:
        # Dropped without aclose, as when its loop is gone: the thread commits the queue, closes the file and ends.
        if self._writer is not None:
            self._writer.stop()

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        if self._reader is None:
            await self._open("get", db_name, key)
        try:
            row = self._read(db_name, key)
        except sqlite3.Error as error:
            if not sqlite_file.is_busy(error):
                raise sqlite_file.storage_error(self._path, error, "get", db_name, key) from error
            # Another process is recovering or truncating the log. Only a thread may wait for that.
            row = await _run_in_thread(lambda: self._waiting_read(db_name, key))
        return row[0] if row is not None else None

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        writer = self._writer if self._reader is not None else await self._open("set", db_name, key)
        now = process_clock.now() if self._clock is None else self._clock()
        await _submit(writer, "set", db_name, key, (db_name, key, now + ttl_seconds, value), len(value))

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        writer = self._writer if self._reader is not None else await self._open("delete", db_name, key)
        await _submit(writer, "delete", db_name, key, (db_name, key))

    async def aclose(self) -> None:
        """Commit the queue and close the file; see `Backend.aclose`."""
        self._closed = True
        self._reader = None
        if self._writer is not None:
            self._writer.stop()
            # Shielded: a cancelled caller does not disturb the others that wait for the end.
            await asyncio.shield(self._writer.ended)

    async def _open(self, verb: str, db_name: str, key: str) -> "Writer":
        if self._closed:
            raise StoreClosedError("the store is closed", verb=verb, db_name=db_name, key=key)
        if self._writer is None or self._writer.has_failed():
            self._writer = Writer(self._path, self._clock or _process_now, self._sweep_interval_seconds)
            self._writer.start()
        writer = self._writer
        # Shielded: a cancelled caller leaves the opening to the others.
        reader = await asyncio.shield(writer.opened)
        if self._closed:
            raise StoreClosedError("the store was closed", verb=verb, db_name=db_name, key=key)
        self._reader = reader
        return writer

    def _read(self, db_name: str, key: str) -> tuple[str] | None:
        reader, writer = self._reader, self._writer
        if reader is None or writer is None:
            raise StoreClosedError("the store was closed", verb="get", db_name=db_name, key=key)
        # Only a fork in another thread contends for it.
        now = process_clock.now() if self._clock is None else self._clock()
        with writer.reader_lock:
            row: tuple[str] | None = reader.execute(sqlite_file.GET, (db_name, key, now)).fetchone()
        return row

    def _waiting_read(self, db_name: str, key: str) -> tuple[str] | None:
        now = process_clock.now() if self._clock is None else self._clock()
        try:
            with contextlib.closing(sqlite_file.connect(self._path)) as connection:
                row: tuple[str] | None = connection.execute(sqlite_file.GET, (db_name, key, now)).fetchone()
                return row
        except sqlite3.Error as error:
            raise sqlite_file.storage_error(self._path, error, "get", db_name, key) from error


async def _submit(  # noqa: PLR0913, PLR0917 (a record's fields)
    writer: "Writer | None", verb: str, db_name: str, key: str, parameters: tuple[str | float, ...], size_chars: int = 0
) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if writer is None or not writer.submit(Write(verb, db_name, key, parameters, size_chars, future)):
        raise StoreClosedError("the store was closed", verb=verb, db_name=db_name, key=key)
    await future


async def _run_in_thread(work: Callable[[], T]) -> T:
    """Run a function in a new thread: all threads of the loop's pool may be waiting for this very loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 (raised in the task that waits)
            loop.call_soon_threadsafe(fail, future, error)
        else:
            loop.call_soon_threadsafe(succeed, future, result)

    threading.Thread(target=run, name="aiokv-sqlite read", daemon=True).start()
    return await future


def _process_now() -> float:
    # Looked up at each use, so that a test that replaces it moves every store.
    return process_clock.now()
