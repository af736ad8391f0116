"""Rows of a file that is imported: `{"key": ..., "value": ..., "ttl": ...}` a line, or CSV with a header of these names."""

import csv
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import orjson

from aiokv.backends.capabilities import Entry
from aiokv.errors import MAX_PRINTED_KEY_CHARS, truncated
from aiokv.limits import MAX_ENTRY_PATH_BYTES, check_entry, check_ttl, check_value

# The largest value as JSON with every character escaped, the longest key likewise, and the rest of the line.
_MAX_LINE_BYTES = 12 * 1024 * 1024
_MAX_FIELD_CHARS = 4 * 1024 * 1024
_MEMBERS = frozenset({"key", "value", "ttl"})
_MAX_TTL_DIGITS = 18
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A row that can be stored."""

    line: int
    """The number of its first line in the file, from 1."""
    entry: Entry


class _LongLineError(Exception):
    """A line that is longer than any row needs."""


class BadRow(NamedTuple):
    """A row that is left out."""

    line: int
    key: str | None
    """The key; of one that no store takes, since it is too long, the beginning and its length."""
    reason: str
    """Why, without the value."""

    def as_line(self) -> bytes:
        """Return it as a line of JSON."""
        return orjson.dumps({"line": self.line, "key": self.key, "reason": self.reason}) + b"\n"


class Position(NamedTuple):
    """A place between two rows."""

    offset: int = 0
    """Bytes before it."""
    line: int = 0
    """Lines before it."""
    rows: int = 0
    """Rows before it, bad ones included."""
    digest: str = ""
    """A digest of the bytes before it where the file cannot be read twice, else empty."""


class Batch(NamedTuple):
    """Rows that are stored together."""

    rows: list[Row]
    bad: list[BadRow]
    end: Position
    is_last: bool


class RowReader(ABC):
    """Rows of a file, read in batches.

    Args:
        file: The file, at its beginning.
        db_name: The namespace that the keys have to fit.
        ttl: Seconds to live of rows that name none; None for the longest.
        digests: Whether positions bear a digest of the bytes before them.
    """

    def __init__(self, file: BinaryIO, db_name: str, ttl: int | None, *, digests: bool) -> None:
        self._file = file
        self._db_name = db_name
        self._ttl = ttl
        self._offset = 0
        self._line = 0
        self._rows = 0
        self._digest = hashlib.blake2b(digest_size=16) if digests else None
        self._is_over = False
        self._columns = self._read_columns()

    @property
    def position(self) -> Position:
        """Where the next row begins."""
        return Position(self._offset, self._line, self._rows, "" if self._digest is None else self._digest.hexdigest())

    def seek(self, position: Position) -> None:
        """Go on at a position of an earlier run.

        Args:
            position: What `position` was then.

        Raises:
            OSError: The file cannot be read there.
        """
        self._file.seek(position.offset)
        self._offset, self._line, self._rows, _ = position

    def skip(self, position: Position) -> None:
        """Read over the rows before a position of an earlier run, of a file that cannot seek.

        Args:
            position: What `position` was then.

        Raises:
            ValueError: The bytes before it are others than they were then.
        """
        rows = self._read_rows()
        while self._rows < position.rows and next(rows, None) is not None:
            self._rows += 1
        if self.position != position:
            raise ValueError(f"the first {position.rows:,} rows are not those that were imported before")

    def read_batch(self, max_rows: int, max_bytes: int) -> Batch:
        """Read the next rows.

        Args:
            max_rows: Most rows, bad ones included.
            max_bytes: The bytes of the file after which the batch ends.

        Returns:
            The rows.

        Raises:
            OSError: The file cannot be read.
            ValueError: The rest of the file cannot be split into rows.
        """
        rows: list[Row] = []
        bad: list[BadRow] = []
        began = self._offset
        for row in self._read_rows():
            self._rows += 1
            if isinstance(row, Row):
                rows.append(row)
            else:
                bad.append(row)
            if len(rows) + len(bad) >= max_rows or self._offset - began >= max_bytes:
                break
        else:
            self._is_over = True
        return Batch(rows, bad, self.position, self._is_over)

    def _read_columns(self) -> list[str]:
        """Read what comes before the first row: of CSV the names of its columns."""
        return []

    @abstractmethod
    def _read_rows(self) -> Iterator[Row | BadRow]:
        """Yield the coming rows; after each the attributes say where it ends."""

    def _read_line(self) -> bytes | None:
        """Return the next line; None where it is too long to be a row, and the empty bytes at the end."""
        line = self._file.readline(_MAX_LINE_BYTES)
        self._line += bool(line)
        self._count(line)
        if len(line) < _MAX_LINE_BYTES or line.endswith(b"\n"):
            return line
        while rest := self._file.readline(2**16):
            self._count(rest)
            if rest.endswith(b"\n"):
                break
        return None

    def _count(self, data: bytes) -> None:
        self._offset += len(data)
        if self._digest is not None:
            self._digest.update(data)

    def _check(self, line: int, members: dict[str, Any]) -> Row | BadRow:
        try:
            return Row(line, self._entry_of(members))
        except (TypeError, ValueError) as error:
            key = members.get("key")
            return BadRow(line, _noted(key) if isinstance(key, str) else None, str(error))

    def _entry_of(self, members: dict[str, Any]) -> Entry:
        if not members.keys() <= _MEMBERS:
            unknown = next(name for name in members if name not in _MEMBERS)
            raise ValueError(f"it has a member {truncated(unknown)}; a row has key, value and, if you like, ttl")
        if missing := [name for name in ("key", "value") if name not in members]:
            raise ValueError(f"it has no {missing[0]}")
        check_entry(self._db_name, members["key"])
        check_value(members["value"])
        ttl = members.get("ttl")
        return Entry(members["key"], members["value"], check_ttl(self._ttl if ttl is None else ttl))


class JsonRows(RowReader):
    """A JSON object a line; lines of white space are passed over."""

    def _read_rows(self) -> Iterator[Row | BadRow]:
        while (line := self._read_line()) != b"":
            number = self._line
            if line is None:
                yield BadRow(number, None, f"the line is longer than {_MAX_LINE_BYTES:,} bytes, more than any value needs")
                continue
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.isspace():
                continue
            try:
                members = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                # Not chained: the error holds the line.
                yield BadRow(number, None, f"it is not JSON at column {error.colno}")
                continue
            if isinstance(members, dict):
                yield self._check(number, members)
            else:
                yield BadRow(number, None, 'it is no JSON object such as {"key": "k", "value": "v"}')


class CsvRows(RowReader):
    """CSV as RFC 4180 has it, in UTF-8: its first line names the columns key, value and, if there is one, ttl."""

    def _read_columns(self) -> list[str]:
        csv.field_size_limit(_MAX_FIELD_CHARS)
        self._quotes = 0
        try:
            header = next(csv.reader(self._lines(), strict=True), None)
        except (csv.Error, _LongLineError) as error:
            reason = _describe(error) if isinstance(error, csv.Error) else "it is too long"
            raise ValueError(f"the first line is no CSV header: {reason}") from None
        if header is None:
            return []
        if not {"key", "value"} <= set(header) <= _MEMBERS or len(set(header)) != len(header):
            raise ValueError(
                "the first line of CSV must name the columns key, value and perhaps ttl, each once and none besides; "
                "add such a line before the first row"
            )
        return header

    def _lines(self) -> Iterator[str]:
        while (line := self._read_line()) != b"":
            if line is None:
                raise _LongLineError
            if self._line == 1:
                line = line.removeprefix(_BOM)
            # What is not UTF-8 becomes lone surrogates, which no check lets pass.
            yield line.decode("utf-8", "surrogateescape")

    def _read_rows(self) -> Iterator[Row | BadRow]:
        # A new one each time: it reads no line ahead.
        reader = csv.reader(self._lines(), strict=True)
        while True:
            number, self._quotes = self._line + 1, 0
            try:
                fields = next(reader, None)
            except (csv.Error, _LongLineError) as error:
                if isinstance(error, csv.Error) and "field limit" not in str(error):
                    yield BadRow(number, None, f"it is not CSV: {_describe(error)}")
                    continue
                self._pass_over_row(number)
                reader = csv.reader(self._lines(), strict=True)
                yield BadRow(number, None, f"it has a field of more than {_MAX_FIELD_CHARS:,} characters, more than any value")
                continue
            if fields is None:
                return
            if not fields:
                continue
            if len(fields) != len(self._columns):
                yield BadRow(number, None, f"it has {len(fields)} fields, and the first line {len(self._columns)}")
                continue
            members: dict[str, Any] = dict(zip(self._columns, fields, strict=True))
            ttl = members.pop("ttl", "")
            if ttl:
                # int() alone would take "6_0" and digits of other scripts.
                is_number = ttl.isascii() and ttl.isdigit() and len(ttl) <= _MAX_TTL_DIGITS
                if not is_number:
                    yield BadRow(
                        number,
                        None if _has_surrogate(members["key"]) else _noted(members["key"]),
                        "its ttl is no decimal number of seconds",
                    )
                    continue
                members["ttl"] = int(ttl)
            if _has_surrogate(members["key"]) or _has_surrogate(members["value"]):
                # UTF-8 has none, so the bytes were none.
                yield BadRow(number, None, "it is not UTF-8")
                continue
            yield self._check(number, members)

    def _pass_over_row(self, number: int) -> None:
        """Read to the end of a row of which a part was read."""
        # Outside of fields in quotes there are as many opening as closing ones.
        while self._quotes % 2:
            if self._read_line() == b"":
                raise ValueError(
                    f"the CSV row at line {number:,} does not end, as where a quote is not closed; neither it nor the rows "
                    "just before it were imported"
                )

    def _count(self, data: bytes) -> None:
        super()._count(data)
        self._quotes += data.count(b'"')


def _noted(key: str) -> str:
    """Return what a note says of a key, since notes stay in memory for a while."""
    return key if len(key) <= MAX_ENTRY_PATH_BYTES else f"{key[:MAX_PRINTED_KEY_CHARS]}... ({len(key):,} characters)"


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _describe(error: csv.Error) -> str:
    if "new-line character" in str(error):
        return "a carriage return stands outside quotes; end lines by LF or CR LF"
    return str(error)


FORMATS: dict[str, Callable[..., RowReader]] = {"jsonl": JsonRows, "csv": CsvRows}
"""The reader of each format."""


def format_row(key: str, value: str, ttl_seconds: int) -> bytes:
    """Return a line of an export.

    Args:
        key: The key.
        value: The value.
        ttl_seconds: What it has left to live.
    """
    return orjson.dumps({"key": key, "value": value, "ttl": ttl_seconds}) + b"\n"


def count_rows(count: int) -> str:
    """Return a number of rows as text.

    Args:
        count: The number.
    """
    return "1 row" if count == 1 else f"{count:,} rows"


def open_input(path: str) -> BinaryIO:
    """Open what is imported.

    Args:
        path: A file, or `-` for standard input.

    Returns:
        The file, not shared with anything of the interpreter: a thread that waits in it hinders no exit.

    Raises:
        OSError: It cannot be opened.
    """
    if path == "-":
        return open(0, "rb", buffering=io.DEFAULT_BUFFER_SIZE * 16, closefd=False)
    return open(path, "rb", buffering=io.DEFAULT_BUFFER_SIZE * 16)  # noqa: PTH123 (both in one way)
