"""A SQLite file of entries: how it is made, checked and opened, its statements, and its errors in aiokv's words."""

import os
import sqlite3
import time
from pathlib import Path
from typing import Final

from aiokv.errors import ConfigurationError, StorageError, StorageFullError

APPLICATION_ID: Final = 0x61696F6B  # "aiok"
SCHEMA_VERSION: Final = 1
BUSY_TIMEOUT_SECONDS = 10.0
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
GET = "SELECT value FROM entries WHERE db_name = ? AND key = ? AND expires_at > ?"
SET = """
INSERT INTO entries (db_name, key, expires_at, value) VALUES (?, ?, ?, ?)
ON CONFLICT (db_name, key) DO UPDATE SET expires_at = excluded.expires_at, value = excluded.value
"""
_VERSION = """
SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id, pragma_user_version
"""
DELETE = "DELETE FROM entries WHERE db_name = ? AND key = ?"
SWEEP = "DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries WHERE expires_at <= ? LIMIT ?)"


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from every other, whatever its name.

    Args:
        path: The file.

    Returns:
        Device and inode, or None where there is no file.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 (called before each commit: Path.stat is slower)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def connect(path: Path, *, busy_timeout_seconds: float = BUSY_TIMEOUT_SECONDS) -> sqlite3.Connection:
    """Open a connection with the settings that every connection to the file needs.

    Args:
        path: The file; made where it is absent.
        busy_timeout_seconds: How long a statement waits for another process.

    Returns:
        The connection, in autocommit mode. Threads may hand it over, but must not share it.

    Raises:
        sqlite3.Error: The file cannot be opened.
    """
    connection = sqlite3.connect(path, timeout=busy_timeout_seconds, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def open_reader(path: Path) -> sqlite3.Connection:
    """Make the file, or check that it is one of aiokv, and open a connection that reads without waiting.

    Args:
        path: The file.

    Returns:
        The connection.

    Raises:
        ConfigurationError: The file is of another application or a newer version, or cannot be opened.
        StorageError: The file cannot be read now.
    """
    try:
        connection = connect(path)
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
    has_tables = _check_version(path, connection)
    if not has_tables:
        # It has an effect only before the first table.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _enter_wal_mode(connection)
    if has_tables:
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Another process may have made the tables meanwhile.
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
    """Return whether the tables exist, False for an empty file; refuse a file of another kind or of a newer version."""
    # In one statement, so that all values are of one moment: another process may be making the file.
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
    deadline = time.monotonic() + BUSY_TIMEOUT_SECONDS
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
        else:
            if mode == "wal":
                return
            raise sqlite3.OperationalError(f"the file system does not allow WAL mode (got {mode})")
        time.sleep(0.01)


def is_busy(error: Exception) -> bool:
    """Return whether another process holds the lock that a statement needs.

    Args:
        error: The error of the statement.

    Returns:
        True for a busy or locked file.
    """
    return primary_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def primary_code(error: Exception) -> int:
    """Return SQLite's primary result code.

    Args:
        error: Any exception.

    Returns:
        The code, 0 where the error is not SQLite's own.
    """
    # The low byte; the other bytes are details.
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _open_error(path: Path, error: sqlite3.Error) -> ConfigurationError | StorageError:
    code = primary_code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigurationError(f"{path} is not a SQLite database; it was left as it is. Name another file.")
    if code == sqlite3.SQLITE_CANTOPEN and not path.parent.is_dir():
        return ConfigurationError(f"{path} cannot be opened: the folder {path.parent} does not exist; make it first")
    if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM}:
        return ConfigurationError(f"{path} cannot be opened: {error}; check that the file and its folder are writable")
    return storage_error(path, error, "", "", "")


def storage_error(path: Path, error: Exception, verb: str, db_name: str, key: str) -> StorageError:
    """Return aiokv's error for one of SQLite's.

    Args:
        path: The file.
        error: SQLite's error, or any other.
        verb: The call.
        db_name: The call's namespace.
        key: The call's key.

    Returns:
        The error, without any value.
    """
    kind = StorageError
    if primary_code(error) == sqlite3.SQLITE_FULL:
        kind = StorageFullError
        reason = f"the disk of {path} has no room left; free some space on it"
    elif is_busy(error):
        reason = f"{path} stayed locked for {BUSY_TIMEOUT_SECONDS:g} s"
    elif isinstance(error, sqlite3.Error):
        reason = f"{path}: {error}"
    else:
        # Without its text: that of a UnicodeEncodeError holds the value.
        reason = f"{path}: {type(error).__name__}"
    return kind(reason, verb=verb, db_name=db_name, key=key, attempts=1, transient=is_busy(error))
