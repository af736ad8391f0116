"""The one thread that writes to a SQLite file: it commits together all writes that queued up during the previous commit."""

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
from typing import Any, TypeVar

from aiokv.backends import sqlite_file
from aiokv.backends.base import Clock
from aiokv.errors import CallError, StorageError

T = TypeVar("T")

_MAX_BATCH_WRITES = 1_000
_MAX_BATCH_CHARS = 16_000_000
SWEEP_INTERVAL_SECONDS = 5.0
_SWEEP_STEP_ENTRIES = 64
_VACUUM_STEP_PAGES = 256


class Write:
    """One queued set or delete, and the future of the task that waits for it.

    Args:
        verb: `"set"` or `"delete"`.
        db_name: The namespace, for errors.
        key: The key, for errors.
        parameters: Those of the SQL statement.
        size_chars: The value's length, which bounds a batch.
        future: Gets None or the error.
    """

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


class Writer:
    """The thread that opens a file, writes to it and closes it, with its queue of writes; the waiting tasks are of one loop.

    Args:
        path: The file, absolute.
        clock: Returns the present as seconds since the epoch.
        sweep_interval_seconds: The time between two deletions of expired entries.

    Attributes:
        opened: The connection for reads, or the error of opening the file.
        ended: Done when the file is closed.
        reader_lock: Held while the connection for reads is used.
        writer_lock: Held while the connection for writes is used.
    """

    def __init__(self, path: Path, clock: Clock, sweep_interval_seconds: float) -> None:
        self._path = path
        self._clock = clock
        self._sweep_interval_seconds = sweep_interval_seconds
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._stopping = False
        self._identity: tuple[int, int] | None = None
        self._reader: sqlite3.Connection | None = None
        self._writer: sqlite3.Connection | None = None
        self._written_since_sweep = 0
        self.opened: asyncio.Future[sqlite3.Connection] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        # Retrieved here, since perhaps no task waits for it.
        self.opened.add_done_callback(lambda opened: opened.exception())
        # A fork takes both, so that no child begins in the middle of a transaction or with a lock of SQLite's own.
        self.reader_lock = threading.Lock()
        self.writer_lock = threading.Lock()
        _writers.add(self)

    def start(self) -> None:
        """Start the thread; where none can be started, `opened` holds the error."""
        # A daemon: an interpreter that exits without aclose must not hang. A write that is not committed was not acknowledged.
        thread = threading.Thread(target=self._run, name=f"aiokv-sqlite {self._path.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self.ended.set_result(None)
            failure = StorageError(f"no thread can be started to write to {self._path}: {error}", transient=True)
            self.opened.set_exception(failure)

    def has_failed(self) -> bool:
        """Return whether the file could not be opened.

        Returns:
            True after a failure; the caller then starts another thread.
        """
        return self.opened.done() and self.opened.exception() is not None

    def stop(self) -> None:
        """Commit the queue, close the file and end the thread; do not wait for that."""
        if not self._stopping:
            self._stopping = True
            self._queue.put(None)

    def submit(self, write: Write) -> bool:
        """Queue a write.

        Args:
            write: The write; its future gets the outcome.

        Returns:
            False where the thread is stopping, and the write was not queued.
        """
        if self._stopping:
            return False
        self._queue.put(write)
        return True

    def close_connections(self) -> None:
        """Close the file: in the thread at its end, or in a forked child.

        In a child it makes SQLite forget the parent's locks; otherwise the child would take none of its own. The log is neither
        emptied nor deleted by that, since the parent's lock on the file prevents it.
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
                    self._reader = sqlite_file.open_reader(self._path)
                    self._identity = sqlite_file.identity_of(self._path)
            except Exception as error:  # noqa: BLE001 (raised in the task that waits)
                self._call_in_loop(fail, self.opened, error)
                return
            self._call_in_loop(succeed, self.opened, self._reader)
            self._work()
        finally:
            with self.reader_lock, self.writer_lock:
                self.close_connections()
            self._call_in_loop(succeed, self.ended, None)

    def _work(self) -> None:
        next_sweep = time.monotonic() + self._sweep_interval_seconds
        stopping = False
        while not stopping:
            batch, stopping = self._next_batch(until=next_sweep)
            if batch:
                with self.writer_lock:
                    self._call_in_loop(_resolve_all, self._commit(batch))
            # Also between batches: a store that is written to all the time must free its space too.
            if not stopping and time.monotonic() >= next_sweep:
                with self.writer_lock:
                    swept_all = self._sweep()
                next_sweep = time.monotonic() + (self._sweep_interval_seconds if swept_all else 0.0)

    def _call_in_loop(self, function: Callable[..., None], *arguments: object) -> None:
        # In a closed loop no task waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    def _next_batch(self, until: float) -> tuple[list[Write], bool]:
        """Wait for writes and take all queued ones, up to a limit; return whether the stop signal was among them."""
        batch: list[Write] = []
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

    def _commit(self, batch: list[Write]) -> list[tuple[Write, CallError | None]]:
        """Apply a batch in one transaction; return each write with its error, if it has one."""
        committing = False
        try:
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            for write in batch:
                connection.execute(sqlite_file.SET if write.verb == "set" else sqlite_file.DELETE, write.parameters)
            committing = True
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 (a thread that dies would leave every later write waiting)
            self._disconnect()
            if len(batch) > 1 and not committing and not sqlite_file.is_busy(error):
                # A write that is too large, or that SQLite refuses, must not fail the others.
                return [outcome for write in batch for outcome in self._commit([write])]
            # A commit that fails for a lock or a full disk is rolled back. After another failure, such as a failed flush, all
            # of its frames may be in the log, where a recovery would find them.
            is_full = sqlite_file.primary_code(error) == sqlite3.SQLITE_FULL
            maybe_applied = committing and not (sqlite_file.is_busy(error) or is_full)
            return [(write, self._failure(write, error, maybe_applied=maybe_applied)) for write in batch]
        self._written_since_sweep += len(batch)
        return [(write, None) for write in batch]

    def _failure(self, write: Write, error: Exception, *, maybe_applied: bool) -> CallError:
        if isinstance(error, StorageError):
            failure = StorageError(error.reason, verb=write.verb, db_name=write.db_name, key=write.key, attempts=1)
        else:
            failure = sqlite_file.storage_error(self._path, error, write.verb, write.db_name, write.key)
        failure.maybe_applied = maybe_applied
        failure.__cause__ = error if isinstance(error, sqlite3.Error) else None
        return failure

    def _connected(self) -> sqlite3.Connection:
        if sqlite_file.identity_of(self._path) != self._identity:
            # A write to a file without a name would be lost, flushed or not.
            raise StorageError(f"{self._path} was deleted or replaced while it was open; close the store, then open it anew")
        if self._writer is None:
            self._writer = sqlite_file.connect(self._path)
        return self._writer

    def _disconnect(self) -> None:
        # Closing rolls back an open transaction.
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()
            self._writer = None

    def _sweep(self) -> bool:
        """Delete a few expired entries and free a few pages; return whether nothing is left to do."""
        # At least as many as were written since the last sweep; otherwise a busy store would grow for ever.
        limit = max(_SWEEP_STEP_ENTRIES, 2 * self._written_since_sweep)
        self._written_since_sweep = 0
        try:
            connection = self._connected()
            # Writes wait for the sweep, so the sweep waits for no lock.
            connection.execute("PRAGMA busy_timeout = 0")
            deleted = connection.execute(sqlite_file.SWEEP, (self._clock(), limit)).rowcount
            free_pages: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
            if free_pages > _VACUUM_STEP_PAGES:
                # The pragma frees one page for each row that is fetched.
                connection.execute(f"PRAGMA incremental_vacuum({_VACUUM_STEP_PAGES})").fetchall()
            connection.execute(f"PRAGMA busy_timeout = {int(sqlite_file.BUSY_TIMEOUT_SECONDS * 1000)}")
        except (sqlite3.Error, StorageError):
            # The file is locked, full, read-only or gone. The next sweep tries again; reads never show expired entries.
            self._disconnect()
            return True
        return deleted < limit and free_pages <= _VACUUM_STEP_PAGES


# Every writer whose file may be open, for forks.
_writers: "weakref.WeakSet[Writer]" = weakref.WeakSet()
_held_for_fork: list[Writer] = []


def _before_fork() -> None:
    for writer in list(_writers):
        writer.reader_lock.acquire()
        writer.writer_lock.acquire()
        _held_for_fork.append(writer)


def _after_fork_in_parent() -> None:
    while _held_for_fork:
        writer = _held_for_fork.pop()
        writer.writer_lock.release()
        writer.reader_lock.release()


def _after_fork_in_child() -> None:
    for writer in _held_for_fork:
        writer.close_connections()
    _after_fork_in_parent()
    _writers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def succeed(future: "asyncio.Future[T]", result: T) -> None:
    """Set a future's result, unless the waiting task was cancelled.

    Args:
        future: A future of the running loop.
        result: The result.
    """
    if not future.done():
        future.set_result(result)


def fail(future: "asyncio.Future[Any]", error: Exception) -> None:
    """Set a future's exception, unless the waiting task was cancelled.

    Args:
        future: A future of the running loop.
        error: The exception.
    """
    if not future.done():
        future.set_exception(error)


def _resolve_all(outcomes: list[tuple[Write, CallError | None]]) -> None:
    for write, error in outcomes:
        if error is None:
            succeed(write.future, None)
        else:
            fail(write.future, error)
