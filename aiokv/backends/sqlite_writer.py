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
from aiokv.backends.base import Clock, HostingOptions
from aiokv.backends.sqlite_commit import Committer, Figures
from aiokv.backends.sqlite_disk import Disk
from aiokv.backends.sqlite_writes import Write
from aiokv.errors import CallError, StorageError

T = TypeVar("T")

_MAX_BATCH_WRITES = 1_000
# A tenth of a commit on most disks. Fewer writers than these gain less than they wait.
_LINGER_SECONDS = 0.0003
_LINGERED_FOR = 16
_MAX_BATCH_CHARS = 16_000_000
SWEEP_INTERVAL_SECONDS = 5.0
# Between two sweeps where sets are refused for want of room.
_ROOM_INTERVAL_SECONDS = 0.25


class Writer:
    """The thread that opens a file, writes to it and closes it, with its queue of writes; the waiting tasks are of one loop.

    Args:
        path: The file, absolute.
        clock: Returns the present as seconds since the epoch.
        sweep_interval_seconds: The time between two deletions of expired entries.
        hosting: What a server asks of the file, or None.
        figures: What is counted.

    Attributes:
        opened: The connection for reads, or the error of opening the file.
        ended: Done when the file is closed.
        reader_lock: Held while the connection for reads is used.
        writer_lock: Held while the connection for writes is used.
    """

    def __init__(
        self, path: Path, clock: Clock, sweep_interval_seconds: float, hosting: HostingOptions | None, figures: Figures
    ) -> None:
        self._path = path
        self._hosting = hosting
        self._figures = figures
        self._disk = Disk(path, hosting or HostingOptions())
        self._clock = clock
        self._sweep_interval_seconds = sweep_interval_seconds
        self._loop = asyncio.get_running_loop()
        self._queue: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        self._gathered: list[Write] = []
        self._stopping = False
        self._writers_at_once = 0
        """How many writes were being committed or in the queue when the last commit ended."""
        self._reader: sqlite3.Connection | None = None
        self._committer: Committer | None = None
        self.opened: asyncio.Future[sqlite3.Connection] = self._loop.create_future()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        # Retrieved here, since perhaps no task waits for it.
        self.opened.add_done_callback(lambda opened: opened.exception())
        # A fork takes both, so that no child begins in the middle of a transaction or with a lock of SQLite's own.
        self.reader_lock = threading.Lock()
        self.writer_lock = threading.Lock()
        _writers.add(self)

    @property
    def identity(self) -> sqlite_file.Identity:
        """What tells the file that was opened from all others; once `opened` is done."""
        return () if self._committer is None else self._committer.identity

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
            self._hand_over()
            self._queue.put(None)

    def submit(self, write: Write) -> bool:
        """Queue a write.

        Args:
            write: The write; its `done` is called with the outcome.

        Returns:
            False where the thread is stopping, and the write was not queued.
        """
        if self._stopping:
            return False
        # The thread gets the writes of one turn of the loop at its end, so that it commits them together.
        if not self._gathered:
            self._loop.call_soon(self._hand_over)
        self._gathered.append(write)
        return True

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, []
        for write in gathered:
            self._queue.put(write)

    def close_connections(self) -> None:
        """Close the file: in the thread at its end, or in a forked child.

        In a child it makes SQLite forget the parent's locks; otherwise the child would take none of its own. The log is neither
        emptied nor deleted by that, since the parent's lock on the file prevents it.
        """
        self._stopping = True
        if self._reader is not None:
            with contextlib.suppress(sqlite3.Error):
                self._reader.close()
        if self._committer is not None:
            self._committer.close()

    def _run(self) -> None:
        try:
            try:
                with self.writer_lock:
                    self._reader = sqlite_file.open_reader(
                        self._disk,
                        self._path,
                        self._clock,
                        hosted=self._hosting is not None,
                        quick_check=self._hosting is not None and self._hosting.quick_check,
                    )
                    self._disk.restore_ballast()
                    self._committer = Committer(self._path, self._clock, self._disk, self._figures)
            except Exception as error:  # noqa: BLE001 (raised in the task that waits)
                self._call_in_loop(fail, self.opened, error)
                return
            self._call_in_loop(succeed, self.opened, self._reader)
            self._work(self._committer)
        finally:
            with self.reader_lock, self.writer_lock:
                self.close_connections()
            self._call_in_loop(succeed, self.ended, None)

    def _work(self, committer: Committer) -> None:
        last_sweep = time.monotonic()
        next_sweep = last_sweep + self._sweep_interval_seconds
        stopping = False
        while not stopping:
            batch, stopping = self._next_batch(until=next_sweep)
            if batch:
                with self.writer_lock:
                    outcomes = committer.commit(batch)
                # Before those who are told can write again.
                self._writers_at_once = len(batch) + self._queue.qsize()
                self._call_in_loop(self._tell_all, outcomes)
            if committer.wants_room:
                next_sweep = min(next_sweep, last_sweep + _ROOM_INTERVAL_SECONDS)
            # Also between batches: a store that is written to all the time must free its space too.
            if not stopping and time.monotonic() >= next_sweep:
                with self.writer_lock:
                    swept_all = committer.sweep()
                last_sweep = time.monotonic()
                next_sweep = last_sweep + (self._sweep_interval_seconds if swept_all else 0.0)

    def _tell_all(self, outcomes: list[tuple[Write, CallError | None]]) -> None:
        for write, error in outcomes:
            try:
                write.done(error)
            except Exception as fault:  # noqa: BLE001 (one must not keep the others waiting)
                self._loop.call_exception_handler({"message": "a write's outcome was not taken", "exception": fault})

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
            if write is not None and _LINGERED_FOR <= self._writers_at_once > self._queue.qsize() + 1:
                # Whose writes were just committed may be about to write again, and a commit of all costs half of two.
                time.sleep(_LINGER_SECONDS)
            while write is not None:
                batch.append(write)
                size_chars += len(write.value) or write.size_chars
                if len(batch) >= _MAX_BATCH_WRITES or size_chars >= _MAX_BATCH_CHARS:
                    return batch, False
                write = self._queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True


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


def settle(future: "asyncio.Future[None]", error: Exception | None) -> None:
    """End a future, unless the waiting task was cancelled.

    Args:
        future: A future of the running loop.
        error: Its exception, or None.
    """
    if error is None:
        succeed(future, None)
    else:
        fail(future, error)


async def run_in_thread(work: Callable[[], T]) -> T:
    """Run a function in a new thread: all threads of the loop's pool may be waiting for this very loop.

    Args:
        work: The function; an error of it is raised.

    Returns:
        Its result.
    """
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
