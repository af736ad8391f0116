"""A SQLite file of entries: how it is opened, told from other files, and its errors in aiokv's words."""

import logging
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from aiokv.backends import sqlite_schema
from aiokv.backends.sqlite_disk import CHECKPOINT_PAGES, Disk
from aiokv.errors import ConfigurationError, StorageError, StorageFullError

logger = logging.getLogger("aiokv")

Identity = tuple[tuple[int, int] | None, ...]

BUSY_TIMEOUT_SECONDS = 10.0
_WAL_LIMIT_BYTES = 64 * 1024 * 1024
_MMAP_BYTES = 512 * 1024 * 1024
_SIDE_FILES = ("", "-wal", "-shm")
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def identity_of(path: Path) -> Identity:
    """Return what tells a file, its log and its shared index from all others, whatever their names.

    Args:
        path: The file.

    Returns:
        Device and inode of each, None for one that is not there.
    """
    return tuple(_inode_of(f"{path}{suffix}") for suffix in _SIDE_FILES)


def log_bytes(path: Path) -> int:
    """Return the size of a file's log.

    Args:
        path: The file.

    Returns:
        Bytes, 0 where there is no log.
    """
    try:
        return os.stat(f"{path}-wal").st_size  # noqa: PTH116 (as above)
    except OSError:
        return 0


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
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
        # Where the library's default is ON, each delete writes zeros over the whole value, which takes room and time.
        connection.execute("PRAGMA secure_delete = FAST")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def open_reader(disk: Disk, path: Path, clock: Callable[[], float], *, hosted: bool, quick_check: bool) -> sqlite3.Connection:
    """Make the file, or bring it up from an older version, and open a connection that reads without waiting.

    Args:
        disk: The room for it.
        path: The file.
        clock: Returns the present as seconds since the epoch.
        hosted: Whether pages are read through a memory map. That is faster, but the kernel ends a process that reads a page
            which the disk cannot give: a server is started again, other programs should not take that risk.
        quick_check: Whether to look for damage.

    Returns:
        The connection.

    Raises:
        ConfigurationError: The file is of another application or a newer version, or cannot be opened.
        StorageError: The file cannot be read now, or is damaged.
    """
    disk.create_private()
    has_more_room = False
    while True:
        try:
            return _open_reader(disk, path, clock, hosted=hosted, quick_check=quick_check)
        except sqlite3.Error as error:
            if not disk.is_full(primary_code(error)):
                raise open_error(path, error) from error
            # A server that starts on a full disk must open the file, so that entries can be deleted.
            if has_more_room or not disk.release_ballast():
                raise StorageFullError(disk.lack_of_room(), attempts=1) from error
            has_more_room = True


def _open_reader(disk: Disk, path: Path, clock: Callable[[], float], *, hosted: bool, quick_check: bool) -> sqlite3.Connection:
    connection = connect(path)
    try:
        _prepare(path, connection, clock)
        disk.tighten()
        if quick_check:
            _check_quickly(path, connection)
        if hosted:
            connection.execute(f"PRAGMA mmap_size = {_MMAP_BYTES}")
        connection.execute("PRAGMA busy_timeout = 0")
        # The first read makes the log and its index where they are absent.
        connection.execute(sqlite_schema.GET, ("", "", 0.0)).fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def is_busy(error: Exception) -> bool:
    """Return whether another process holds the lock that a statement needs.

    Args:
        error: The error of the statement.

    Returns:
        True for a busy or locked file.
    """
    return primary_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


def is_damaged(error: Exception) -> bool:
    """Return whether a statement met a page that cannot be right.

    Args:
        error: The error of the statement.

    Returns:
        True for a damaged file.
    """
    return primary_code(error) in _DAMAGED


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
    elif is_damaged(error):
        reason = damage(path)
    else:
        # The name of the error, never its text: SQLite quotes text that is no UTF-8, and a UnicodeEncodeError holds the value.
        reason = f"{path}: {getattr(error, 'sqlite_errorname', type(error).__name__)}"
    return kind(reason, verb=verb, db_name=db_name, key=key, attempts=1, transient=is_busy(error))


def open_error(path: Path, error: sqlite3.Error) -> ConfigurationError | StorageError:
    """Return aiokv's error for a file that could not be opened.

    Args:
        path: The file.
        error: SQLite's error.

    Returns:
        The error; what a change of the file or its name repairs is a `ConfigurationError`.
    """
    code = primary_code(error)
    if code == sqlite3.SQLITE_NOTADB:
        return ConfigurationError(f"{path} is not a SQLite database; it was left as it is. Name another file.")
    if code == sqlite3.SQLITE_CANTOPEN and not path.parent.is_dir():
        return ConfigurationError(f"{path} cannot be opened: the folder {path.parent} does not exist; make it first")
    if code in {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM}:
        return ConfigurationError(f"{path} cannot be opened: {error}; check that the file and its folder are writable")
    return storage_error(path, error, "", "", "")


def damage(path: Path) -> str:
    """Return what to do about a damaged file.

    Args:
        path: The file.

    Returns:
        The reason of an error.
    """
    return (
        f"{path} is damaged; stop what uses it, and put a backup in its place (`aiokv check` says what is damaged, "
        "`aiokv backup` makes backups)"
    )


def replaced(path: Path) -> str:
    """Return what to do about a file whose name stands for another one now.

    Args:
        path: The file.

    Returns:
        The reason of an error.
    """
    return (
        f"{path}, its log (-wal) or its index (-shm) was deleted or replaced while it was open; "
        "close the store, then open it anew"
    )


def _inode_of(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)  # noqa: PTH116 (called before each commit: Path.stat is slower)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _prepare(path: Path, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
    version = sqlite_schema.version_of(path, connection)
    if not version:
        # It has an effect only before the first table.
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _enter_wal_mode(path, connection)
    if version < sqlite_schema.SCHEMA_VERSION:
        sqlite_schema.make_tables(path, connection)
    if sqlite_schema.has_old_entries(connection):
        logger.info("moving the entries of %s into tables of version %d", path, sqlite_schema.SCHEMA_VERSION)
        while sqlite_schema.move_old_entries(connection, clock()):
            pass


def _enter_wal_mode(path: Path, connection: sqlite3.Connection) -> None:
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
            raise ConfigurationError(
                f"{path} cannot be opened: its file system does not allow WAL mode (got {mode}); use a local one"
            )
        time.sleep(0.01)


def _check_quickly(path: Path, connection: sqlite3.Connection) -> None:
    if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
        raise StorageError(damage(path), attempts=1)
