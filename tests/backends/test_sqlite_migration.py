"""Files of version 1: brought up while they are opened, whatever ends that, and closed to processes of version 1."""

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import FakeClock

from aiokv.backends import sqlite_schema
from aiokv.backends.base import Usage
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_maintenance import check

# As version 1 had it.
SCHEMA_OF_VERSION_1 = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
BEGIN IMMEDIATE;
CREATE TABLE entries (
    db_name TEXT NOT NULL,
    key TEXT NOT NULL,
    expires_at REAL NOT NULL,
    value TEXT NOT NULL,
    UNIQUE (db_name, key)
) STRICT;
CREATE INDEX entries_by_expiry ON entries (expires_at);
PRAGMA application_id = 1634299755;
PRAGMA user_version = 1;
COMMIT;
"""
SET_OF_VERSION_1 = """
INSERT INTO entries (db_name, key, expires_at, value) VALUES (?, ?, ?, ?)
ON CONFLICT (db_name, key) DO UPDATE SET expires_at = excluded.expires_at, value = excluded.value
"""
STATEMENTS_OF_VERSION_1 = {
    "get": ("SELECT value FROM entries WHERE db_name = ? AND key = ? AND expires_at > ?", ("db", "k", 0.0)),
    "set": (SET_OF_VERSION_1, ("db", "k", 2e9, "old")),
    "delete": ("DELETE FROM entries WHERE db_name = ? AND key = ?", ("db", "k")),
    "sweep": ("DELETE FROM entries WHERE rowid IN (SELECT rowid FROM entries WHERE expires_at <= ? LIMIT ?)", (3e9, 64)),
}
LIVES, EXPIRED = 2_000_000.0, 999_999.0
NASTY = {"": "", "a\nb": "a\0b", "😀": "😀" * 100, "é": "\ufeff", "large": "x" * 1_900_000}


@contextlib.contextmanager
def version_1(path: Path) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(SCHEMA_OF_VERSION_1)
    try:
        yield connection
    finally:
        connection.close()


def make_version_1(path: Path, entries: dict[tuple[str, str], str], expires_at: float = LIVES) -> None:
    with version_1(path) as connection:
        connection.execute("BEGIN")
        rows = ((db_name, key, expires_at, value) for (db_name, key), value in entries.items())
        connection.executemany(SET_OF_VERSION_1, rows)
        connection.execute("COMMIT")


async def test_every_entry_of_version_1_is_there_afterwards_with_checksum_and_usage(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "kv.db"
    make_version_1(path, {("acc:db", key): value for key, value in NASTY.items()} | {("db", "k"): "v"})
    backend = SqliteBackend(path, clock=clock)
    values = [await backend.get("acc:db", key) for key in NASTY]
    assert all(value == expected for value, expected in zip(values, NASTY.values(), strict=True))
    assert await backend.get("db", "k") == "v"
    assert backend.usage("acc") == Usage(sum(len(value.encode()) for value in NASTY.values()), len(NASTY))
    assert backend.usage("") == Usage(1, 1)
    clock.now = LIVES
    assert await backend.get("db", "k") is None
    await backend.aclose()
    report = check(path)
    assert (report.problems, report.schema_version, report.entries) == ((), 2, len(NASTY) + 1)


async def test_check_finds_a_file_of_version_1_sound_with_its_entries_whole_and_half_renewed(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    make_version_1(path, {("db", f"k{number:04}"): "é" for number in range(3000)})
    report = check(path)
    assert (report.problems, report.schema_version) == ((), 1)
    assert (report.entries, report.old_entries, report.value_bytes) == (3000, 3000, 6000)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        sqlite_schema.make_tables(path, connection)
        assert sqlite_schema.move_old_entries(connection, 0.0)
    report = check(path)
    assert (report.problems, report.schema_version) == ((), 2)
    assert (report.entries, report.old_entries, report.value_bytes) == (3000, 1000, 6000)


async def test_entries_that_have_expired_are_left_behind(tmp_path: Path, clock: FakeClock) -> None:
    make_version_1(tmp_path / "kv.db", {("db", f"k{i}"): "v" for i in range(1200)}, expires_at=EXPIRED)
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock)
    assert await backend.get("db", "k1") is None
    assert backend.gauges().entries == 0
    await backend.aclose()


async def test_empty_file_of_version_1_is_brought_up(tmp_path: Path) -> None:
    make_version_1(tmp_path / "kv.db", {})
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set("db", "k", "v", 60)
    assert await backend.get("db", "k") == "v"
    await backend.aclose()


@pytest.mark.parametrize("verb", STATEMENTS_OF_VERSION_1)
async def test_process_of_version_1_that_has_the_file_open_can_no_longer_use_it(tmp_path: Path, verb: str) -> None:
    with version_1(tmp_path / "kv.db") as old:
        old.execute(SET_OF_VERSION_1, ("db", "k", time.time() + 60, "v"))
        backend = SqliteBackend(tmp_path / "kv.db")
        assert await backend.get("db", "k") == "v"
        with pytest.raises(sqlite3.OperationalError, match="no such table: entries"):
            old.execute(*STATEMENTS_OF_VERSION_1[verb])
        assert await backend.get("db", "k") == "v"
        assert backend.usage("") == Usage(1, 1)
        await backend.aclose()


async def test_several_openers_at_once_bring_one_file_up(tmp_path: Path, clock: FakeClock) -> None:
    make_version_1(tmp_path / "kv.db", {("db", f"k{i}"): "v" for i in range(3000)})
    backends = [SqliteBackend(tmp_path / "kv.db", clock=clock) for _ in range(4)]
    assert await asyncio.gather(*(backend.get("db", "k2999") for backend in backends)) == ["v"] * 4
    assert backends[0].usage("") == Usage(3000, 3000)
    await asyncio.gather(*(backend.aclose() for backend in backends))


MIGRATE_SLOWLY = """
import asyncio, sys, time
from aiokv.backends import sqlite_schema
from aiokv.backends.sqlite import SqliteBackend
move = sqlite_schema.move_old_entries
steps = 0
def move_and_say(connection, now):
    global steps
    more = move(connection, now)
    steps += 1
    print(steps, flush=True)
    return more
sqlite_schema.move_old_entries = move_and_say
async def main():
    backend = SqliteBackend(sys.argv[1], clock=lambda: 1e6)
    await backend.get("db", "k")
asyncio.run(main())
"""


@pytest.mark.parametrize("steps", [1, 3])
async def test_kill_9_in_the_middle_loses_no_entry(tmp_path: Path, clock: FakeClock, steps: int) -> None:
    path, number = tmp_path / "kv.db", 10_000
    make_version_1(path, {("db", f"k{i}"): f"v{i}" for i in range(number)})
    process = subprocess.Popen([sys.executable, "-c", MIGRATE_SLOWLY, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while int(process.stdout.readline()) < steps:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert sqlite_schema.has_old_entries(connection), "it was through before the kill"
    backend = SqliteBackend(path, clock=clock)
    missing = [i for i in range(number) if await backend.get("db", f"k{i}") != f"v{i}"]
    assert missing == []
    assert backend.usage("").entries == number
    await backend.aclose()
    assert check(path).problems == ()


async def test_file_grows_little_while_it_is_brought_up(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "kv.db"
    make_version_1(path, {("db", f"k{i}"): "x" * 50_000 for i in range(600)})
    before = path.stat().st_size
    backend = SqliteBackend(path, clock=clock)
    assert await backend.get("db", "k599") is not None
    log_bytes = (tmp_path / "kv.db-wal").stat().st_size
    await backend.aclose()
    assert path.stat().st_size < before * 1.3
    assert log_bytes < before


async def test_spoilt_text_of_version_1_is_moved_as_it_is(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "kv.db"
    with version_1(path) as old:
        old.execute("INSERT INTO entries VALUES (CAST(x'ff' AS TEXT), CAST(x'fe' AS TEXT), 2000000, CAST(x'61fd' AS TEXT))")
        old.execute(SET_OF_VERSION_1, ("db", "k", LIVES, "v"))
    backend = SqliteBackend(path, clock=clock)
    assert await backend.get("db", "k") == "v"
    assert backend.gauges().entries == 2
    await backend.aclose()
