"""The keys of a namespace of a SQLite file: listed in pages, counted, and deleted in steps."""

import contextlib
import sqlite3
import sys
from typing import Final
from urllib.parse import quote

from aiokv.backends.capabilities import Cleared, KeyInfo, Page
from aiokv.backends.sqlite_writes import Job
from aiokv.limits import MAX_ENTRY_PATH_BYTES

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
_STEP = "SELECT rowid, size_bytes, CAST(key AS BLOB) FROM entries_v2 WHERE {range} ORDER BY key LIMIT ?"
_LAST = "SELECT CAST(key AS BLOB) FROM entries_v2 WHERE {range} ORDER BY key DESC LIMIT 1"
# A cursor may travel in a request line, beside the prefix; at least so much of the last key fits.
_LEAST_LAST_BYTES: Final = 64


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

    def last_key(self, connection: sqlite3.Connection) -> bytes | None:
        """Find the last key.

        Args:
            connection: A connection.

        Returns:
            Its bytes; None where there is no key.
        """
        row = connection.execute(_LAST.format(range=self._range), self._parameters).fetchone()
        return None if row is None else row[0]

    def first_rows(self, connection: sqlite3.Connection, limit: int, last: bytes) -> tuple[list[tuple[int]], bytes | None]:
        """Find the first entries, expired ones too, that are small enough together for one transaction.

        Args:
            connection: A connection.
            limit: Most entries.
            last: The last key that is wanted, but for those that begin with it.

        Returns:
            Their row identifiers, and the key of the last of them; None in its place where there are no more.
        """
        rows: list[tuple[int]] = []
        size_bytes = 0
        found_key: bytes | None = None
        with contextlib.closing(connection.execute(_STEP.format(range=self._range), (*self._parameters, limit + 1))) as found:
            for rowid, value_bytes, key in found:
                if key > last and not key.startswith(last):
                    break
                if len(rows) == limit or (rows and size_bytes + value_bytes > _STEP_BYTES):
                    return rows, found_key
                size_bytes += value_bytes
                rows.append((rowid,))
                found_key = key
        return rows, None


class Clear(Job):
    """A step of deleting a prefix, in the order of the keys.

    Args:
        db_name: The namespace.
        prefix: What the keys begin with.
        cursor: That of the step before, or None.
        limit: Most entries.

    Raises:
        ValueError: The cursor is none of clearing.

    Attributes:
        cleared: What it has done. It may have ended early, for the size of what it deleted.
    """

    __slots__ = ("_last", "_limit", "_listing", "_prefix", "cleared")

    def __init__(self, db_name: str, prefix: str, cursor: str | None, limit: int) -> None:
        super().__init__("clear", db_name)
        after: str | None = None
        self._last: bytes | None = None
        if cursor is not None:
            after, self._last = _split_cursor(cursor, prefix)
        self._listing = Listing(db_name, prefix, after)
        self._prefix = prefix
        self._limit = limit
        self.size_chars = 1_000 * limit
        self.cleared = Cleared(0, None)

    def apply(self, connection: sqlite3.Connection, now: float) -> None:  # noqa: ARG002 (expired entries go, too)
        """Delete entries."""
        # What is set behind it from now on would keep the clearing from its end.
        last = self._listing.last_key(connection) if self._last is None else self._last
        rows, key = ([], None) if last is None else self._listing.first_rows(connection, self._limit, last)
        connection.executemany("DELETE FROM entries_v2 WHERE rowid = ?", rows)
        self.entries = len(rows)
        cursor = None
        if key is not None and last is not None:
            cursor = _join_cursor(_cursor_of(key, self._prefix), last, self.db_name, self._prefix)
        self.cleared = Cleared(len(rows), cursor)

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


def _join_cursor(after: str, last: bytes, db_name: str, prefix: str) -> str:
    """Return a cursor of clearing: where it is, and where it ends."""
    room = MAX_ENTRY_PATH_BYTES - sum(len(quote(text, safe="")) for text in (db_name, prefix, after))
    # Cut short, it stands for all keys that begin with it.
    end = last.decode(errors="replace").partition("\ufffd")[0][len(prefix) :]
    while len(quote(end, safe="")) > max(room, _LEAST_LAST_BYTES):
        end = end[: len(end) * 7 // 8]
    return f"{len(end)}.{end}{after}"


def _split_cursor(cursor: str, prefix: str) -> tuple[str, bytes]:
    """Return what `_join_cursor` has joined."""
    size, point, rest = cursor.partition(".")
    if not (point and size.isascii() and size.isdigit() and len(size) <= len(str(MAX_ENTRY_PATH_BYTES))):
        raise ValueError("cursor is none of clearing; give that of the step before, or None")
    return rest[int(size) :], (prefix + rest[: int(size)]).encode()
