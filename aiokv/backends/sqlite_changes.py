"""The log of changes in a SQLite file: written by triggers, and only while somebody watches.

Triggers write the log in the transaction of the change itself, whichever process made it, one of an older aiokv included. They
are made with the first watcher and dropped after the last one, so that a set costs nothing where nobody watches.

A watcher has a row for each namespace, with a lease. Leases count by SQLite's own clock, which no test moves and which all
processes of a machine share. That clock may jump all the same: a watcher whose row is gone finds that out at the next change
and tells of a loss, so that a wrong clock costs a `Lost` and hides no change.

The numbers of the log have no gaps. A watcher that does not find the next number has fallen behind.

The tables are made when first needed, in a file of version 2: older versions neither see nor disturb them.
"""

import contextlib
import sqlite3
from collections.abc import Collection, Generator
from typing import Final, NamedTuple

MAX_LOGGED_CHANGES: Final = 10_000
"""Most changes that the log holds; a watcher that is further behind has lost some."""

LEASE_SECONDS: Final = 30
"""How long a watcher that gives no sign of life is taken to be there."""

_TABLES = (
    """
CREATE TABLE IF NOT EXISTS changes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    db_name TEXT NOT NULL,
    key TEXT NOT NULL,
    is_delete INTEGER NOT NULL
) STRICT
""",
    """
CREATE TABLE IF NOT EXISTS watchers (
    db_name TEXT NOT NULL,
    watcher TEXT NOT NULL,
    registration INTEGER NOT NULL,
    lease_until INTEGER NOT NULL,
    seen INTEGER NOT NULL,
    PRIMARY KEY (db_name, watcher)
) STRICT, WITHOUT ROWID
""",
)
_TRIGGER = """
CREATE TRIGGER IF NOT EXISTS {name} AFTER {event} ON entries_v2
WHEN EXISTS (SELECT 1 FROM watchers WHERE db_name = {row}.db_name) {condition} BEGIN
    INSERT INTO changes (db_name, key, is_delete) VALUES ({row}.db_name, {row}.key, {is_delete});
    DELETE FROM changes WHERE number <= last_insert_rowid() - {most};
END
"""
_IS_TOLD = "AND NOT EXISTS (SELECT 1 FROM watchers WHERE db_name = '/sweeping')"
_TRIGGERS = {
    name: _TRIGGER.format(name=name, event=event, row=row, condition=condition, is_delete=is_delete, most=MAX_LOGGED_CHANGES)
    for name, event, row, condition, is_delete in (
        ("change_inserted", "INSERT", "new", "", 0),
        ("change_updated", "UPDATE", "new", "", 0),
        ("change_deleted", "DELETE", "old", _IS_TOLD, 1),
    )
}
_IS_LOGGED = "SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name = 'change_deleted'"
_LAST_NUMBER = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'changes'"
_SECONDS = "SELECT CAST(strftime('%s', 'now') AS INTEGER)"
_RENEW = """
INSERT INTO watchers (db_name, watcher, registration, lease_until, seen) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (db_name, watcher) DO UPDATE SET lease_until = excluded.lease_until, seen = excluded.seen
"""
_WATCHED = "SELECT db_name, registration FROM watchers WHERE watcher = ?"
# A lease that is too far ahead is of a clock that was set back.
_LIVE = "SELECT count(*), min(seen) FROM watchers WHERE lease_until BETWEEN ? AND ?"
_FORGET_DEAD = "DELETE FROM watchers WHERE lease_until NOT BETWEEN ? AND ?"
_FORGET = "DELETE FROM watchers WHERE db_name = ? AND watcher = ?"
_READ = "SELECT number, db_name, key, is_delete FROM changes WHERE number > ? ORDER BY number LIMIT ?"
# As a watcher of a namespace that cannot be, within one transaction.
_START_SWEEP = "INSERT INTO watchers (db_name, watcher, registration, lease_until, seen) VALUES ('/sweeping', '', 0, 0, 0)"
_END_SWEEP = "DELETE FROM watchers WHERE db_name = '/sweeping'"

LoggedChange = tuple[int, str, str, int]
"""Number, namespace, key, and 1 for a delete."""


class Watching(NamedTuple):
    """A watcher's place in the log.

    Args:
        watcher: Who watches: an identifier like no other.
        registration: A number that the watcher has not used before; a namespace gets it unless it has one already.
        position: The number of the last change that was read; None where none was.
    """

    watcher: str
    registration: int
    position: int | None


def renew(connection: sqlite3.Connection, watching: Watching, db_names: Collection[str]) -> tuple[dict[str, int], int]:
    """Register a watcher, or renew its leases.

    Args:
        connection: A connection in a transaction that writes.
        watching: Who watches, and how far it has read.
        db_names: The namespaces; those that were registered before and are not among them stay until their lease ends.

    Returns:
        For each namespace the number by which it is registered: the present one where it was not registered, so that changes
        before this moment may be missing. And the number of the last change in the log.
    """
    for statement in (*_TABLES, *_TRIGGERS.values()):
        connection.execute(statement)
    last: int = connection.execute(_LAST_NUMBER).fetchone()[0]
    lease_until = connection.execute(_SECONDS).fetchone()[0] + LEASE_SECONDS
    seen = last if watching.position is None else min(watching.position, last)
    row = watching.watcher, watching.registration, lease_until, seen
    connection.executemany(_RENEW, [(db_name, *row) for db_name in db_names])
    return registrations(connection, watching.watcher), last


def forget(connection: sqlite3.Connection, watcher: str, db_name: str) -> None:
    """Take a watcher's registration back.

    Args:
        connection: A connection in a transaction that writes.
        watcher: Who watched.
        db_name: The namespace.
    """
    if _is_logged(connection):
        connection.execute(_FORGET, (db_name, watcher))


def read(connection: sqlite3.Connection | sqlite3.Cursor, position: int, limit: int) -> list[LoggedChange]:
    """Return the next changes of all namespaces.

    Args:
        connection: A connection to a file with a log.
        position: The number of the last change that was read.
        limit: Most changes.

    Returns:
        The changes, in the order of their commits.
    """
    return connection.execute(_READ, (position, limit)).fetchall()


def registrations(connection: sqlite3.Connection | sqlite3.Cursor, watcher: str) -> dict[str, int]:
    """Return the namespaces for which a watcher is registered.

    Args:
        connection: A connection to a file with a log.
        watcher: Who watches.

    Returns:
        Each namespace with its number: where that is another one than before, changes may be missing.
    """
    return dict(connection.execute(_WATCHED, (watcher,)).fetchall())


@contextlib.contextmanager
def untold(connection: sqlite3.Connection) -> Generator[None]:
    """Delete entries without a word in the log: their time was over.

    Args:
        connection: A connection in no transaction. After an error it must be closed.

    Yields:
        Nothing.
    """
    if not _is_logged(connection):
        yield
        return
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(_START_SWEEP)
    yield
    connection.execute(_END_SWEEP)
    connection.execute("COMMIT")


def tidy(connection: sqlite3.Connection) -> None:
    """Forget watchers that are gone, and what all others have read; end the log where nobody is left.

    Args:
        connection: A connection in no transaction. After an error it must be closed.
    """
    if not _is_logged(connection):
        return
    now = connection.execute(_SECONDS).fetchone()[0]
    lease = now, now + 2 * LEASE_SECONDS
    live, seen = connection.execute(_LIVE, lease).fetchone()
    if live:
        connection.execute(_FORGET_DEAD, lease)
        connection.execute("DELETE FROM changes WHERE number <= ?", (seen,))
        return
    connection.execute("BEGIN IMMEDIATE")
    # Asked again: one may have come meanwhile.
    if not connection.execute(_LIVE, lease).fetchone()[0]:
        connection.execute("DELETE FROM watchers")
        connection.execute("DELETE FROM changes")
        for name in _TRIGGERS:
            connection.execute(f"DROP TRIGGER IF EXISTS {name}")
    connection.execute("COMMIT")


def _is_logged(connection: sqlite3.Connection) -> bool:
    # Read at each use: another process may have begun or ended the log.
    return connection.execute(_IS_LOGGED).fetchone() is not None
