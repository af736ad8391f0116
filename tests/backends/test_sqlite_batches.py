"""Many keys at once in a SQLite file: all or nothing, whatever ends the process, and damage is one key's alone."""

import asyncio
import contextlib
import os
import sqlite3
import threading
from pathlib import Path

import pytest
from child_processes import child, execute
from helpers import FakeClock

from aiokv import CorruptValueError, StorageError, StorageFullError
from aiokv.backends import sqlite_many
from aiokv.backends.base import HostingOptions, Usage
from aiokv.backends.capabilities import MAX_BATCH_KEYS, OMITTED, Entry
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_maintenance import check

MIB = 1024 * 1024
KEYS = [f"k{number}" for number in range(200)]

SET_BATCHES = """
async def main():
    backend = SqliteBackend(sys.argv[1])
    for number in range(1, 1_000_000):
        await backend.set_many("a:db", [Entry(f"k{key}", str(number), 600) for key in range(200)])
        print(number, flush=True)
asyncio.run(main())
"""
SET_AND_DELETE_BATCHES = """
async def main():
    backend = SqliteBackend(sys.argv[1])
    for number in range(1, 1_000_000):
        await backend.set_many("a:db", [Entry(f"k{key}", str(number), 600) for key in range(200)])
        await backend.delete_many("a:db", [f"k{key}" for key in range(200)])
        print(number, flush=True)
asyncio.run(main())
"""


@pytest.mark.parametrize("batches", [1, 7, 40])
async def test_kill_9_leaves_whole_batches_and_every_one_that_was_answered(tmp_path: Path, batches: int) -> None:
    path = tmp_path / "kv.db"
    with child(SET_BATCHES, path) as process:
        while int(process.line()) < batches:
            pass
        answered = max([batches, *(int(line) for line in process.kill()[:-1])])
    backend = SqliteBackend(path)
    values = set(await backend.get_many("a:db", KEYS))
    assert len(values) == 1
    assert int(str(values.pop())) >= answered
    await backend.aclose()
    assert check(path).problems == ()


async def test_other_processes_see_whole_batches_only(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    seen: set[object] = set()
    with child(SET_AND_DELETE_BATCHES, path) as process:
        process.line()
        backend = SqliteBackend(path)
        while len(seen) < 20:
            values = set(await backend.get_many("a:db", KEYS))
            assert len(values) == 1
            assert await backend.count("a:db") in {0, len(KEYS)}
            seen |= values
        await backend.aclose()
    assert None in seen


async def test_batch_with_an_entry_that_cannot_be_stored_leaves_nothing_and_harms_no_other_write(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set("db", "b", "old", 60)
    batch, *others = await asyncio.gather(
        backend.set_many("db", [Entry("a", "v", 60), Entry("b", "v", 60), Entry("c", "\ud800", 60)]),
        backend.set("db", "d", "v", 60),
        backend.set_many("db", [Entry("e", "v", 60)]),
        return_exceptions=True,
    )
    assert isinstance(batch, StorageError)
    assert not batch.maybe_applied
    assert others == [None, [None]]
    assert await backend.get_many("db", list("abcde")) == [None, "old", None, "v", "v"]
    assert backend.usage("") == Usage(5, 3)
    await backend.aclose()


async def test_batches_and_single_writes_of_one_turn_keep_their_order(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.get("db", "opens the file")
    await asyncio.gather(
        backend.set("db", "k", "1", 60),
        backend.set_many("db", [Entry("k", "2", 60), Entry("other", "2", 60)]),
        backend.set("db", "k", "3", 60),
        backend.delete_many("db", ["k", "other"]),
        backend.set_many("db", [Entry("k", "4", 60), Entry("k", "x" * 5000, 60), Entry("k", "5", 60)]),
    )
    assert await backend.get_many("db", ["k", "other", "k"]) == ["5", None, "5"]
    assert backend.gauges().committed_writes == 9
    await backend.aclose()


async def test_values_of_every_size_come_back_in_the_order_of_the_keys(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock)
    sizes = [0, 1, 1023, 1024, 1025, 4095, 4096, 4097, 100_000, 1_500_000]
    values = {f"k{size}": "é" * (size // 2) + "x" * (size % 2) for size in sizes}
    await backend.set_many("db", [Entry(key, value, 60) for key, value in values.items()])
    await backend.set("db", "expires", "v", 60)
    keys = [*values, "absent", *reversed(values)]
    assert await backend.get_many("db", keys) == [values.get(key) for key in keys]
    clock.advance(60)
    assert set(await backend.get_many("db", keys)) == {None}
    await backend.aclose()


@pytest.mark.parametrize("count", [1, 2, 4, 5, 16, 17, 63, 64, 65, 129, 257, 513, 999, 1000])
async def test_batch_of_any_number_of_keys_is_read(tmp_path: Path, count: int) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    keys = [f"k{number}" for number in range(count)]
    await backend.set_many("db", [Entry(key, key, 60) for key in keys])
    assert await backend.get_many("db", keys) == keys
    assert await backend.get_many("db", [*keys[:-1], "absent"]) == [*keys[:-1], None]
    await backend.aclose()


async def test_large_answers_are_read_in_another_thread_and_small_ones_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[bool] = []
    read_many = sqlite_many.read_many

    def note(*arguments: object) -> object:
        rows = read_many(*arguments)  # type: ignore[arg-type]
        if rows is not None:
            threads.append(threading.current_thread() is threading.main_thread())
        return rows

    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set_many("db", [Entry(f"k{number}", "x" * 300_000, 60) for number in range(20)])
    monkeypatch.setattr(sqlite_many, "read_many", note)
    assert await backend.get_many("db", ["k0", "k1"]) == ["x" * 300_000] * 2
    assert await backend.get_many("db", [f"k{number}" for number in range(20)]) == ["x" * 300_000] * 20
    assert threads == [True, False]
    await backend.aclose()


async def test_what_does_not_fit_into_the_answer_is_omitted_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: list[str] = []
    read_many = sqlite_many.read_many

    def note(cursor: sqlite3.Cursor, *arguments: object) -> object:
        statements.clear()
        cursor.connection.set_trace_callback(statements.append)
        return read_many(cursor, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sqlite_many, "read_many", note)
    backend = SqliteBackend(tmp_path / "kv.db")
    for start in (0, 4, 8):
        await backend.set_many("db", [Entry(f"k{number:02}", "x" * 1_900_000, 60) for number in range(start, start + 4)])
    await backend.set("db", "small", "v", 60)
    keys = [f"k{number:02}" for number in range(12)] + ["small", "absent"]
    values = await backend.get_many("db", keys)
    assert [len(value) if isinstance(value, str) else value for value in values] == [1_900_000] * 4 + [OMITTED] * 9 + [None]
    assert sum(statement.startswith("SELECT value FROM") for statement in statements) == 4
    assert await backend.get_many("db", ["small"]) == ["v"]
    await backend.aclose()


@pytest.mark.parametrize("spoil", ["checksum = checksum + 1", "value = x'00'", "value = x''", "size_bytes = 0, value = x'ff'"])
@pytest.mark.parametrize("size", [10, 100_000])
async def test_damaged_value_is_the_error_of_its_key_alone(tmp_path: Path, spoil: str, size: int) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.set_many("db", [Entry(key, "x" * size, 60) for key in "abc"])
    execute(path, f"UPDATE entries_v2 SET {spoil} WHERE key = 'b'")
    first, error, last = await backend.get_many("db", ["a", "b", "c"])
    assert (first, last) == ("x" * size, "x" * size)
    assert isinstance(error, CorruptValueError)
    assert (error.key, error.db_name) == ("b", "db")
    assert backend.gauges().failures == 1
    assert await backend.set_many("db", [Entry("b", "new", 60)]) == [None]
    assert await backend.get_many("db", ["b"]) == ["new"]
    await backend.aclose()


async def test_batches_count_for_their_account(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=0.02)
    await backend.set_many("a:db", [Entry(f"k{number}", "é" * number, 60) for number in range(100)])
    await backend.set_many("a:db", [Entry(f"k{number}", "", 120) for number in range(50, 100)])
    assert backend.usage("a") == Usage(2 * sum(range(50)), 100)
    await backend.delete_many("a:db", [f"k{number}" for number in range(10)])
    assert backend.usage("a") == Usage(2 * sum(range(10, 50)), 90)
    clock.advance(60)
    async with asyncio.timeout(10):
        while backend.usage("a").entries > 50:
            await asyncio.sleep(0.01)
    assert backend.gauges().expired == 40
    await backend.aclose()


async def test_batch_is_stored_whole_or_refused_at_the_floor_of_the_disk(small_disk: Path, clock: FakeClock) -> None:
    hosting = HostingOptions(min_free_bytes=2 * MIB, ballast_bytes=MIB)
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=hosting)
    batches = [[Entry(f"{batch}-{number}", "x" * 100_000, 60) for number in range(10)] for batch in range(30)]
    results = [(await asyncio.gather(backend.set_many("a:db", batch), return_exceptions=True))[0] for batch in batches]
    stored = results.count([None] * 10)
    assert isinstance(results[stored], StorageFullError)
    assert "floor of 2,097,152 free bytes" in str(results[stored])
    assert 3 < stored < 15
    assert backend.usage("a").entries == await backend.count("a:db") == 10 * stored
    for batch in batches[:stored]:
        assert await backend.delete_many("a:db", [entry.key for entry in batch]) == [None] * 10
    assert backend.usage("a").entries == 0
    await backend.aclose()
    assert check(small_disk / "kv.db").problems == ()


async def test_batch_on_a_disk_without_a_free_byte_leaves_nothing_and_deletes_go_on(small_disk: Path) -> None:
    path = small_disk / "kv.db"
    backend = SqliteBackend(path, hosting=HostingOptions(ballast_bytes=MIB))
    await backend.set_many("a:db", [Entry(f"k{number}", "x" * 10_000, 60) for number in range(100)])
    with (small_disk / "other").open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), b"\0" * 4096)
    with pytest.raises(StorageFullError) as raised:
        await backend.set_many("a:db", [Entry(f"new{number}", "x" * 30_000, 60) for number in range(100)])
    assert not raised.value.maybe_applied
    assert await backend.count("a:db", "new") == 0
    await backend.delete_many("a:db", [f"k{number}" for number in range(100)])
    assert await backend.count("a:db") == 0
    await backend.aclose()
    assert check(path).problems == ()


async def test_batch_waits_for_a_reader_that_cannot_read_now(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.set("db", "k", "v", 60)

    class Busy:
        def __init__(self, cursor: sqlite3.Cursor) -> None:
            self.connection = cursor.connection

        def execute(self, *_: object) -> None:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error

    assert backend._cursor is not None
    backend._cursor = Busy(backend._cursor)  # type: ignore[assignment]
    assert await backend.get_many("db", ["k", "absent"]) == ["v", None]
    assert [info.key for info in (await backend.scan("db")).infos] == ["k"]
    await backend.aclose()


async def test_replaced_file_is_an_error_and_nothing_is_made_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.set("db", "k", "v", 60)
    path.unlink()
    with pytest.raises(StorageError, match="was deleted or replaced"):
        await backend.set_many("db", [Entry("k", "v", 60)])
    with pytest.raises(StorageError, match="was deleted or replaced"):
        await backend.count("db")
    assert not path.exists()
    await backend.aclose()


@pytest.mark.slow
async def test_a_hundred_thousand_keys_are_stored_listed_and_deleted_by_batches(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    keys = [f"k{number * 7919 % 100_000:06}" for number in range(100_000)]
    parts = [keys[start : start + MAX_BATCH_KEYS] for start in range(0, len(keys), MAX_BATCH_KEYS)]
    await asyncio.gather(*(backend.set_many("db", [Entry(key, key, 600) for key in part]) for part in parts))
    assert [await backend.get_many("db", part) for part in parts] == parts
    listed: list[str] = []
    cursor = None
    while True:
        page = await backend.scan("db", cursor=cursor)
        listed += [info.key for info in page.infos]
        cursor = page.cursor
        if cursor is None:
            break
    assert listed == sorted(keys)
    assert await backend.count("db") == len(keys)
    assert await backend.count("db", "k09") == 10_000
    for part in parts[:10]:
        await backend.delete_many("db", part)
    assert await backend.count("db") == 90_000
    left = await backend.count("db", "k09")
    assert sum([(await backend.clear("db", "k09")).deleted for _ in range(11)]) == left > 8000
    assert backend.usage("").entries == await backend.count("db") == 90_000 - left
    await backend.aclose()
