"""Values in a SQLite file: durable, shared by the processes of one machine.

Reads run in the event loop's thread on a connection of their own: in WAL mode they wait for no writer, and a small read
costs less than handing it to a thread. Writes go to one writer thread, which commits together all that has queued up while
the previous commit was being flushed to disk.

Source: https://sqlite.org/wal.html for what WAL mode and `synchronous=FULL` promise.
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from aiokv.backends.base import Clock
from aiokv.errors import CallError, ConfigurationError, StorageError, StorageFullError, StoreClosedError

APPLICATION_ID: Final = 0x61696F6B  # "aiok"
SCHEMA_VERSION: Final = 1

_BUSY_TIMEOUT_SECONDS = 10.0
_MAX_BATCH_WRITES = 1_000
_MAX_BATCH_CHARS = 16_000_000
_SWEEP_INTERVAL_SECONDS = 5.0
_SWEEP_STEP_ENTRIES = 64
_VACUUM_STEP_PAGES = 256
_CHECKPOINT_PAGES = 4_000
_WAL_LIMIT_BYTES = 64 * 1024 * 1024

_SCHEMA = """
CREATE TABLE entries (
    db_name TEXT NOT NULL,
    key TEXT NOT NULL,
    expires_at REAL NOT NULL,
    value TEXT NOT NULL,
    UNIQUE (db_name, key)
) STRICT;
CREATE INDEX entries_by_expiry ON entries (expires_at);
"""
_GET = "SELECT value FROM entries WHERE db_name = ? AND key = ? AND expires_at > ?"
_SET = """
INSERT INTO entries (db_name, key, expires_at, value) VALUES (?, ?, ?, ?)
ON CONFLICT (db_name, key) DO UPDATE SET expires_at = excluded.expires_at, value = excluded.value
"""
_DELETE = "DELETE FROM entries WHERE db_name = ? AND key = ?"
_SWEEP = "DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries WHERE expires_at <= ? LIMIT ?)"


class SqliteBackend:
    """Hold values in a SQLite file; use from one event loop, while other processes may use the same file.

    A set or delete returns once it is on the disk (WAL mode, `synchronous=FULL`).

    Args:
        path: The file; made where it is absent, its folder is not.
        clock: Gives the present as seconds since the epoch; every process on the file must agree on it.
        sweep_interval_seconds: How often expired entries are removed, in small steps.
    """

    def __init__(
        self, path: str | Path, *, clock: Clock = time.time, sweep_interval_seconds: float = _SWEEP_INTERVAL_SECONDS
    ) -> None:
        self._path = Path(path)
        self._clock = clock
        self._writer = _Writer(self._path, clock, sweep_interval_seconds)
        self._reader: sqlite3.Connection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closed = False

    def __del__(self) -> None:
        # Let go without aclose, as when its loop is gone: the thread ends once its queue is empty.
        if not self._closed:
            self._writer.stop()
            if self._reader is not None:
                self._reader.close()

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        reader = self._reader or await self._open("get", db_name, key)
        try:
            row = reader.execute(_GET, (db_name, key, self._clock())).fetchone()
        except sqlite3.OperationalError as error:
            if not _is_busy(error):
                raise _storage_error(self._path, error, "get", db_name, key) from error
            row = await asyncio.to_thread(self._patient_get, db_name, key)
        except sqlite3.Error as error:
            raise _storage_error(self._path, error, "get", db_name, key) from error
        return row[0] if row is not None else None

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        if self._reader is None:
            await self._open("set", db_name, key)
        await self._writer.submit("set", db_name, key, (db_name, key, self._clock() + ttl_seconds, value), len(value))

    async def delete(self, db_name: str, key: str) -> None:
        """Remove an entry; see `Backend.delete`."""
        if self._reader is None:
            await self._open("delete", db_name, key)
        await self._writer.submit("delete", db_name, key, (db_name, key))

    async def aclose(self) -> None:
        """Commit what is queued and close the file; see `Backend.aclose`."""
        if self._closed:
            return
        self._closed = True
        if self._opening is not None:
            await asyncio.wait([self._opening])
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        self._writer.stop()
        await asyncio.to_thread(self._writer.join)

    async def _open(self, verb: str, db_name: str, key: str) -> sqlite3.Connection:
        if self._closed:
            raise StoreClosedError("the store is closed", verb=verb, db_name=db_name, key=key)
        if self._opening is None or (self._opening.done() and self._reader is None):
            self._opening = asyncio.create_task(self._open_connections())
        # Shielded: a caller that is cancelled leaves the opening to the others.
        await asyncio.shield(self._opening)
        if self._reader is None:
            raise StoreClosedError("the store was closed", verb=verb, db_name=db_name, key=key)
        return self._reader

    async def _open_connections(self) -> None:
        # In a thread: another process that is making the file holds this one up for a moment.
        self._reader = await asyncio.to_thread(_open_reader, self._path)
        self._writer.start()

    def _patient_get(self, db_name: str, key: str) -> tuple[str] | None:
        # Another process is recovering or truncating the WAL; only a thread may wait for it.
        try:
            with contextlib.closing(_connect(self._path)) as connection:
                row: tuple[str] | None = connection.execute(_GET, (db_name, key, self._clock())).fetchone()
                return row
        except sqlite3.Error as error:
            raise _storage_error(self._path, error, "get", db_name, key) from error


class _Write:
    """One queued set or delete, and the future of the task that waits for it."""

    __slots__ = ("db_name", "future", "key", "loop", "parameters", "size_chars", "verb")

    def __init__(self, verb: str, db_name: str, key: str, parameters: tuple[str | float, ...], size_chars: int) -> None:
        self.verb = verb
        self.db_name = db_name
        self.key = key
        self.parameters = parameters
        self.size_chars = size_chars
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()

    def resolve(self, error: CallError | None) -> None:
        # The waiting task may have been cancelled.
        if self.future.done():
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class _Writer:
    """The one thread that writes to the file, and its queue."""

    def __init__(self, path: Path, clock: Clock, sweep_interval_seconds: float) -> None:
        self._path = path
        self._clock = clock
        self._sweep_interval_seconds = sweep_interval_seconds
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def start(self) -> None:
        # A daemon: an interpreter that exits without aclose must not hang, and what is not committed was not acknowledged.
        self._thread = threading.Thread(target=self._run, name=f"aiokv-sqlite {self._path.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._queue.put(None)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    async def submit(self, verb: str, db_name: str, key: str, parameters: tuple[str | float, ...], size_chars: int = 0) -> None:
        if self._stopping:
            raise StoreClosedError("the store was closed", verb=verb, db_name=db_name, key=key)
        write = _Write(verb, db_name, key, parameters, size_chars)
        self._queue.put(write)
        await write.future

    def _run(self) -> None:
        connection: sqlite3.Connection | None = None
        next_sweep = time.monotonic() + self._sweep_interval_seconds
        stopping = False
        while not stopping:
            batch, stopping = self._next_batch(until=next_sweep)
            if batch:
                connection = self._commit(connection, batch)
            # Between batches, not only when idle: a store that is always written to must give space back too.
            if not stopping and time.monotonic() >= next_sweep:
                connection, swept_all = self._sweep(connection)
                next_sweep = time.monotonic() + (self._sweep_interval_seconds if swept_all else 0.0)
        if connection is not None:
            connection.close()

    def _next_batch(self, until: float) -> tuple[list[_Write], bool]:
        """Wait for writes and take all that are queued, up to a bound; say whether the end was among them."""
        batch: list[_Write] = []
        size_chars = 0
        try:
            write = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            while write is not None:
                batch.append(write)
                size_chars += write.size_chars
                if len(batch) >= _MAX_BATCH_WRITES or size_chars >= _MAX_BATCH_CHARS:
                    return batch, False
                write = self._queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _commit(self, connection: sqlite3.Connection | None, batch: Sequence[_Write]) -> sqlite3.Connection | None:
        """Apply a batch in one transaction, tell the waiting tasks, and give back the connection to go on with."""
        failure: sqlite3.Error | None = None
        maybe_applied = False
        try:
            connection = connection or _connect(self._path)
            connection.execute("BEGIN IMMEDIATE")
            for write in batch:
                connection.execute(_SET if write.verb == "set" else _DELETE, write.parameters)
            maybe_applied = True
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            failure = error
            # A commit refused for want of a lock or of room is rolled back. After another failure, such as one to flush,
            # its frames may stand whole in the WAL, where a recovery would find them.
            maybe_applied = maybe_applied and not (_is_busy(error) or _primary_code(error) == sqlite3.SQLITE_FULL)
            if connection is not None:
                # Closing rolls back what is open.
                connection.close()
            connection = None
        self._resolve(batch, failure, maybe_applied=maybe_applied)
        return connection

    def _resolve(self, batch: Sequence[_Write], failure: sqlite3.Error | None, *, maybe_applied: bool) -> None:
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Write, CallError | None]]] = defaultdict(list)
        for write in batch:
            error = None
            if failure is not None:
                error = _storage_error(self._path, failure, write.verb, write.db_name, write.key)
                error.maybe_applied = maybe_applied
                error.__cause__ = failure
            by_loop[write.loop].append((write, error))
        for loop, outcomes in by_loop.items():
            # A loop that was closed has nobody waiting.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_resolve_all, outcomes)

    def _sweep(self, connection: sqlite3.Connection | None) -> tuple[sqlite3.Connection | None, bool]:
        """Remove a few expired entries and give a few pages back; say with what connection, and whether that was all."""
        try:
            connection = connection or _connect(self._path)
            removed = connection.execute(_SWEEP, (self._clock(), _SWEEP_STEP_ENTRIES)).rowcount
            free_pages: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
            if free_pages > _VACUUM_STEP_PAGES:
                # The pragma gives back a page for each row that is read of it.
                connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_STEP_PAGES})").fetchall()
        except sqlite3.Error:
            # The file is locked, full or read-only. The next round tries again, and reads never show what has expired.
            return connection, True
        return connection, removed < _SWEEP_STEP_ENTRIES and free_pages <= _VACUUM_STEP_PAGES


def _resolve_all(outcomes: Sequence[tuple[_Write, CallError | None]]) -> None:
    for write, error in outcomes:
        write.resolve(error)


def _connect(path: Path, *, busy_timeout_seconds: float = _BUSY_TIMEOUT_SECONDS) -> sqlite3.Connection:
    # Autocommit: every transaction is begun and ended in this file. Threads hand connections over, never share them.
    connection = sqlite3.connect(path, timeout=busy_timeout_seconds, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _open_reader(path: Path) -> sqlite3.Connection:
    """Make the file or check that it is ours, and give a connection that reads without waiting."""
    try:
        connection = _connect(path)
    except sqlite3.Error as error:
        raise _open_error(path, error) from error
    try:
        _prepare(path, connection)
        connection.execute("PRAGMA busy_timeout = 0")
    except BaseException as error:
        connection.close()
        if isinstance(error, sqlite3.Error):
            raise _open_error(path, error) from error
        raise
    return connection


def _prepare(path: Path, connection: sqlite3.Connection) -> None:
    made = _check_version(path, connection)
    if not made:
        # Counts only before the first table.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _enter_wal_mode(connection)
    if made:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have made the tables since.
        if not _check_version(path, connection):
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def _check_version(path: Path, connection: sqlite3.Connection) -> bool:
    """Say whether the tables are there, False for an empty file; refuse a file of another kind or of a newer version."""
    application_id: int = connection.execute("PRAGMA application_id").fetchone()[0]
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    tables: int = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    if (application_id, version, tables) == (0, 0, 0):
        return False
    if application_id != APPLICATION_ID:
        raise ConfigurationError(
            f"{path} is a SQLite database of another application; it was left as it is. Name another file."
        )
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{path} has schema version {version}, this aiokv knows up to {SCHEMA_VERSION}; it was left as it is. "
            "Upgrade aiokv, or name another file."
        )
    return True


def _enter_wal_mode(connection: sqlite3.Connection) -> None:
    # SQLite does not apply its busy timeout to this change, and several processes may make one file at once.
    deadline = time.monotonic() + _BUSY_TIMEOUT_SECONDS
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
        else:
            if mode == "wal":
                return
            raise sqlite3.OperationalError(f"the file system does not allow WAL mode (got {mode})")
        time.sleep(0.01)


def _is_busy(error: sqlite3.Error) -> bool:
    return _primary_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def _primary_code(error: sqlite3.Error) -> int:
    # The low byte; the rest tells the kinds of one failure apart. Errors of the Python module itself have no code.
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _open_error(path: Path, error: sqlite3.Error) -> ConfigurationError:
    code = _primary_code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigurationError(f"{path} is not a SQLite database; it was left as it is. Name another file.")
    if code == sqlite3.SQLITE_CANTOPEN and not path.parent.is_dir():
        return ConfigurationError(f"{path} cannot be opened: the folder {path.parent} does not exist; make it first")
    return ConfigurationError(f"{path} cannot be opened: {error}; check that the file and its folder are writable")


def _storage_error(path: Path, error: sqlite3.Error, verb: str, db_name: str, key: str) -> StorageError:
    kind = StorageError
    if _primary_code(error) == sqlite3.SQLITE_FULL:
        kind = StorageFullError
        reason = f"no room left for {path}; free some space on its disk"
    elif _is_busy(error):
        reason = f"{path} stayed locked by another process for {_BUSY_TIMEOUT_SECONDS:g} s"
    else:
        reason = f"{path}: {error}"
    return kind(reason, verb=verb, db_name=db_name, key=key, attempts=1, transient=_is_busy(error))
