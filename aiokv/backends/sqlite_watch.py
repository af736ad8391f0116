"""Watches of a SQLite file: one task for a backend reads the log of changes, whichever process wrote it.

The task asks SQLite every 20 ms whether the file has changed, which costs a few microseconds and reads nothing else. Only then
it reads the log. It counts by the event loop's clock: what moves aiokv's own clock neither breaks nor prolongs a watch.
"""

import asyncio
import contextlib
import functools
import secrets
import sqlite3
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Final

from aiokv.backends import sqlite_changes, sqlite_file
from aiokv.backends.base import WouldWaitError
from aiokv.backends.sqlite_changes import Watching
from aiokv.backends.sqlite_writes import Job
from aiokv.backends.watching import HEARTBEAT_SECONDS, Alive, Changed, Lost, Watch
from aiokv.errors import CallError, StorageError

POLL_SECONDS: Final = 0.02
_RENEWAL_SECONDS = sqlite_changes.LEASE_SECONDS / 3
_RETRY_SECONDS = 1.0
_READ_CHANGES = 1_000
# After every change: a watch that is told nothing until it is registered again.
_LOST: Final = 2**63


_Read = tuple[list[sqlite_changes.LoggedChange], dict[str, int] | None]


class Renewal(Job):
    """Registering for namespaces, or renewing the leases.

    Args:
        watching: Who watches, and how far it has read.
        db_names: The namespaces.

    Attributes:
        registered: Each namespace with the number by which it is registered.
        last: The number of the last change of the log.
    """

    __slots__ = ("_watching", "db_names", "last", "registered")

    def __init__(self, watching: Watching, db_names: frozenset[str]) -> None:
        super().__init__("watch", "")
        self._watching = watching
        self.db_names = db_names
        self.registered: dict[str, int] = {}
        self.last = 0

    def apply(self, connection: sqlite3.Connection, now: float) -> None:  # noqa: ARG002 (leases have SQLite's own clock)
        """Write the leases."""
        self.registered, self.last = sqlite_changes.renew(connection, self._watching, self.db_names)

    def most_bytes(self) -> int:
        """Return 0: watches go on below the floor, which has room for so little."""
        return 0


class Farewell(Job):
    """Taking a registration back.

    Args:
        watcher: Who watched.
        db_name: The namespace.
    """

    __slots__ = ("_watcher",)

    def __init__(self, watcher: str, db_name: str) -> None:
        super().__init__("watch", db_name)
        self._watcher = watcher

    def apply(self, connection: sqlite3.Connection, now: float) -> None:  # noqa: ARG002
        """Delete the lease."""
        sqlite_changes.forget(connection, self._watcher, self.db_name)

    def most_bytes(self) -> int:
        """Return 0: nothing is added."""
        return 0


class Watcher:
    """All watches of one backend.

    Args:
        path: The file.
        open_file: Opens it and returns what tells it from all others.
        read_now: Reads in this very step; raises `WouldWaitError` where the file cannot be read now.
        submit: Queues a job.
    """

    def __init__(
        self,
        path: Path,
        open_file: Callable[[], Awaitable[sqlite_file.Identity]],
        read_now: Callable[[Callable[[sqlite3.Cursor], _Read]], _Read],
        submit: Callable[[Job], None],
    ) -> None:
        self._path = path
        self._open_file = open_file
        self._read_now = read_now
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._id = secrets.token_hex(8)
        # For each watch the number of the last change before it; None until it has begun.
        self._watches: dict[str, dict[Watch, int | None]] = {}
        self._registered: dict[str, int] = {}
        self._registrations = 0
        self._is_complete = False
        self._renewal: Renewal | None = None
        self._next_attempt = self._next_renewal = self._next_alive = 0.0
        self._identity: sqlite_file.Identity | None = None
        self._position: int | None = None
        self._version: int | None = None
        self._task: asyncio.Task[None] | None = None

    def watch(self, db_name: str) -> Watch:
        """Begin a watch; see `WatchBackend.watch`."""
        watch = Watch(functools.partial(self._forget, db_name))
        self._watches.setdefault(db_name, {})[watch] = None
        if self._task is None or self._task.done():
            self._task = self._loop.create_task(self._run(), name=f"aiokv-sqlite watch {self._path.name}")
        elif db_name in self._registered:
            self._begin(db_name)
        elif self._identity is not None:
            self._is_complete = False
            self._register()
        return watch

    def close(self) -> asyncio.Task[None] | None:
        """End all watches.

        Returns:
            The task, which ends soon; None where there is none.
        """
        for _, watch, _ in self._all():
            watch.close()
        self._identity = None
        if self._task is not None:
            self._task.cancel()
        return self._task

    async def _run(self) -> None:
        self._registered.clear()
        self._is_complete = False
        self._identity = self._position = self._version = None
        self._next_attempt = self._next_renewal = 0.0
        try:
            self._identity = await self._open_file()
            self._next_alive = self._loop.time() + HEARTBEAT_SECONDS
            while self._watches:
                self._register()
                is_current, has_more = self._poll()
                if is_current and self._loop.time() >= self._next_alive:
                    self._tell_alive()
                await asyncio.sleep(0 if has_more else POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 (raised where the changes are read)
            for _, watch, start in self._all():
                if start is not None:
                    watch.notify(Lost())
                watch.fail(error)
        finally:
            # The loop ends, or the backend is closed.
            for _, watch, _ in self._all():
                watch.close()

    def _all(self) -> list[tuple[str, Watch, int | None]]:
        return [(db_name, *item) for db_name, watches in self._watches.items() for item in watches.items()]

    def _forget(self, db_name: str, watch: Watch) -> None:
        watches = self._watches[db_name]
        del watches[watch]
        if watches:
            return
        del self._watches[db_name]
        self._registered.pop(db_name, None)
        if self._identity is not None:
            # Else changes would be logged for it until its lease ends.
            with contextlib.suppress(CallError):
                self._submit(Farewell(self._id, db_name))

    def _register(self) -> None:
        """Ask for leases where some are missing or old."""
        now = self._loop.time()
        is_due = now >= self._next_renewal or (not self._is_complete and now >= self._next_attempt)
        if self._renewal is not None or not is_due:
            return
        self._registrations += 1
        self._renewal = renewal = Renewal(Watching(self._id, self._registrations, self._position), frozenset(self._watches))
        renewal.done = functools.partial(self._on_renewed, renewal)
        try:
            self._submit(renewal)
        except CallError:
            self._renewal = None
            raise

    def _on_renewed(self, renewal: Renewal, error: CallError | None) -> None:
        self._renewal = None
        if error is not None:
            # Who was watching already goes on for as long as the lease lasts, and is told if it ends.
            self._next_attempt = self._next_renewal = self._loop.time() + _RETRY_SECONDS
            for db_name, watch, start in self._all():
                if start is None and db_name in renewal.db_names:
                    watch.fail(error)
            return
        self._next_renewal = self._loop.time() + _RENEWAL_SECONDS
        if self._position is None:
            self._position = renewal.last
        self._lose_unless(renewal.registered)
        # Every write that commits from now on is in the log: writers take turns.
        wanted = renewal.db_names & self._watches.keys()
        self._registered = {db_name: number for db_name, number in renewal.registered.items() if db_name in wanted}
        self._is_complete = self._registered.keys() == self._watches.keys()
        for db_name in self._registered:
            self._begin(db_name)

    def _begin(self, db_name: str) -> None:
        watches = self._watches[db_name]
        for watch, start in watches.items():
            if start is None or start == _LOST:
                watches[watch] = self._position
                watch.notify(Lost())

    def _lose_unless(self, registered: Mapping[str, int]) -> bool:
        """Tell of a loss where another process took this one for dead, as after it was stopped for long."""
        gone = {db_name for db_name, number in self._registered.items() if registered.get(db_name) != number}
        self._lose(gone)
        for db_name in gone:
            del self._registered[db_name]
            watches = self._watches[db_name]
            watches.update({watch: _LOST for watch, start in watches.items() if start is not None})
            self._is_complete = False
            self._next_attempt = 0.0
        return bool(gone)

    def _lose(self, db_names: Collection[str]) -> None:
        for db_name, watch, start in self._all():
            if start is not None and db_name in db_names:
                watch.notify(Lost())

    def _poll(self) -> tuple[bool, bool]:
        """Tell of new changes; return whether that were all, and whether there are more."""
        if self._position is None:
            return False, False
        try:
            changes, registered = self._read_now(self._read)
        except WouldWaitError:
            return False, False
        if changes:
            if changes[0][0] != self._position + 1:
                self._lose(self._registered)
            self._position = changes[-1][0]
        for number, db_name, key, is_delete in changes:
            for watch, start in self._watches.get(db_name, {}).items():
                if start is not None and number > start:
                    watch.notify(Changed(key, is_delete == 1))
        if registered is None:
            return False, True
        return not self._lose_unless(registered), False

    def _read(self, cursor: sqlite3.Cursor) -> _Read:
        """Return new changes, and for which namespaces this watcher is registered; None where there are more changes."""
        version: int = cursor.execute("PRAGMA data_version").fetchone()[0]
        if version == self._version:
            return [], self._registered
        changes = sqlite_changes.read(cursor, self._position or 0, _READ_CHANGES)
        if len(changes) == _READ_CHANGES:
            return changes, None
        # Read after the changes: what is registered by the same number now was so all the time.
        registered = sqlite_changes.registrations(cursor, self._id)
        self._version = version
        return changes, registered

    def _tell_alive(self) -> None:
        if sqlite_file.identity_of(self._path) != self._identity:
            raise StorageError(sqlite_file.replaced(self._path), verb="watch")
        self._next_alive = self._loop.time() + HEARTBEAT_SECONDS
        for db_name, watch, start in self._all():
            if start is not None and db_name in self._registered:
                watch.notify(Alive())
