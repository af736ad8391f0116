"""The keys of a namespace of a SQLite file: listed in pages, counted, and deleted in steps."""

import contextlib
import sqlite3
import sys

from aiokv.backends.capabilities import KeyInfo, Page
from aiokv.backends.sqlite_writes import Job

# Read for a page even where fewer are asked for: expired entries would make many empty pages.
_LEAST_PAGE_ROWS = 256
# Between two steps other writes have their turn.
_STEP_BYTES = 16 * 1024 * 1024
_FIRST_SURROGATE, _LAST_SURROGATE = 0xD800, 0xDFFF

# The bytes of a key, since a damaged one must not end a listing.
_LIST = "SELECT CAST(key AS BLOB), expires_at, size_bytes FROM entries_v2 WHERE {range} ORDER BY key LIMIT ?"
# All of them by the index alone, less the few that have expired.
_COUNT = """
SELECT (SELECT count(*) FROM entries_v2 WHERE {range})
    - (SELECT count(*) FROM entries_v2 INDEXED BY entries_v2_by_expiry WHERE {range} AND expires_at <= ?)
"""
_STEP = "SELECT rowid, size_bytes FROM entries_v2 WHERE {range} LIMIT ?"


class Listing:
    """The keys of a prefix.

    Args:
        db_name: The namespace.
        prefix: What the keys begin with.
        after: The cursor after which they begin, or None.

    Raises:
        ValueError: The cursor is none of a listing.
    """

    def __init__(self, db_name: str, prefix: str, after: str | None = None) -> None:
        self._prefix = prefix
        start = prefix.encode() if after is None else _key_of(after, prefix)
        self._range = f"db_name = ? AND key {'>=' if after is None else '>'} CAST(? AS TEXT)"
        self._parameters: tuple[object, ...] = (db_name, start)
        end = end_of(prefix)
        if end is not None:
            self._range += " AND key < ?"
            self._parameters += (end,)

    def page(self, cursor: sqlite3.Cursor, limit: int, now: float) -> Page:
        """Read a page.

        Args:
            cursor: A cursor of a connection.
            limit: Most keys.
            now: The present.

        Returns:
            The page.
        """
        most_rows = max(limit, _LEAST_PAGE_ROWS)
        rows = cursor.execute(_LIST.format(range=self._range), (*self._parameters, most_rows)).fetchall()
        infos: list[KeyInfo] = []
        for position, (key, expires_at, size_bytes) in enumerate(rows, 1):
            if expires_at > now:
                # A key that is no UTF-8 is of a damaged page; `aiokv check` tells of it.
                with contextlib.suppress(UnicodeDecodeError):
                    infos.append(KeyInfo(key.decode(), expires_at, size_bytes))
            if len(infos) == limit and (position < len(rows) or len(rows) == most_rows):
                return Page(infos, _cursor_of(key, self._prefix))
        return Page(infos, _cursor_of(rows[-1][0], self._prefix) if len(rows) == most_rows else None)

    def count(self, cursor: sqlite3.Cursor, now: float) -> int:
        """Count the live entries.

        Args:
            cursor: A cursor of a connection.
            now: The present.

        Returns:
            Their number.
        """
        parameters = (*self._parameters, *self._parameters, now)
        number: int = cursor.execute(_COUNT.format(range=self._range), parameters).fetchone()[0]
        return number

    def first_rows(self, connection: sqlite3.Connection, limit: int) -> tuple[list[tuple[int]], bool]:
        """Find entries, expired ones too, that are small enough together for one transaction.

        Args:
            connection: A connection.
            limit: Most entries.

        Returns:
            Their row identifiers, and whether there are fewer than `limit` for their size.
        """
        rows: list[tuple[int]] = []
        size_bytes = 0
        with contextlib.closing(connection.execute(_STEP.format(range=self._range), (*self._parameters, limit))) as found:
            for rowid, value_bytes in found:
                if rows and size_bytes + value_bytes > _STEP_BYTES:
                    return rows, True
                size_bytes += value_bytes
                rows.append((rowid,))
        return rows, False


class Clear(Job):
    """A step of deleting a prefix.

    Args:
        db_name: The namespace.
        prefix: What the keys begin with.
        limit: Most entries.

    Attributes:
        deleted: How many it deleted.
        has_more: Whether it ended early, for the size of what it deleted.
    """

    __slots__ = ("_limit", "_listing", "deleted", "has_more")

    def __init__(self, db_name: str, prefix: str, limit: int) -> None:
        super().__init__("clear", db_name)
        self._listing = Listing(db_name, prefix)
        self._limit = limit
        self.size_chars = 1_000 * limit
        self.deleted = 0
        self.has_more = False

    def apply(self, connection: sqlite3.Connection, now: float) -> None:  # noqa: ARG002 (expired entries go, too)
        """Delete entries."""
        rows, self.has_more = self._listing.first_rows(connection, self._limit)
        connection.executemany("DELETE FROM entries_v2 WHERE rowid = ?", rows)
        self.deleted = self.entries = len(rows)

    def most_bytes(self) -> int:
        """Return 0: deletes go on below the floor."""
        return 0

    def frees_room(self) -> bool:
        """Return True."""
        return True


def end_of(prefix: str) -> str | None:
    """Return the least text, in the order of code points, that is above all texts with a prefix.

    UTF-8 has the same order, and SQLite compares its bytes.

    Args:
        prefix: The prefix.

    Returns:
        The text; None where there is none.
    """
    prefix = prefix.rstrip(chr(sys.maxunicode))
    if not prefix:
        return None
    following = ord(prefix[-1]) + 1
    if _FIRST_SURROGATE <= following <= _LAST_SURROGATE:
        following = _LAST_SURROGATE + 1
    return prefix[:-1] + chr(following)


def _cursor_of(key: bytes, prefix: str) -> str:
    """Return a cursor after a key: short, since it may travel beside the prefix."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        return f"x{key.hex()}"
    return f"k{text[len(prefix) :]}"


def _key_of(cursor_text: str, prefix: str) -> bytes:
    try:
        if cursor_text.startswith("k"):
            return (prefix + cursor_text[1:]).encode()
        if cursor_text.startswith("x"):
            return bytes.fromhex(cursor_text[1:])
    except ValueError:
        pass
    raise ValueError(f"cursor ({len(cursor_text):,} characters) is none of a listing; give that of the page before, or None")
