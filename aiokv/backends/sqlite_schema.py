"""The tables of a SQLite file of entries: how they are made, brought up from version 1, read and written.

A value has a CRC-32 of its UTF-8 bytes, begun with those of its namespace and key: a value that a damaged page moves to another
key does not pass. Triggers count what each account stores, so that the count is of the same transaction as the write, whichever
process wrote.

The tables bear the version in their names. A process of an older version that still has the file open fails at its next call
for want of its table; it never writes rows that this version would misread.

The table has row identifiers on purpose. `WITHOUT ROWID` saves 15 % of a read of 100 bytes among a million, but SQLite then
loads whole rows to compare their keys: a read of 20 kB costs five times as much, and near values of 1.9 MB each step of the
search loads megabytes.
"""

import re
import sqlite3
import zlib
from pathlib import Path
from typing import Final

from aiokv.errors import ConfigurationError

APPLICATION_ID: Final = 0x61696F6B  # "aiok"
SCHEMA_VERSION: Final = 2
_MIGRATION_STEP_ENTRIES = 2_000
_MIGRATION_STEP_BYTES = 4_000_000

_TABLES = (
    """
CREATE TABLE entries_v2 (
    db_name TEXT NOT NULL,
    key TEXT NOT NULL,
    expires_at REAL NOT NULL,
    checksum INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    value BLOB NOT NULL,
    UNIQUE (db_name, key)
) STRICT
""",
    "CREATE INDEX entries_v2_by_expiry ON entries_v2 (expires_at)",
    """
CREATE TABLE usage (
    account TEXT NOT NULL PRIMARY KEY,
    value_bytes INTEGER NOT NULL,
    entries INTEGER NOT NULL
) STRICT, WITHOUT ROWID
""",
    "CREATE TABLE probe (id INTEGER PRIMARY KEY, written_at REAL NOT NULL) STRICT",
)
_TRIGGERS = (
    """
CREATE TRIGGER entries_v2_inserted AFTER INSERT ON entries_v2 BEGIN
    INSERT INTO usage (account, value_bytes, entries) VALUES (ACCOUNT OF new, new.size_bytes, 1)
    ON CONFLICT (account) DO UPDATE SET value_bytes = value_bytes + excluded.value_bytes, entries = entries + 1;
END
""",
    """
CREATE TRIGGER entries_v2_updated AFTER UPDATE OF size_bytes ON entries_v2 WHEN new.size_bytes <> old.size_bytes BEGIN
    UPDATE usage SET value_bytes = value_bytes + new.size_bytes - old.size_bytes WHERE account = ACCOUNT OF new;
END
""",
    """
CREATE TRIGGER entries_v2_deleted AFTER DELETE ON entries_v2 BEGIN
    UPDATE usage SET value_bytes = value_bytes - old.size_bytes, entries = entries - 1 WHERE account = ACCOUNT OF old;
END
""",
)
# What stands before the first `:`, as in `account_of`.
_ACCOUNT = r"CASE instr(\1.db_name, ':') WHEN 0 THEN '' ELSE substr(\1.db_name, 1, instr(\1.db_name, ':') - 1) END"

GET = "SELECT value, checksum FROM entries_v2 WHERE db_name = ? AND key = ? AND expires_at > ?"
MAX_GATHERED_BYTES: Final = 64 * 1024
"""Largest value that is read together with others."""
_GET_ALL = """
SELECT wanted.column1, checksum, CASE WHEN size_bytes <= {max_bytes} THEN value END
FROM (VALUES {rows}) AS wanted
CROSS JOIN entries_v2 ON db_name = wanted.column2 AND key = wanted.column3
WHERE expires_at > ?
"""
GET_ALL: Final = {
    count: _GET_ALL.format(max_bytes=MAX_GATHERED_BYTES, rows=", ".join(f"({at}, ?, ?)" for at in range(count)))
    for count in (32, 8, 2, 1)
}
"""Statements that read several values, by how many; the largest first. A row has its position, and NULL for a large value."""
_SET = """
INSERT INTO entries_v2 (db_name, key, expires_at, checksum, size_bytes, value) VALUES {rows}
ON CONFLICT (db_name, key) DO UPDATE SET
    expires_at = excluded.expires_at, checksum = excluded.checksum, size_bytes = excluded.size_bytes, value = excluded.value
"""
SETS: Final = {count: _SET.format(rows=", ".join(["(?, ?, ?, ?, ?, ?)"] * count)) for count in (16, 4, 1)}
"""Statements that set several entries, one after the other, by how many; the largest first."""
WRITES: Final = {
    "set": SETS[1],
    "delete": "DELETE FROM entries_v2 WHERE db_name = ? AND key = ?",
    "probe": "INSERT INTO probe (id, written_at) VALUES (1, ?) ON CONFLICT (id) DO UPDATE SET written_at = excluded.written_at",
}
HAS_EXPIRED = "SELECT 1 FROM entries_v2 WHERE expires_at <= ? LIMIT 1"
SWEEP = "DELETE FROM entries_v2 WHERE rowid IN (SELECT rowid FROM entries_v2 WHERE expires_at <= ? LIMIT ?)"
FORGET_EMPTY_ACCOUNTS = "DELETE FROM usage WHERE entries = 0"
USAGE = "SELECT value_bytes, entries FROM usage WHERE account = ?"
ALL_USAGE = "SELECT account, value_bytes, entries FROM usage"
TOTAL_PAGES = "PRAGMA page_count"
TOTAL_USAGE = "SELECT coalesce(sum(value_bytes), 0), coalesce(sum(entries), 0) FROM usage"

_VERSION = """
SELECT application_id, user_version, (SELECT count(*) FROM sqlite_schema) FROM pragma_application_id, pragma_user_version
"""
_HAS_TABLE = "SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = ?"
# The bytes as they are, never decoded: text that a damaged page has spoiled can be moved, and is then found by its checksum.
_MOVE_OLD_ENTRIES = """
INSERT INTO entries_v2 (db_name, key, expires_at, checksum, size_bytes, value)
SELECT db_name, key, expires_at, aiokv_checksum(CAST(db_name AS BLOB), CAST(key AS BLOB), CAST(value AS BLOB)),
    length(CAST(value AS BLOB)), CAST(value AS BLOB)
FROM entries_v1 WHERE rowid <= ? AND expires_at > ?
"""


def checksum_of(db_name: bytes, key: bytes, value: bytes) -> int:
    """Return the checksum of an entry.

    Args:
        db_name: The namespace, in UTF-8.
        key: The key, in UTF-8.
        value: The value, in UTF-8.

    Returns:
        A CRC-32 of all three, so that a value under another name does not pass.
    """
    return zlib.crc32(value, zlib.crc32(b"%b\0%b" % (db_name, key)))


def version_of(path: Path, connection: sqlite3.Connection) -> int:
    """Return a file's schema version; refuse a file of another kind or of a newer version.

    Args:
        path: The file, for messages.
        connection: A connection to it.

    Returns:
        The version, 0 for an empty file.

    Raises:
        ConfigurationError: The file is of another application or a newer version.
    """
    # In one statement, so that all values are of one moment: another process may be making the file.
    application_id, version, tables = connection.execute(_VERSION).fetchone()
    if (application_id, version, tables) == (0, 0, 0):
        return 0
    if application_id != APPLICATION_ID:
        raise ConfigurationError(
            f"{path} is a SQLite database of another application; it was left as it is. Name another file."
        )
    if version > SCHEMA_VERSION:
        raise ConfigurationError(
            f"{path} has schema version {version}, this aiokv knows up to {SCHEMA_VERSION}; it was left as it is. "
            "Upgrade aiokv, or name another file."
        )
    return int(version)


def make_tables(path: Path, connection: sqlite3.Connection) -> None:
    """Make the tables, unless another process has made them; set those of version 1 aside for `move_old_entries`.

    Args:
        path: The file, for messages.
        connection: A connection to it, in WAL mode.

    Raises:
        ConfigurationError: The file is of another application or a newer version.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = version_of(path, connection)
        if version < SCHEMA_VERSION:
            if version == 1:
                # From here on, processes of version 1 find no table, even where this process is killed.
                connection.execute("ALTER TABLE entries RENAME TO entries_v1")
            for statement in _TABLES + _TRIGGERS:
                connection.execute(re.sub(r"ACCOUNT OF (\w+)", _ACCOUNT, statement))
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself where the disk was full.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def has_old_entries(connection: sqlite3.Connection) -> bool:
    """Return whether entries of version 1 wait to be moved.

    Args:
        connection: A connection to the file.

    Returns:
        True until `move_old_entries` is through.
    """
    return bool(connection.execute(_HAS_TABLE, ("entries_v1",)).fetchone()[0])


def move_old_entries(connection: sqlite3.Connection, now: float) -> bool:
    """Move some entries of version 1 into the tables of this one, in one transaction.

    Args:
        connection: A connection to the file. Several processes may do this at once, and any of them may be killed.
        now: The present; entries that have expired are left out.

    Returns:
        True where more are to be moved.
    """
    connection.create_function("aiokv_checksum", 3, checksum_of, deterministic=True)
    connection.execute("BEGIN IMMEDIATE")
    try:
        more = has_old_entries(connection)
        if more:
            last, size_bytes = 0, 0
            sizes = connection.execute(
                "SELECT rowid, length(CAST(value AS BLOB)) FROM entries_v1 ORDER BY rowid LIMIT ?", (_MIGRATION_STEP_ENTRIES,)
            )
            for rowid, value_bytes in sizes:
                last, size_bytes = rowid, size_bytes + value_bytes
                if size_bytes >= _MIGRATION_STEP_BYTES:
                    break
            sizes.close()
            connection.execute(_MOVE_OLD_ENTRIES, (last, now))
            if not connection.execute("DELETE FROM entries_v1 WHERE rowid <= ?", (last,)).rowcount:
                connection.execute("DROP TABLE entries_v1")
                more = False
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself where the disk was full.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return more
