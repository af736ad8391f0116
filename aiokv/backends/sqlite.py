"""Values in a SQLite file: durable, shared by the processes of one machine.

Reads run in the event loop's thread on a connection of their own: in WAL mode they wait for no writer, and a small read
costs less than handing it to a thread. Writes go to one writer thread (`sqlite_writer`).

Batches and pages of listings are read in the loop's thread too, a few microseconds for each key: a thread has to win the
interpreter's lock back for each row, which takes longer where the loop is busy. Large values and counts go to a thread.

Source: https://sqlite.org/wal.html for what WAL mode and `synchronous=FULL` promise.
"""

import asyncio
import contextlib
import functools
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from zlib import crc32

from aiokv import clock as process_clock
from aiokv.backends import sqlite_file, sqlite_many, sqlite_schema
from aiokv.backends.base import Clock, Gauges, HostingOptions, Usage, WouldWaitError
from aiokv.backends.capabilities import MAX_BATCH_KEYS, ClaimOutcome, Cleared, Entry, Omitted, Page
from aiokv.backends.sqlite_claims import Claim, Release
from aiokv.backends.sqlite_commit import Figures
from aiokv.backends.sqlite_disk import Disk
from aiokv.backends.sqlite_many import LOOP_BYTES, DeleteMany, SetMany
from aiokv.backends.sqlite_scan import Clear, Listing
from aiokv.backends.sqlite_watch import Watcher
from aiokv.backends.sqlite_writer import SWEEP_INTERVAL_SECONDS, Writer, run_in_thread, settle
from aiokv.backends.sqlite_writes import Job, Write
from aiokv.backends.watching import Watch
from aiokv.errors import CallError, CorruptValueError, StorageError, StoreClosedError

T = TypeVar("T")
AnyJob = TypeVar("AnyJob", bound=Job)

_PROBE_SECONDS = 1.0
_ANY_BYTES = 2**62


class SqliteBackend:
    """A SQLite file of values. One object serves one event loop; other loops and processes may use the same file.

    A set or delete returns once it is on the disk (WAL mode, `synchronous=FULL`).

    Args:
        path: The file. It is made where it is absent, its folder is not.
        clock: Returns the present as seconds since the epoch; every process on the file must agree on it. None takes
            `aiokv.clock.now`, looked up at each use.
        sweep_interval_seconds: The time between two deletions of expired entries, which go in small steps.
        hosting: What a server asks of the file; None where the values are this program's own.
    """

    # For __del__, where the constructor has raised.
    _writer: "Writer | None" = None

    def __init__(
        self,
        path: str | Path,
        *,
        clock: Clock | None = None,
        sweep_interval_seconds: float = SWEEP_INTERVAL_SECONDS,
        hosting: HostingOptions | None = None,
    ) -> None:
        # Absolute: connections are opened at different times, and the process may change its working directory meanwhile.
        self._path = Path(path).absolute()
        self._clock = clock
        self._sweep_interval_seconds = sweep_interval_seconds
        self._hosting = hosting
        self._disk = Disk(self._path, hosting or HostingOptions())
        self._figures = Figures()
        self._cursor: sqlite3.Cursor | None = None
        self._probe: asyncio.Task[None] | None = None
        # Made by the first watch: it and this object refer to one another, so that only the garbage collector ends them.
        self._watcher: Watcher | None = None
        self._closed = False

    def __del__(self) -> None:
        # Dropped without aclose, as when its loop is gone: the thread commits the queue, closes the file and ends.
        if self._writer is not None:
            self._writer.stop()

    def get_now(self, db_name: str, key: str) -> str | None:
        """Read a value; see `ImmediateBackend.get_now`."""
        cursor, writer = self._cursor, self._writer
        if cursor is None or writer is None:
            raise WouldWaitError
        now, lock = process_clock.now() if self._clock is None else self._clock(), writer.reader_lock
        try:
            # Only a fork in another thread contends for the lock. `with` would cost twice as much.
            lock.acquire()
            try:
                row = cursor.execute(sqlite_schema.GET, (db_name, key, now)).fetchone()
            finally:
                lock.release()
        except sqlite3.Error as error:
            if sqlite_file.is_busy(error):
                # Another process is recovering or truncating the log. Only a thread may wait for that.
                raise WouldWaitError from None
            raise self._read_failure(error, db_name, key) from error
        return None if row is None else self._verified(row, db_name, key)

    def get_all_now(self, names: Sequence[tuple[str, str]]) -> Sequence[str | Exception | None]:
        """Read values; see `GatheringBackend.get_all_now`."""
        cursor, writer = self._cursor, self._writer
        if cursor is None or writer is None:
            raise WouldWaitError
        now = process_clock.now() if self._clock is None else self._clock()
        values: list[str | Exception | None] = [None] * len(names)
        done = 0
        try:
            with writer.reader_lock:
                while done < len(names):
                    count = next(count for count in sqlite_schema.GET_ALL if count <= len(names) - done)
                    wanted = [name for pair in names[done : done + count] for name in pair]
                    for at, checksum, value in cursor.execute(sqlite_schema.GET_ALL[count], (*wanted, now)).fetchall():
                        values[done + at] = self._gathered(value, checksum, *names[done + at])
                    done += count
        except sqlite3.Error as error:
            if sqlite_file.is_busy(error):
                raise WouldWaitError from None
            raise self._read_failure(error, *names[done]) from error
        return values

    def _gathered(self, value: bytes | None, checksum: int, db_name: str, key: str) -> str | Exception:
        if value is None:
            return WouldWaitError()
        try:
            return self._verified((value, checksum), db_name, key)
        except CorruptValueError as error:
            return error

    async def get(self, db_name: str, key: str) -> str | None:
        """Read a value; see `Backend.get`."""
        try:
            return self.get_now(db_name, key)
        except WouldWaitError:
            pass
        if self._cursor is None:
            await self._open("get", db_name, key)
            return await self.get(db_name, key)

        def read(cursor: sqlite3.Cursor) -> tuple[bytes, int] | None:
            row: tuple[bytes, int] | None = cursor.execute(sqlite_schema.GET, (db_name, key, self._now())).fetchone()
            return row

        row = await run_in_thread(lambda: self._waiting_read(read, "get", db_name, key))
        return None if row is None else self._verified(row, db_name, key)

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        """Store a value; see `Backend.set`."""
        writer = self._writer if self._cursor is not None else await self._open("set", db_name, key)
        now = process_clock.now() if self._clock is None else self._clock()
        await _written(writer, Write("set", db_name, key, value, now + ttl_seconds))

    def set_soon(self, db_name: str, key: str, value: str, ttl_seconds: int, done: Callable[[Exception | None], None]) -> None:
        """Queue a set; see `QueueingBackend.set_soon`."""
        if self._cursor is None:
            raise WouldWaitError
        now = process_clock.now() if self._clock is None else self._clock()
        _submit(self._writer, Write("set", db_name, key, value, now + ttl_seconds, done))

    async def delete(self, db_name: str, key: str) -> None:
        """Delete an entry; see `Backend.delete`."""
        writer = self._writer if self._cursor is not None else await self._open("delete", db_name, key)
        await _written(writer, Write("delete", db_name, key))

    @property
    def batches_are_atomic(self) -> bool:
        """True; see `BatchBackend.batches_are_atomic`."""
        return True

    async def get_many(self, db_name: str, keys: Sequence[str]) -> Sequence[str | Omitted | CallError | None]:
        """Read values as they are at one moment; see `BatchBackend.get_many`."""
        if not keys:
            return []

        def read(cursor: sqlite3.Cursor, most_large_bytes: int) -> list[sqlite_many.StoredValue | Omitted | None] | None:
            return sqlite_many.read_many(cursor, db_name, keys, self._now(), most_large_bytes)

        rows = await self._read("get_many", db_name, read)
        seed = crc32(f"{db_name}\0".encode())
        return [
            self._checked(row, db_name, key, seed) if isinstance(row, tuple) else row
            for key, row in zip(keys, rows, strict=True)
        ]

    async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Sequence[CallError | None]:
        """Store all values or none; see `BatchBackend.set_many`."""
        if entries:
            await self._do(SetMany(db_name, entries, self._now()))
        return [None] * len(entries)

    async def delete_many(self, db_name: str, keys: Sequence[str]) -> Sequence[CallError | None]:
        """Delete all entries or none; see `BatchBackend.delete_many`."""
        if keys:
            await self._do(DeleteMany(db_name, keys))
        return [None] * len(keys)

    @property
    def scans_in_order(self) -> bool:
        """True; see `ScanBackend.scans_in_order`."""
        return True

    async def scan(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Page:
        """List keys; see `ScanBackend.scan`."""
        listing = Listing(db_name, prefix, cursor)
        return await self._read("scan", db_name, lambda reader, _: listing.page(reader, limit, self._now()))

    async def count(self, db_name: str, prefix: str = "") -> int:
        """Count entries, in a thread; see `ScanBackend.count`."""
        listing = Listing(db_name, prefix)

        def read(cursor: sqlite3.Cursor, most_bytes: int) -> int | None:
            # One statement that takes the longer the more entries there are: about 10 ms for 100,000.
            return listing.count(cursor, self._now()) if most_bytes > LOOP_BYTES else None

        return await self._read("count", db_name, read)

    async def clear(self, db_name: str, prefix: str = "", cursor: str | None = None, limit: int = MAX_BATCH_KEYS) -> Cleared:
        """Delete entries in the order of their keys, in steps of bounded size; see `ScanBackend.clear`.

        It ends at the key that was the last one when it began. Of a key of thousands of characters, a part counts.
        """
        deleted = 0
        while True:
            try:
                step = (await self._do(Clear(db_name, prefix, cursor, limit - deleted))).cleared
            except CallError as error:
                error.maybe_applied = error.maybe_applied or deleted > 0
                raise
            deleted += step.deleted
            cursor = step.cursor
            if cursor is None or deleted == limit:
                return Cleared(deleted, cursor)

    async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Take or renew a claim; see `ClaimBackend.claim`."""
        return (await self._do(Claim(db_name, key, owner, seconds))).outcome

    async def renew(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
        """Renew a claim; see `ClaimBackend.renew`."""
        return (await self._do(Claim(db_name, key, owner, seconds, is_renewal=True))).outcome

    async def release(self, db_name: str, key: str, owner: str) -> bool:
        """Give a claim back; see `ClaimBackend.release`."""
        return (await self._do(Release(db_name, key, owner))).was_held

    def watch(self, db_name: str) -> Watch:
        """Watch a namespace, whichever process changes it; see `WatchBackend.watch`."""
        if self._watcher is None:
            self._watcher = Watcher(self._path, self._open_to_watch, self._read_now, self._submit_job)
        return self._watcher.watch(db_name)

    async def aclose(self) -> None:
        """Commit the queue and close the file; see `Backend.aclose`."""
        self._closed = True
        self._cursor = None
        watching = None if self._watcher is None else self._watcher.close()
        if self._writer is not None:
            self._writer.stop()
            # Shielded: a cancelled caller does not disturb the others that wait for the end.
            await asyncio.shield(self._writer.ended)
        if watching is not None:
            await asyncio.wait([watching])

    def usage(self, account: str) -> Usage:
        """Count what an account stores; see `HostedBackend.usage`."""
        return self._count(sqlite_schema.USAGE, (account,))

    def gauges(self) -> Gauges:
        """Return the present figures; see `HostedBackend.gauges`."""
        total, figures = self._count(sqlite_schema.TOTAL_USAGE, ()), self._figures
        return Gauges(
            entries=total.entries,
            value_bytes=total.value_bytes,
            expired=figures.expired,
            commits=figures.commits,
            committed_writes=figures.committed_writes,
            wal_bytes=sqlite_file.log_bytes(self._path),
            disk_free_bytes=self._disk.free_bytes(),
            failures=figures.failed_reads + figures.failed_writes,
        )

    async def health(self) -> str | None:
        """Write to the file, within a second; see `HostedBackend.health`."""
        if self._closed:
            return "the store is closed"
        commits = self._figures.commits
        if self._probe is None or self._probe.done():
            self._probe = asyncio.get_running_loop().create_task(self._write_probe())
            # Retrieved here, since perhaps nobody waits any more.
            self._probe.add_done_callback(lambda probe: probe.cancelled() or probe.exception())
        # One probe at a time: it stays in the queue while another process holds the lock.
        await asyncio.wait([self._probe], timeout=_PROBE_SECONDS)
        if not self._probe.done():
            if self._figures.commits > commits:
                return self._figures.damage
            return (
                f"no write to {self._path} was done within {_PROBE_SECONDS:g} s: another process locks it, or the disk stalls"
            )
        error = None if self._probe.cancelled() else self._probe.exception()
        if isinstance(error, CallError):
            return error.reason
        return str(error) if error is not None else self._figures.damage

    async def _write_probe(self) -> None:
        writer = self._writer if self._cursor is not None else await self._open("probe", "", "")
        await _written(writer, Write("probe", "", "", expires_at=process_clock.now()))

    async def _open(self, verb: str, db_name: str, key: str) -> "Writer":
        if self._closed:
            raise StoreClosedError("the store is closed", verb=verb, db_name=db_name, key=key)
        if self._writer is None or self._writer.has_failed():
            self._writer = Writer(
                self._path, self._clock or _process_now, self._sweep_interval_seconds, self._hosting, self._figures
            )
            self._writer.start()
        writer = self._writer
        # Shielded: a cancelled caller leaves the opening to the others.
        reader = await asyncio.shield(writer.opened)
        if self._closed:
            raise StoreClosedError("the store was closed", verb=verb, db_name=db_name, key=key)
        # One cursor for all reads: making one costs a tenth of a read.
        self._cursor = reader.cursor()
        return writer

    def _now(self) -> float:
        return process_clock.now() if self._clock is None else self._clock()

    async def _do(self, job: AnyJob) -> AnyJob:
        writer = self._writer if self._cursor is not None else await self._open(job.verb, job.db_name, job.key)
        await _written(writer, job)
        return job

    def _submit_job(self, job: Job) -> None:
        _submit(self._writer, job)

    async def _open_to_watch(self) -> sqlite_file.Identity:
        return (await self._open("watch", "", "")).identity

    async def _read(self, verb: str, db_name: str, work: Callable[[sqlite3.Cursor, int], T | None]) -> T:
        """Read in this thread, or in another where that would wait or take long, for which `work` returns None."""
        if self._cursor is None:
            await self._open(verb, db_name, "")
        with contextlib.suppress(WouldWaitError):
            result = self._read_now(lambda cursor: work(cursor, LOOP_BYTES), verb, db_name)
            if result is not None:
                return result
        waited_for = await run_in_thread(lambda: self._waiting_read(lambda cursor: work(cursor, _ANY_BYTES), verb, db_name))
        assert waited_for is not None  # noqa: S101 (nothing takes too long for a thread)
        return waited_for

    def _read_now(self, work: Callable[[sqlite3.Cursor], T], verb: str = "watch", db_name: str = "") -> T:
        cursor, writer = self._cursor, self._writer
        if cursor is None or writer is None:
            raise WouldWaitError
        try:
            with writer.reader_lock:
                return work(cursor)
        except sqlite3.Error as error:
            if sqlite_file.is_busy(error):
                raise WouldWaitError from None
            raise self._read_failure(error, db_name, "", verb) from error

    def _waiting_read(self, work: Callable[[sqlite3.Cursor], T], verb: str, db_name: str, key: str = "") -> T:
        if self._writer is None or sqlite_file.identity_of(self._path) != self._writer.identity:
            raise StorageError(sqlite_file.replaced(self._path), verb=verb, db_name=db_name, key=key)
        try:
            with contextlib.closing(sqlite_file.connect(self._path)) as connection:
                return work(connection.cursor())
        except sqlite3.Error as error:
            raise self._read_failure(error, db_name, key, verb) from error

    def _verified(self, row: tuple[bytes, int], db_name: str, key: str) -> str:
        """Return the value of a row; raise `CorruptValueError` where it is not what was stored."""
        try:
            if crc32(row[0], crc32(f"{db_name}\0{key}".encode())) == row[1]:
                return row[0].decode()
        except (TypeError, ValueError):
            # Raised anew below, without an error that holds the value.
            pass
        raise self._corrupt("get", db_name, key)

    def _checked(self, row: tuple[bytes, int], db_name: str, key: str, seed: int) -> str | CorruptValueError:
        value = sqlite_many.decode(row, key, seed)
        return self._corrupt("get_many", db_name, key) if value is None else value

    def _corrupt(self, verb: str, db_name: str, key: str) -> CorruptValueError:
        self._figures.failed_reads += 1
        return CorruptValueError(
            f"the value in {self._path} is damaged; set the key anew or delete it, and see `aiokv check` for others",
            verb=verb,
            db_name=db_name,
            key=key,
            attempts=1,
        )

    def _read_failure(self, error: sqlite3.Error, db_name: str, key: str, verb: str = "get") -> CallError:
        self._figures.failed_reads += 1
        failure = sqlite_file.storage_error(self._path, error, verb, db_name, key)
        if sqlite_file.is_damaged(error):
            self._figures.damage = failure.reason
        return failure

    def _count(self, statement: str, parameters: tuple[str, ...]) -> Usage:
        cursor, writer = self._cursor, self._writer
        if cursor is None or writer is None:
            return Usage(0, 0)
        try:
            with writer.reader_lock:
                row = cursor.execute(statement, parameters).fetchone()
        except sqlite3.Error as error:
            self._read_failure(error, "", "")
            row = None
        return Usage(0, 0) if row is None else Usage(*row)


async def _written(writer: "Writer | None", write: Write) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    write.done = functools.partial(settle, future)
    _submit(writer, write)
    await future


def _submit(writer: "Writer | None", write: Write) -> None:
    if writer is None or not writer.submit(write):
        raise StoreClosedError("the store was closed", verb=write.verb, db_name=write.db_name, key=write.key)


def _process_now() -> float:
    # Looked up at each use, so that a test that replaces it moves every store.
    return process_clock.now()
