"""Many keys of a SQLite file at once: one transaction for writes, one moment of the file for reads."""

import itertools
import operator
import sqlite3
from collections.abc import Sequence
from typing import Final
from zlib import crc32

from aiokv.backends import sqlite_schema
from aiokv.backends.capabilities import MAX_BATCH_BYTES, OMITTED, Entry, Omitted
from aiokv.backends.sqlite_writes import SMALL_CHARS, Job, most_bytes_of, set_together

# An entry weighs as much as this, so that a group of batches is committed in a fraction of a second.
_ENTRY_WEIGHT_CHARS = 1_000
_INLINE_BYTES = 1024 * 1024
_MOST_INLINE_BYTES = 4096
LOOP_BYTES: Final = 1024 * 1024
"""Most bytes of large values that are read in the loop's thread."""

# The larger ones are filled up with the last key.
_KEY_COUNTS = (4, 16, 64, 128, 256, 512, 1_000)
_FIND = """
SELECT key, rowid, size_bytes, checksum, CASE WHEN size_bytes <= ? THEN value END
FROM entries_v2 WHERE db_name = ? AND expires_at > ? AND key IN ({keys})
"""
_FINDS = {count: _FIND.format(keys=", ".join("?" * count)) for count in _KEY_COUNTS}
_VALUE = "SELECT value FROM entries_v2 WHERE rowid = ?"

StoredValue = tuple[bytes, int]
"""Value and checksum, as they are in the file."""


class SetMany(Job):
    """Sets of several entries of one namespace.

    Args:
        db_name: The namespace.
        entries: The entries.
        now: When their time to live begins.
    """

    __slots__ = ("_now", "_sets")

    def __init__(self, db_name: str, entries: Sequence[Entry], now: float) -> None:
        super().__init__("set_many", db_name)
        self._sets = entries
        self._now = now
        self.entries = len(entries)
        self.size_chars = sum(len(entry[1]) for entry in entries) + _ENTRY_WEIGHT_CHARS * len(entries)

    def apply(self, connection: sqlite3.Connection, now: float) -> None:  # noqa: ARG002 (the time of the call counts)
        """Set the entries in their order."""
        begun = self._now
        db_name, seed = self.db_name, crc32(f"{self.db_name}\0".encode())
        # Neighbours in the index are written together: a third less work. Sorting keeps the order of equal keys.
        for is_small, entries in itertools.groupby(sorted(self._sets, key=operator.itemgetter(0)), _is_small):
            rows: list[tuple[object, ...]] = []
            for key, value, ttl_seconds in entries:
                data = value.encode()
                rows.append((db_name, key, begun + ttl_seconds, crc32(data, crc32(key.encode(), seed)), len(data), data))
            if is_small:
                set_together(connection, rows)
            else:
                connection.executemany(sqlite_schema.WRITES["set"], rows)

    def most_bytes(self) -> int:
        """Return the room that all of them can take in the file."""
        return sum(most_bytes_of(entry[1]) for entry in self._sets)


class DeleteMany(Job):
    """Deletes of several keys of one namespace.

    Args:
        db_name: The namespace.
        keys: The keys.
    """

    __slots__ = ("_keys",)

    def __init__(self, db_name: str, keys: Sequence[str]) -> None:
        super().__init__("delete_many", db_name)
        self._keys = keys
        self.entries = len(keys)
        self.size_chars = _ENTRY_WEIGHT_CHARS * len(keys)

    def apply(self, connection: sqlite3.Connection, now: float) -> None:  # noqa: ARG002
        """Delete the entries."""
        connection.executemany(sqlite_schema.WRITES["delete"], ((self.db_name, key) for key in sorted(self._keys)))

    def most_bytes(self) -> int:
        """Return 0: deletes go on below the floor."""
        return 0

    def frees_room(self) -> bool:
        """Return True."""
        return True


def read_many(
    cursor: sqlite3.Cursor, db_name: str, keys: Sequence[str], now: float, most_large_bytes: int
) -> list[StoredValue | Omitted | None] | None:
    """Read values as they are at one moment.

    Args:
        cursor: A cursor in no transaction.
        db_name: The namespace.
        keys: The keys, at most 1,000.
        now: The present.
        most_large_bytes: Most bytes of large values.

    Returns:
        For each key what is stored, `OMITTED` where the answer is full, None where nothing is; or None where the large values
        are more than was allowed.
    """
    count = next(count for count in _KEY_COUNTS if count >= len(keys))
    padding = itertools.repeat(keys[-1], count - len(keys))
    inline_bytes = min(_MOST_INLINE_BYTES, _INLINE_BYTES // count)
    cursor.execute("BEGIN")
    try:
        rows = cursor.execute(_FINDS[count], (inline_bytes, db_name, now, *keys, *padding)).fetchall()
        found = {row[0]: row for row in rows}
        outcomes: list[StoredValue | Omitted | None] = []
        used_bytes = large_bytes = 0
        for key in keys:
            row = found.get(key)
            if row is None:
                outcomes.append(None)
                continue
            _, rowid, size_bytes, checksum, value = row
            if used_bytes and used_bytes + size_bytes > MAX_BATCH_BYTES:
                # Nor what comes after it, however small: what is omitted is asked for again together.
                used_bytes = MAX_BATCH_BYTES + 1
                outcomes.append(OMITTED)
                continue
            used_bytes += size_bytes
            if value is None:
                large_bytes += size_bytes
                if large_bytes > most_large_bytes:
                    return None
                value = cursor.execute(_VALUE, (rowid,)).fetchone()[0]
            outcomes.append((value, checksum))
        return outcomes
    finally:
        # SQLite has rolled back by itself after some errors.
        if cursor.connection.in_transaction:
            cursor.execute("ROLLBACK")


def decode(row: StoredValue, key: str, seed: int) -> str | None:
    """Return a value, or None where it is not what was stored.

    Args:
        row: What is in the file.
        key: Its key.
        seed: The CRC-32 of the namespace and NUL.

    Returns:
        The value.
    """
    data, checksum = row
    try:
        if crc32(data, crc32(key.encode(), seed)) == checksum:
            return data.decode()
    except (TypeError, ValueError):
        pass
    return None


def _is_small(entry: Entry) -> bool:
    return len(entry[1]) <= SMALL_CHARS
