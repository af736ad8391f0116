"""Groups of writes in one transaction each, on the connection of one thread: room for them, outcomes, and sweeping."""

import contextlib
import itertools
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path

from aiokv.backends import sqlite_changes, sqlite_file, sqlite_schema
from aiokv.backends.base import Clock
from aiokv.backends.sqlite_disk import CHECKPOINT_PAGES, PAGE_BYTES, Disk
from aiokv.backends.sqlite_writes import Job, Write, kind_of, set_together
from aiokv.errors import CallError, StorageError, StorageFullError

_SWEEP_STEP_ENTRIES = 64
# More than one group can write, and still a short step.
_MOST_SWEPT_ENTRIES = 32_000
_VACUUM_STEP_PAGES = 256
# Where the room for the log is what was the ballast.
_NARROW_VACUUM_STEP_PAGES = 32
# No batch needs as much, even if each character takes 4 bytes.
_MOST_BATCH_BYTES = 256 * 1024 * 1024
# Between two attempts to empty the log for a set.
_TRUNCATION_INTERVAL_SECONDS = 0.25
_WAIT_FOR_LOCKS = f"PRAGMA busy_timeout = {int(sqlite_file.BUSY_TIMEOUT_SECONDS * 1000)}"


class Figures:
    """What a backend counts while it is open, over all its threads; written by one thread each.

    Attributes:
        expired: Entries swept.
        commits: Transactions of writes.
        committed_writes: Writes in them.
        failed_reads: Reads that failed by the file's fault.
        failed_writes: Writes that failed by the file's fault.
        damage: What to do about damage that was met, or None.
    """

    def __init__(self) -> None:
        self.expired = 0
        self.commits = 0
        self.committed_writes = 0
        self.failed_reads = 0
        self.failed_writes = 0
        self.damage: str | None = None


class Committer:
    """The writing side of an open file. One thread uses it; it opens its connection anew after each failure.

    Args:
        path: The file, absolute, already open for reads.
        clock: Returns the present as seconds since the epoch.
        disk: The room for the file.
        figures: What is counted.

    Attributes:
        identity: What tells the file that was opened from all others.
        wants_room: Whether a write was refused for want of room since the last sweep.
    """

    def __init__(self, path: Path, clock: Clock, disk: Disk, figures: Figures) -> None:
        self._path = path
        self._clock = clock
        self._disk = disk
        self._figures = figures
        self.identity = sqlite_file.identity_of(path)
        self._connection: sqlite3.Connection | None = None
        self._written_since_sweep = 0
        self._checkpoint_pages = CHECKPOINT_PAGES
        self._next_truncation = 0.0
        self.wants_room = False

    def commit(self, batch: list[Write]) -> list[tuple[Write, CallError | None]]:
        """Apply the writes for which there is room, in one transaction.

        Args:
            batch: The writes.

        Returns:
            Each write with its error, or None.
        """
        outcomes: list[tuple[Write, CallError | None]] = []
        try:
            admitted = self._admitted(batch)
            if len(admitted) < len(batch):
                taken = set(admitted)
                outcomes = [self._refused(write) for write in batch if write not in taken]
            if admitted:
                outcomes += self._transact(admitted)
        except Exception as error:  # noqa: BLE001 (a thread that dies would leave every later write waiting)
            self.close()
            outcomes = [(write, self._failure(write, error)) for write in batch]
        self._figures.failed_writes += sum(error is not None for _, error in outcomes)
        return outcomes

    def _admitted(self, batch: list[Write]) -> list[Write]:
        """Return the writes for which there is room above the floor, or in free pages of the file itself."""
        room_bytes = self._disk.room_bytes()
        if room_bytes is None or room_bytes >= _MOST_BATCH_BYTES:
            return batch
        needed = [write.most_bytes() for write in batch]
        connection = self._connected()
        room_bytes -= self._growth_bytes(connection)
        if room_bytes < sum(needed) and self._truncate_log():
            connection = self._connected()
            room_bytes = (self._disk.room_bytes() or 0) - self._growth_bytes(connection)
        if room_bytes >= sum(needed):
            return batch
        room_bytes = max(room_bytes, 0)
        # Without its ballast, the room that is left is for deletes.
        if not self._disk.lacks_ballast():
            room_bytes += connection.execute("PRAGMA freelist_count").fetchone()[0] * PAGE_BYTES
        admitted = []
        for write, size_bytes in zip(batch, needed, strict=True):
            if size_bytes <= room_bytes or not size_bytes:
                admitted.append(write)
                room_bytes -= size_bytes
        return admitted

    def _transact(self, batch: list[Write], attempt: int = 0) -> list[tuple[Write, CallError | None]]:
        """Apply writes in one transaction, or each in its own where that fails; return each with its error, if it has one."""
        committing = False
        entries = len(batch)
        try:
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            for (verb, is_small), writes in itertools.groupby(batch, kind_of):
                if verb == "set" and is_small:
                    set_together(connection, [write.parameters() for write in writes])
                elif verb in sqlite_schema.WRITES:
                    connection.executemany(sqlite_schema.WRITES[verb], map(Write.parameters, writes))
                else:
                    entries += self._apply_jobs(connection, writes)
            committing = True
            connection.execute("COMMIT")
        except Exception as error:  # noqa: BLE001 (a thread that dies would leave every later write waiting)
            self.close()
            is_full = self._is_full(error)
            if len(batch) > 1 and not sqlite_file.is_busy(error) and (is_full or not committing):
                # A write that is too large, or that SQLite refuses, must not fail the others.
                return [outcome for write in batch for outcome in self._transact_alone(write)]
            if is_full and self._make_room(attempt, for_delete=batch[0].frees_room()):
                return self._transact(batch, attempt + 1)
            # A commit that fails for a lock or a full disk is rolled back. After another failure, such as a failed flush, all
            # of its frames may be in the log, where a recovery would find them.
            is_undone = sqlite_file.is_busy(error) or sqlite_file.primary_code(error) == sqlite3.SQLITE_FULL
            maybe_applied = committing and not is_undone
            cause = StorageFullError(self._disk.lack_of_room()) if is_full else error
            return [(write, self._failure(write, cause, maybe_applied=maybe_applied)) for write in batch]
        self._written_since_sweep += entries
        self._figures.commits += 1
        self._figures.committed_writes += entries
        return [(write, None) for write in batch]

    def _apply_jobs(self, connection: sqlite3.Connection, jobs: Iterable[Write]) -> int:
        """Apply jobs; return how many entries they write beyond one each."""
        now, more = self._clock(), 0
        for job in jobs:
            if isinstance(job, Job):
                job.apply(connection, now)
                more += job.entries - 1
        return more

    def _transact_alone(self, write: Write) -> list[tuple[Write, CallError | None]]:
        # Without its ballast, the room that is left is for deletes.
        if not write.frees_room() and self._disk.lacks_ballast():
            return [self._refused(write)]
        return self._transact([write])

    def _refused(self, write: Write) -> tuple[Write, CallError]:
        self.wants_room = True
        return write, self._failure(write, StorageFullError(self._disk.lack_of_room()))

    def _failure(self, write: Write, error: Exception, *, maybe_applied: bool = False) -> CallError:
        if isinstance(error, StorageError):
            failure = type(error)(error.reason, verb=write.verb, db_name=write.db_name, key=write.key, attempts=1)
        else:
            failure = sqlite_file.storage_error(self._path, error, write.verb, write.db_name, write.key)
        if sqlite_file.is_damaged(error):
            self._figures.damage = failure.reason
        failure.maybe_applied = maybe_applied
        failure.__cause__ = error if isinstance(error, sqlite3.Error) else None
        return failure

    def _connected(self) -> sqlite3.Connection:
        if sqlite_file.identity_of(self._path) != self.identity:
            # A write to a file without a name would be lost, flushed or not.
            raise StorageError(sqlite_file.replaced(self._path))
        checkpoint_pages = self._disk.checkpoint_pages()
        if self._connection is None:
            self._connection, self._checkpoint_pages = sqlite_file.connect(self._path), CHECKPOINT_PAGES
        if checkpoint_pages != self._checkpoint_pages:
            # The ballast came or went, by another process perhaps.
            self._connection.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}")
            self._checkpoint_pages = checkpoint_pages
        return self._connection

    def close(self) -> None:
        """Close the connection, which rolls back an open transaction; the next write opens another."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _is_full(self, error: Exception) -> bool:
        return self._disk.is_full(sqlite_file.primary_code(error))

    def _make_room(self, attempt: int, *, for_delete: bool) -> bool:
        """Empty the log, or give the ballast back; return whether that made any room."""
        if attempt == 0 and self._truncate_log(at_once=for_delete):
            return True
        if not (for_delete and self._disk.release_ballast()):
            return False
        # Before the log grows by deletes: later the room would not take what is in it.
        self._truncate_log(at_once=True)
        return True

    def _truncate_log(self, *, at_once: bool = False) -> bool:
        """Write the log into the database and give its room back; return whether there was any."""
        had_bytes, now = sqlite_file.log_bytes(self._path), time.monotonic()
        if not had_bytes or (now < self._next_truncation and not at_once):
            return False
        self._next_truncation = now + _TRUNCATION_INTERVAL_SECONDS
        try:
            connection = self._connected()
            connection.execute("PRAGMA busy_timeout = 0")
            self._checkpoint(connection)
            connection.execute(_WAIT_FOR_LOCKS)
        except (sqlite3.Error, StorageError, OSError):
            self.close()
        return sqlite_file.log_bytes(self._path) < had_bytes

    def _checkpoint(self, connection: sqlite3.Connection) -> bool:
        """Empty the log, unless the database would have to grow by more than the room that is left; return whether it is."""
        free_bytes = self._disk.free_bytes()
        # A checkpoint that ends half-way would have taken the room that deletes need.
        if free_bytes is not None and self._growth_bytes(connection) > free_bytes:
            return False
        is_busy: int = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return not is_busy

    def _growth_bytes(self, connection: sqlite3.Connection) -> int:
        """Return by how much the database must grow to take what is in the log."""
        pages: int = connection.execute(sqlite_schema.TOTAL_PAGES).fetchone()[0]
        return max(0, pages * PAGE_BYTES - self._path.stat().st_size)

    def sweep(self, attempt: int = 0) -> bool:
        """Delete a few expired entries and free a few pages.

        Args:
            attempt: How often room was made for that.

        Returns:
            Whether nothing is left to do.
        """
        # At least as many as were written since the last sweep; otherwise a busy store would grow for ever.
        limit = min(max(_SWEEP_STEP_ENTRIES, 2 * self._written_since_sweep), _MOST_SWEPT_ENTRIES)
        has_written, self._written_since_sweep = self._written_since_sweep > 0, 0
        try:
            connection = self._connected()
            # Writes wait for the sweep, so the sweep waits for no lock.
            connection.execute("PRAGMA busy_timeout = 0")
            now, deleted = self._clock(), 0
            if connection.execute(sqlite_schema.HAS_EXPIRED, (now,)).fetchone() is not None:
                with sqlite_changes.untold(connection):
                    deleted = connection.execute(sqlite_schema.SWEEP, (now, limit)).rowcount
            self._figures.expired += deleted
            sqlite_changes.tidy(connection)
            if deleted or has_written:
                connection.execute(sqlite_schema.FORGET_EMPTY_ACCOUNTS)
            has_spare_pages = self._free_pages(connection)
            connection.execute(_WAIT_FOR_LOCKS)
        except (sqlite3.Error, StorageError, OSError) as error:
            # The file is locked, full, read-only or gone. The next sweep tries again; reads never show expired entries.
            self.close()
            return not (self._is_full(error) and self._make_room(attempt, for_delete=True)) or self.sweep(attempt + 1)
        return deleted < limit and not has_spare_pages

    def _free_pages(self, connection: sqlite3.Connection) -> bool:
        """Give some free pages back to the disk; return whether more of them can be."""
        lacks_ballast, room_bytes, was_refused = self._disk.lacks_ballast(), self._disk.room_bytes(), self.wants_room
        self.wants_room = False
        is_low = lacks_ballast or was_refused or (room_bytes is not None and room_bytes < 0)
        free_pages: int = connection.execute("PRAGMA freelist_count").fetchone()[0]
        # Below the floor they stay, for sets: another program could take what is given back.
        spare_pages = free_pages if lacks_ballast else 0 if is_low else free_pages - _VACUUM_STEP_PAGES
        if spare_pages > 0:
            step = _NARROW_VACUUM_STEP_PAGES if lacks_ballast else _VACUUM_STEP_PAGES
            # The pragma frees one page for each row that is fetched.
            connection.execute(f"PRAGMA incremental_vacuum({step})").fetchall()
        if is_low and not self._checkpoint(connection):
            # A reader keeps the log from being emptied: the next sweep tries again, though nobody may set again until then.
            self.wants_room = was_refused
        self._disk.restore_ballast()
        return spare_pages > _VACUUM_STEP_PAGES or (lacks_ballast and spare_pages > 0)
