"""Values in a SQLite file: durable, shared by the processes of one machine.

Reads run in the event loop's thread on a connection of their own: in WAL mode they wait for no writer, and a small read
costs less than handing it to a thread. Writes go to one writer thread, which commits together all that has queued up while
the previous commit was being flushed to disk.

Source: https://sqlite.org/wal.html for what WAL mode and `synchronous=FULL` promise.
"""

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from aiokv.backends.base import Clock
from aiokv.errors import CallError, ConfigurationError, StorageError, StorageFullError, StoreClosedError

T = TypeVar("T")

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
_VERSION = """
SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id, pragma_user_version
"""
_DELETE = "DELETE FROM entries WHERE db_name = ? AND key = ?"
_SWEEP = "DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries WHERE expires_at <= ? LIMIT ?)"


class SqliteBackend:
    """Hold values in a SQLite file; use from one event loop, while other loops and processes may use the same file.

    A set or delete returns once it is on the disk (WAL mode, `synchronous=FULL`).

    Args:
        path: The file; made where it is absent, its folder is not.
        clock: Gives the present as seconds since the epoch; every process on the file must agree on it.
        sweep_interval_seconds: How often expired entries are removed, in small steps.
    """

    # For __del__, where the constructor has raised.
    _worker: "_Worker | None" = None

    def __init__(
        self, path: str | Path, *, clock: Clock = time.time, sweep_interval_seconds: float = _SWEEP_INTERVAL_SECONDS
    ) -> None:
        # Absolute, since connections are opened at different times and the process may change its folder between.
        self._path = Path(path).absolute()
        self._clock = clock
        self._sweep_interval_seconds = sweep_interval_seconds
        self._reader: sqlite3.Connection | None = None
        self._closed = False

    def __del__(self) -> None:
        # Let go without aclose, as when its loop is gone: the thread commits what is queued, closes the file and ends.
        if self._worker is not None:
            self._worker.stop()

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        if self._reader is None:
            await self._open("get", db_name, key)
        try:
            row = self._read(db_name, key)
        except sqlite3.Error as error:
            if not _is_busy(error):
                raise _storage_error(self._path, error, "get", db_name, key) from error
            # Another process is recovering or truncating the log; only a thread may wait for it.
            row = await _in_new_thread(lambda: self._patient_read(db_name, key))
        return row[0] if row is not None else None

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        worker = self._worker if self._reader is not None else await self._open("set", db_name, key)
        await _submitted(worker, "set", db_name, key, (db_name, key, self._clock() + ttl_seconds, value), len(value))

    async def delete(self, db_name: str, key: str) -> None:
        """Remove an entry; see `Backend.delete`."""
        worker = self._worker if self._reader is not None else await self._open("delete", db_name, key)
        await _submitted(worker, "delete", db_name, key, (db_name, key))

    async def aclose(self) -> None:
        """Commit what is queued and close the file; see `Backend.aclose`."""
        self._closed = True
        self._reader = None
        if self._worker is not None:
            self._worker.stop()
            # Shielded: whoever else waits for the end is not disturbed by a caller that is cancelled.
            await asyncio.shield(self._worker.ended)

    async def _open(self, verb: str, db_name: str, key: str) -> "_Worker":
        if self._closed:
            raise StoreClosedError("the store is closed", verb=verb, db_name=db_name, key=key)
        if self._worker is None or self._worker.has_failed():
            self._worker = _Worker(self._path, self._clock, self._sweep_interval_seconds)
            self._worker.start()
        worker = self._worker
        # Shielded: a caller that is cancelled leaves the opening to the others.
        reader = await asyncio.shield(worker.opened)
        if self._closed:
            raise StoreClosedError("the store was closed", verb=verb, db_name=db_name, key=key)
        self._reader = reader
        return worker

    def _read(self, db_name: str, key: str) -> tuple[str] | None:
        reader, worker = self._reader, self._worker
        if reader is None or worker is None:
            raise StoreClosedError("the store was closed", verb="get", db_name=db_name, key=key)
        # Held for the sake of a fork in another thread alone.
        with worker.reader_lock:
            row: tuple[str] | None = reader.execute(_GET, (db_name, key, self._clock())).fetchone()
        return row

    def _patient_read(self, db_name: str, key: str) -> tuple[str] | None:
        try:
            with contextlib.closing(_connect(self._path)) as connection:
                row: tuple[str] | None = connection.execute(_GET, (db_name, key, self._clock())).fetchone()
                return row
        except sqlite3.Error as error:
            raise _storage_error(self._path, error, "get", db_name, key) from error


class _Write:
    """One queued set or delete, and the future of the task that waits for it."""

    __slots__ = ("db_name", "future", "key", "parameters", "size_chars", "verb")

    def __init__(  # noqa: PLR0913, PLR0917 (a record)
        self,
        verb: str,
        db_name: str,
        key: str,
        parameters: tuple[str | float, ...],
        size_chars: int,
        future: "asyncio.Future[None]",
    ) -> None:
        self.verb = verb
        self.db_name = db_name
        self.key = key
        self.parameters = parameters
        self.size_chars = size_chars
        self.future = future


async def _submitted(  # noqa: PLR0913, PLR0917 (a record's fields)
    worker: "_Worker | None", verb: str, db_name: str, key: str, parameters: tuple[str | float, ...], size_chars: int = 0
) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    if worker is None or not worker.submit(_Write(verb, db_name, key, parameters, size_chars, future)):
        raise StoreClosedError("the store was closed", verb=verb, db_name=db_name, key=key)
    await future


class _Worker:
    """The one thread that opens the file, writes to it and closes it, and the queue of writes."""

    def __init__(self, path: Path, clock: Clock, sweep_interval_seconds: float) -> None:
        self._path = path
        self._clock = clock
        self._sweep_interval_seconds = sweep_interval_seconds
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._stopping = False
        self._identity: tuple[int, int] | None = None
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._written_since_sweep = 0
        self.opened: asyncio.Future[sqlite3.Connection] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        # What fails to open is told to those who wait for it, if anybody does.
        self.opened.add_done_callback(lambda opened: opened.exception())
        # A fork takes both, so that no child begins with a transaction or a lock of SQLite's own half done.
        self.reader_lock = threading.Lock()
        self.writer_lock = threading.Lock()
        _workers.add(self)

    def start(self) -> None:
        # A daemon: an interpreter that exits without aclose must not hang, and what is not committed was not acknowledged.
        thread = threading.Thread(target=self._run, name=f"aiokv-sqlite {self._path.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self.ended.set_result(None)
            failure = StorageError(f"no thread can be started to write to {self._path}: {error}", transient=True)
            self.opened.set_exception(failure)

    def has_failed(self) -> bool:
        """Say whether the file could not be opened."""
        return self.opened.done() and self.opened.exception() is not None

    def stop(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._queue.put(None)

    def submit(self, write: _Write) -> bool:
        """Queue a write; say whether it will be looked at."""
        if self._stopping:
            return False
        self._queue.put(write)
        return True

    def close_connections(self) -> None:
        """Close the file, in the thread at its end, or in a forked child.

        There it makes SQLite forget the locks that are the parent's, without which the child would take none of its own; no
        log is emptied or removed by that, since the parent's lock on the file stands against it.
        """
        self._stopping = True
        for connection in (self._reader, self._writer):
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):
                    connection.close()

    def _run(self) -> None:
        try:
            try:
                with self.writer_lock:
                    self._reader = _open_reader(self._path)
                    self._identity = _identity(self._path)
            except Exception as error:  # noqa: BLE001 (told to whoever waits)
                self._tell(_fail, self.opened, error)
                return
            self._tell(_succeed, self.opened, self._reader)
            self._work()
        finally:
            with self.reader_lock, self.writer_lock:
                self.close_connections()
            self._tell(_succeed, self.ended, None)

    def _work(self) -> None:
        next_sweep = time.monotonic() + self._sweep_interval_seconds
        stopping = False
        while not stopping:
            batch, stopping = self._next_batch(until=next_sweep)
            if batch:
                with self.writer_lock:
                    self._tell(_resolve_all, self._commit(batch))
            # Between batches, not only when idle: a store that is always written to must give space back too.
            if not stopping and time.monotonic() >= next_sweep:
                with self.writer_lock:
                    swept_all = self._sweep()
                next_sweep = time.monotonic() + (self._sweep_interval_seconds if swept_all else 0.0)

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        # A loop that was closed has nobody waiting.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(what, *arguments)

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

    def _commit(self, batch: list[_Write]) -> list[tuple[_Write, CallError | None]]:
        """Apply a batch in one transaction; give each write with its error, if it has one."""
        committing = False
        try:
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            for write in batch:
                connection.execute(_SET if write.verb == "set" else _DELETE, write.parameters)
            committing = True
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 (a thread that dies would leave every later write waiting)
            self._disconnect()
            if len(batch) > 1 and not committing and not _is_busy(error):
                # One write that does not fit, or cannot be bound, must not fail its neighbours.
                return [outcome for write in batch for outcome in self._commit([write])]
            # A commit refused for want of a lock or of room is rolled back. After another failure, such as one to flush,
            # its frames may stand whole in the log, where a recovery would find them.
            maybe_applied = committing and not (_is_busy(error) or _primary_code(error) == sqlite3.SQLITE_FULL)
            return [(write, self._failure(write, error, maybe_applied=maybe_applied)) for write in batch]
        self._written_since_sweep += len(batch)
        return [(write, None) for write in batch]

    def _failure(self, write: _Write, error: Exception, *, maybe_applied: bool) -> CallError:
        if isinstance(error, StorageError):
            failure = StorageError(error.reason, verb=write.verb, db_name=write.db_name, key=write.key, attempts=1)
        else:
            failure = _storage_error(self._path, error, write.verb, write.db_name, write.key)
        failure.maybe_applied = maybe_applied
        failure.__cause__ = error if isinstance(error, sqlite3.Error) else None
        return failure

    def _connected(self) -> sqlite3.Connection:
        if _identity(self._path) != self._identity:
            # What is written to a file without a name is lost, however often it is flushed.
            raise StorageError(f"{self._path} was deleted or replaced while it was open; close the store, then open it anew")
        if self._writer is None:
            self._writer = _connect(self._path)
        return self._writer

    def _disconnect(self) -> None:
        # Closing rolls back what is open.
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()
            self._writer = None

    def _sweep(self) -> bool:
        """Remove a few expired entries and give a few pages back; say whether that was all."""
        # At least as many as have come since: or a store that is written to faster than this would grow for ever.
        limit = max(_SWEEP_STEP_ENTRIES, 2 * self._written_since_sweep)
        self._written_since_sweep = 0
        try:
            connection = self._connected()
            # A sweep is in no hurry, and writes wait behind it.
            connection.execute("PRAGMA busy_timeout = 0")
            removed = connection.execute(_SWEEP, (self._clock(), limit)).rowcount
            free_pages: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
            if free_pages > _VACUUM_STEP_PAGES:
                # The pragma gives back a page for each row that is read of it.
                connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_STEP_PAGES})").fetchall()
            connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_TIMEOUT_SECONDS * 1000)}")
        except (sqlite3.Error, StorageError):
            # The file is locked, full, read-only or gone. The next round tries again; reads never show what has expired.
            self._disconnect()
            return True
        return removed < limit and free_pages <= _VACUUM_STEP_PAGES


# Every worker whose file may be open, for forks.
_workers: "weakref.WeakSet[_Worker]" = weakref.WeakSet()
_held_for_fork: list[_Worker] = []


def _before_fork() -> None:
    for worker in list(_workers):
        worker.reader_lock.acquire()
        worker.writer_lock.acquire()
        _held_for_fork.append(worker)


def _after_fork_in_parent() -> None:
    while _held_for_fork:
        worker = _held_for_fork.pop()
        worker.writer_lock.release()
        worker.reader_lock.release()


def _after_fork_in_child() -> None:
    for worker in _held_for_fork:
        worker.close_connections()
    _after_fork_in_parent()
    _workers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


async def _in_new_thread(work: Callable[[], T]) -> T:
    """Run a function in a thread of its own: those of the loop's pool may all be waiting for this very loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 (raised where it is awaited)
            loop.call_soon_threadsafe(_fail, future, error)
        else:
            loop.call_soon_threadsafe(_succeed, future, result)

    threading.Thread(target=run, name="aiokv-sqlite patient read", daemon=True).start()
    return await future


def _succeed(future: "asyncio.Future[T]", result: T) -> None:
    # The waiting task may have been cancelled.
    if not future.done():
        future.set_result(result)


def _fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _resolve_all(outcomes: list[tuple[_Write, CallError | None]]) -> None:
    for write, error in outcomes:
        if error is None:
            _succeed(write.future, None)
        else:
            _fail(write.future, error)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 (before each commit: Path.stat is slower)
    except OSError:
        return None
    return status.st_dev, status.st_ino


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
    # In one statement, and so of one moment: another process may be making the file.
    application_id, version, tables = connection.execute(_VERSION).fetchone()
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


def _is_busy(error: Exception) -> bool:
    return _primary_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def _primary_code(error: Exception) -> int:
    # The low byte; the rest tells the kinds of one failure apart. Errors of the Python module itself have no code.
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _open_error(path: Path, error: sqlite3.Error) -> ConfigurationError | StorageError:
    code = _primary_code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigurationError(f"{path} is not a SQLite database; it was left as it is. Name another file.")
    if code == sqlite3.SQLITE_CANTOPEN and not path.parent.is_dir():
        return ConfigurationError(f"{path} cannot be opened: the folder {path.parent} does not exist; make it first")
    if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM}:
        return ConfigurationError(f"{path} cannot be opened: {error}; check that the file and its folder are writable")
    return _storage_error(path, error, "", "", "")


def _storage_error(path: Path, error: Exception, verb: str, db_name: str, key: str) -> StorageError:
    kind = StorageError
    if _primary_code(error) == sqlite3.SQLITE_FULL:
        kind = StorageFullError
        reason = f"no room left for {path}; free some space on its disk"
    elif _is_busy(error):
        reason = f"{path} stayed locked for {_BUSY_TIMEOUT_SECONDS:g} s"
    elif isinstance(error, sqlite3.Error):
        reason = f"{path}: {error}"
    else:
        # Not its text: that of a UnicodeEncodeError holds the value.
        reason = f"{path}: {type(error).__name__}"
    return kind(reason, verb=verb, db_name=db_name, key=key, attempts=1, transient=_is_busy(error))
