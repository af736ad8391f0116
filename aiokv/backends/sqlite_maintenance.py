"""Copy a SQLite file of entries, and look for damage in one; both while it is served."""

import contextlib
import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Self

from aiokv.backends import sqlite_file, sqlite_schema
from aiokv.backends.base import account_of
from aiokv.backends.sqlite_disk import PRIVATE_MODE
from aiokv.backends.sqlite_paths import is_file_of_store
from aiokv.errors import ConfigurationError, StorageError, truncated
from aiokv.record import Record

Progress = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and how much there is."""

_BACKUP_STEP_PAGES = 2_048
_PROGRESS_STEP_ENTRIES = 1_000
_MOST_PROBLEMS = 100
_MOST_EXAMPLES = 20
_ENTRIES = "SELECT db_name, key, checksum, size_bytes, value FROM entries_v2"
_OLD_ENTRIES = "SELECT count(*), coalesce(sum(length(CAST(value AS BLOB))), 0) FROM {table}"
# What every SQLite file begins with; its size in pages stands further on.
_MAGIC = b"SQLite format 3\0"
_HEADER_BYTES = 100


class DamagedFileError(StorageError):
    """A file is damaged.

    Args:
        reason: What cannot be done for it, and the way out.
        problems: What is wrong, a sentence each; without any value.
    """

    def __init__(self, reason: str, problems: Sequence[str]) -> None:
        super().__init__(reason)
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n  ".join((self.reason, *self.problems))

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), (self.reason, self.problems)


class BackupReport(Record, kw_only=True):
    """What a backup wrote.

    Args:
        path: The copy.
        size_bytes: Its size.
        seconds: How long the copy took.
    """

    path: str
    size_bytes: int
    seconds: float


class CheckReport(Record, kw_only=True):
    """What is in a file, and what is wrong with it.

    Args:
        path: The file.
        schema_version: That of its tables; 0 where the file is so damaged that it cannot be read at all.
        entries: Entries, expired ones too until they are swept.
        old_entries: Those of them that are still in tables of version 1, which have no checksums.
        value_bytes: Bytes of their values.
        damaged_values: Entries whose value does not match its checksum.
        examples: Namespace and key of the first 20 of those, to be set anew or deleted.
        problems: What is wrong, a sentence each, at most about 100; without any value.
    """

    path: str
    schema_version: int
    entries: int
    old_entries: int
    value_bytes: int
    damaged_values: int
    examples: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def backup(
    path: str | Path,
    target: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> BackupReport:
    """Copy a file as it is at this moment; others may read and write it meanwhile.

    Blocks until the copy is on the disk. The copy is one file, for its owner alone, whole or not there at all.

    Args:
        path: The SQLite file.
        target: The copy.
        overwrite: Whether to replace a file of that name.
        verify: Whether to check the copy, as `check` does, before it takes its name.
        progress: Called with `"pages"` and the pages copied and in all; then as `check` calls it.

    Returns:
        What was written.

    Raises:
        ConfigurationError: There is no such file, it is not of aiokv, or the target is in the way or cannot be written.
        DamagedFileError: The file is damaged; nothing was written, and what was at the target is still there.
        StorageError: The file cannot be read, or the copy cannot be written.
    """
    started = time.monotonic()
    path, target = Path(path).absolute(), Path(target).absolute()
    _check_target(path, target, overwrite=overwrite)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    with _opened(path) as source:
        try:
            os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_MODE))
            _copy(path, source, unfinished, target, progress or _ignore)
            if verify:
                _verify(path, unfinished, progress)
            _sync(unfinished)
            size_bytes = unfinished.stat().st_size
            if overwrite:
                unfinished.replace(target)
            else:
                # A link never replaces a file that was made meanwhile.
                os.link(unfinished, target)
            _sync(target.parent)
        except FileExistsError as error:
            raise ConfigurationError(f"{target} exists; name another file, or ask to overwrite it (--overwrite)") from error
        except OSError as error:
            raise ConfigurationError(f"{target} cannot be written: {error.strerror}") from error
        finally:
            for suffix in ("", "-journal"):
                unfinished.with_name(unfinished.name + suffix).unlink(missing_ok=True)
    return BackupReport(path=str(target), size_bytes=size_bytes, seconds=time.monotonic() - started)


def check(path: str | Path, *, progress: Progress | None = None) -> CheckReport:
    """Look for damage in a file: its pages, the checksum of each value, and what is counted for each account.

    Blocks for as long as reading the whole file takes. Nothing is changed, and others may read and write it meanwhile.

    Args:
        path: The SQLite file.
        progress: Called with `"pages"` and `"entries"`, how many of them are done, and how many there are.

    Returns:
        What was found.

    Raises:
        ConfigurationError: There is no such file, or it is not of aiokv.
        StorageError: The file cannot be read now.
    """
    path, report = Path(path).absolute(), progress or _ignore
    found, version = _Findings(), 0
    try:
        with _opened(path) as connection:
            version = sqlite_schema.version_of(path, connection)
            # All that follows sees the file as it is at this moment.
            connection.execute("BEGIN")
            _check_pages(connection, found, report)
            if version == sqlite_schema.SCHEMA_VERSION:
                _check_entries(connection, found, report)
            _count_old_entries(connection, found, version)
    except DamagedFileError as error:
        found.problems.extend(error.problems)
        found.problems.append("the check ended there; stop what uses the file, and put a backup in its place")
    return CheckReport(
        path=str(path),
        schema_version=version,
        entries=found.entries,
        old_entries=found.old_entries,
        value_bytes=found.value_bytes,
        damaged_values=found.damaged_values,
        examples=tuple(found.examples),
        problems=tuple(found.problems),
    )


class _Findings:
    """What a check has found up to now."""

    def __init__(self) -> None:
        self.entries = 0
        self.old_entries = 0
        self.value_bytes = 0
        self.damaged_values = 0
        self.examples: list[tuple[str, str]] = []
        self.problems: list[str] = []


def _ignore(_what: str, _done: int, _total: int) -> None:
    """Show no progress."""


@contextlib.contextmanager
def _opened(path: Path) -> Generator[sqlite3.Connection]:
    """Open a file that must be there and of aiokv, and change nothing in it."""
    if not path.is_file():
        raise ConfigurationError(f"{path} does not exist or is no file; name the SQLite file of a store")
    try:
        with contextlib.closing(sqlite_file.connect(path)) as connection:
            connection.text_factory = bytes
            if not sqlite_schema.version_of(path, connection):
                raise ConfigurationError(f"{path} is empty; name the SQLite file of a store")
            connection.execute("PRAGMA query_only = ON")
            yield connection
    except sqlite3.Error as error:
        # A file that never was a database is the wrong file, not a damaged one.
        if sqlite_file.is_damaged(error) and _header_of(path).startswith(_MAGIC):
            raise DamagedFileError(sqlite_file.damage(path), _describe_damage(path, error)) from None
        raise sqlite_file.open_error(path, error) from None


def _header_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEADER_BYTES)


def _describe_damage(path: Path, error: sqlite3.Error) -> list[str]:
    """Return what is wrong with a file that SQLite refuses; never SQLite's own text, which may quote the file."""
    code = getattr(error, "sqlite_errorname", type(error).__name__)
    problems = [f"SQLite: a page cannot be right ({code})"]
    header, size_bytes = _header_of(path), path.stat().st_size
    if len(header) == _HEADER_BYTES:
        page_bytes, pages = int.from_bytes(header[16:18]), int.from_bytes(header[28:32])
        # 64 KiB does not fit into the two bytes.
        due_bytes = pages * (2**16 if page_bytes == 1 else page_bytes)
        if size_bytes < due_bytes:
            problems.append(f"the file has {size_bytes:,} bytes of {due_bytes:,}: its end is missing")
    return problems


def _verify(path: Path, copy: Path, progress: Progress | None) -> None:
    """Refuse a damaged copy."""
    found = check(copy, progress=progress)
    if found.is_sound:
        return
    examples = [f"damaged: db {truncated(db_name)}, key {truncated(key)}" for db_name, key in found.examples]
    raise DamagedFileError(
        f"{path} is damaged, so no copy was kept; fix it as said below or put a backup in its place, "
        "or copy it as it is without the check (--no-check), into a new file",
        [*found.problems, *examples],
    )


def _check_target(path: Path, target: Path, *, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target} cannot be written: the folder {target.parent} does not exist; make it first")
    if is_file_of_store(target, path):
        raise ConfigurationError(f"{target} is the very file that is to be copied, or belongs to it; name another file")
    if not target.exists():
        return
    if not overwrite or not target.is_file():
        raise ConfigurationError(f"{target} exists; name another file, or ask to overwrite it (--overwrite)")
    if Path(f"{target}-wal").exists():
        raise ConfigurationError(f"{target} is in use as a store, or was not closed; name another file")


def _copy(path: Path, source: sqlite3.Connection, target: Path, final: Path, progress: Progress) -> None:
    def show(_status: int, remaining: int, total: int) -> None:
        progress("pages", total - remaining, total)

    try:
        # What is read stays as it is while the transaction lasts. Without it, each write of others starts the copy anew.
        source.execute("BEGIN")
        source.execute(sqlite_schema.TOTAL_PAGES).fetchone()
        with contextlib.closing(sqlite3.connect(target, isolation_level=None)) as copy:
            source.backup(copy, pages=_BACKUP_STEP_PAGES, progress=show, sleep=0)
            # One file, without a log beside it; a store that opens it makes the log again.
            copy.execute("PRAGMA journal_mode = DELETE")
        source.execute("ROLLBACK")
    except sqlite3.Error as error:
        if sqlite_file.is_damaged(error):
            raise
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            # Reading fills no disk, so it is the target's.
            raise StorageError(
                f"{final} cannot be written: its disk is full; make room there, or name a file elsewhere"
            ) from None
        raise sqlite_file.storage_error(path, error, "", "", "") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_pages(connection: sqlite3.Connection, found: _Findings, progress: Progress) -> None:
    total = connection.execute(sqlite_schema.TOTAL_PAGES).fetchone()[0]
    progress("pages", 0, total)
    for (line,) in connection.execute(f"PRAGMA integrity_check({_MOST_PROBLEMS})"):
        if line != b"ok":
            found.problems.append(f"SQLite: {line.decode(errors='replace')}")
    progress("pages", total, total)


def _check_entries(connection: sqlite3.Connection, found: _Findings, progress: Progress) -> None:
    counted: dict[bytes, tuple[int, int]] = {}
    total = connection.execute("SELECT count(*) FROM entries_v2").fetchone()[0]
    for db_name, key, checksum, size_bytes, value in connection.execute(_ENTRIES):
        if found.entries % _PROGRESS_STEP_ENTRIES == 0:
            progress("entries", found.entries, total)
        found.entries += 1
        found.value_bytes += len(value)
        account = account_of(db_name.decode(errors="replace")).encode()
        value_bytes, entries = counted.get(account, (0, 0))
        counted[account] = (value_bytes + size_bytes, entries + 1)
        if size_bytes != len(value) or sqlite_schema.checksum_of(db_name, key, value) != checksum:
            found.damaged_values += 1
            if len(found.examples) < _MOST_EXAMPLES:
                found.examples.append((db_name.decode(errors="replace"), key.decode(errors="replace")))
    progress("entries", found.entries, total)
    if found.damaged_values:
        found.problems.append(
            "1 value is damaged; set its key anew, or delete it"
            if found.damaged_values == 1
            else f"{found.damaged_values:,} values are damaged; set their keys anew, or delete them"
        )
    stored = {account: (size, number) for account, size, number in connection.execute(sqlite_schema.ALL_USAGE) if number}
    wrong = sum(stored.get(account) != counted.get(account) for account in stored.keys() | counted.keys())
    if wrong:
        found.problems.append(f"what is counted for {wrong} accounts is not what they store; restore a backup")


def _count_old_entries(connection: sqlite3.Connection, found: _Findings, version: int) -> None:
    """Count what is still in tables of version 1, of a file that is to be renewed or half renewed."""
    if version < sqlite_schema.SCHEMA_VERSION:
        table = "entries"
    elif sqlite_schema.has_old_entries(connection):
        table = "entries_v1"
    else:
        return
    found.old_entries, value_bytes = connection.execute(_OLD_ENTRIES.format(table=table)).fetchone()
    found.entries += found.old_entries
    found.value_bytes += value_bytes
