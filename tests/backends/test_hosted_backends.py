"""What a server asks of each backend that it can host: usage, health, figures, and reads that need no waiting."""

import asyncio
import contextlib
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from helpers import FakeClock, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from aiokv.backends.base import Backend, HostedBackend, HostingOptions, ImmediateBackend, Usage, WouldWaitError, account_of
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.sqlite import SqliteBackend
from aiokv.errors import CorruptValueError


@pytest.fixture(params=["memory", "sqlite"])
async def backend(request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock) -> AsyncGenerator[Backend]:
    opened: Backend
    if request.param == "memory":
        opened = MemoryBackend(clock)
    else:
        opened = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=0.01)
    await opened.get("db", "opens the file")
    yield opened
    await opened.aclose()


def hosted(backend: Backend) -> HostedBackend:
    assert isinstance(backend, HostedBackend)
    return backend


async def test_value_can_be_read_in_the_same_step(backend: Backend, clock: FakeClock) -> None:
    assert isinstance(backend, ImmediateBackend)
    assert backend.get_now("db", "k") is None
    await backend.set("db", "k", "😀", 60)
    assert backend.get_now("db", "k") == "😀"
    assert backend.get_now("other", "k") is None
    clock.advance(60)
    assert backend.get_now("db", "k") is None


async def test_usage_is_of_the_account_before_the_first_colon(backend: Backend) -> None:
    for db_name in ("one:a", "one:b", "one:a:b", "two:a", "one", ":a"):
        await backend.set(db_name, "k", "12345", 60)
    assert [hosted(backend).usage(account) for account in ("one", "two", "", "three")] == [
        Usage(15, 3),
        Usage(5, 1),
        Usage(10, 2),
        Usage(0, 0),
    ]


async def test_usage_counts_bytes_and_not_characters(backend: Backend) -> None:
    await backend.set("a:db", "k", "aé€😀\0", 60)
    assert hosted(backend).usage("a") == Usage(11, 1)


async def test_overwritten_and_deleted_entries_leave_the_usage(backend: Backend) -> None:
    await backend.set("a:db", "k", "x" * 100, 60)
    await backend.set("a:db", "k", "y" * 7, 60)
    assert hosted(backend).usage("a") == Usage(7, 1)
    await backend.set("a:db", "k", "z" * 7, 60)
    await backend.set("a:db", "l", "", 60)
    assert hosted(backend).usage("a") == Usage(7, 2)
    await backend.delete("a:db", "k")
    await backend.delete("a:db", "k")
    await backend.delete("a:db", "l")
    assert hosted(backend).usage("a") == Usage(0, 0)


async def test_expired_entries_leave_the_usage_when_they_are_swept(backend: Backend, clock: FakeClock) -> None:
    await backend.set("a:db", "k", "12345", 60)
    await backend.set("a:db", "stays", "12345", 3600)
    clock.advance(60)
    await backend.set("b:db", "sweeps", "v", 60)
    await asyncio.to_thread(wait_until, lambda: hosted(backend).gauges().expired == 1)
    assert hosted(backend).usage("a") == Usage(5, 1)


async def test_usage_is_exact_after_any_concurrent_writes(backend: Backend) -> None:
    for step in range(5):
        await asyncio.gather(
            *(
                backend.delete(f"a{i % 3}:db", f"k{i % 17}")
                if i % 5 == 0
                else backend.set(f"a{i % 3}:db", f"k{i % 17}", "é" * (i * step % 40), 60)
                for i in range(200)
            )
        )
    left: dict[str, list[int]] = {}
    for account in range(3):
        values = [await backend.get(f"a{account}:db", f"k{i}") for i in range(17)]
        left[f"a{account}"] = [len(value.encode()) for value in values if value is not None]
    assert {account: hosted(backend).usage(account) for account in left} == {
        account: Usage(sum(sizes), len(sizes)) for account, sizes in left.items()
    }
    assert hosted(backend).gauges().entries == sum(map(len, left.values()))
    assert hosted(backend).gauges().value_bytes == sum(map(sum, left.values()))


async def test_backend_that_works_is_well(backend: Backend) -> None:
    assert await hosted(backend).health() is None


async def test_account_of_a_namespace_is_what_the_file_takes_it_for(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")

    @given(st.text(st.sampled_from(":a\0é "), max_size=6))
    @settings(max_examples=60)
    def agree(db_name: str) -> None:
        if "\0" in account_of(db_name):
            # SQLite's text functions end at it, and the store refuses such names.
            return
        accounts.add(account_of(db_name))
        names.add(db_name)

    accounts: set[str] = set()
    names: set[str] = set()
    agree()
    await asyncio.gather(*(backend.set(name, "k", "v", 60) for name in names))
    assert {account: backend.usage(account).entries for account in accounts} == {
        account: sum(account_of(name) == account for name in names) for account in accounts
    }
    await backend.aclose()


async def test_before_the_file_is_open_nothing_is_counted_and_reads_must_wait(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    with pytest.raises(WouldWaitError):
        backend.get_now("db", "k")
    assert (backend.usage(""), backend.gauges().entries) == (Usage(0, 0), 0)
    assert await backend.get("db", "k") is None
    assert backend.get_now("db", "k") is None
    await backend.aclose()
    with pytest.raises(WouldWaitError):
        backend.get_now("db", "k")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 32, 45])
async def test_values_read_together_are_those_that_are_read_one_by_one(tmp_path: Path, clock: FakeClock, count: int) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock)
    await backend.set("db", "large", "x" * 65_537, 120)
    await backend.set("db", "damaged", "v", 120)
    await backend.set("db", "expired", "v", 60)
    await backend.set("db", "whole", "é😀\0", 120)
    await backend.set("one:db", "whole", "another", 120)
    with contextlib.closing(sqlite3.connect(tmp_path / "kv.db")) as connection, connection:
        connection.execute("UPDATE entries_v2 SET value = x'00' WHERE key = 'damaged'")
    clock.advance(60)
    kinds = [("db", "whole"), ("db", "large"), ("db", "absent"), ("db", "damaged"), ("db", "expired"), ("one:db", "whole")]
    names = [kinds[at % len(kinds)] for at in range(count)]
    expected = ["é😀\0", WouldWaitError, None, CorruptValueError, None, "another"]
    found = backend.get_all_now(names)
    assert [type(value) if isinstance(value, Exception) else value for value in found] == [
        expected[at % len(kinds)] for at in range(count)
    ]
    await backend.aclose()
    with pytest.raises(WouldWaitError):
        backend.get_all_now(names)


async def test_read_that_must_wait_for_another_process_says_so_and_get_waits(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.set("db", "k", "v", 60)
    cursor = backend._cursor

    class Busy:
        def execute(self, *_: object) -> None:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY_RECOVERY
            raise error

    backend._cursor = Busy()  # type: ignore[assignment]
    with pytest.raises(WouldWaitError):
        backend.get_now("db", "k")
    assert await backend.get("db", "k") == "v"
    backend._cursor = cursor
    await backend.aclose()


async def test_read_that_is_over_holds_nothing_back(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set("db", "k0", "v", 60)
    for key in ("k0", "absent"):
        await backend.get("db", key)
        backend.usage("")
        backend.gauges()
        await backend.set("db", "k1", "v", 60)
        other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
        # Busy, pages in the log, pages written: a reader in the middle would keep the log from being emptied.
        assert other.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        other.close()
    await backend.aclose()


async def test_usage_is_right_over_several_processes(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from aiokv.backends.sqlite import SqliteBackend
from aiokv.errors import CorruptValueError
async def main():
    backend = SqliteBackend(sys.argv[1])
    for _ in range(5):
        await asyncio.gather(*(backend.set("a:db", f"{sys.argv[2]}-{i}", "x" * i, 60) for i in range(100)))
        await asyncio.gather(*(backend.set("a:db", f"shared-{i}", "x" * i, 60) for i in range(100)))
        await asyncio.gather(*(backend.delete("a:db", f"{sys.argv[2]}-{i}") for i in range(50, 100)))
    await backend.aclose()
asyncio.run(main())
"""
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.get("db", "k")
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), str(i)]) for i in range(3)]
    assert await asyncio.to_thread(lambda: [process.wait() for process in processes]) == [0] * 3
    assert backend.usage("a") == Usage(3 * sum(range(50)) + sum(range(100)), 3 * 50 + 100)
    await backend.aclose()


@pytest.mark.parametrize("hosting", [None, HostingOptions()], ids=["own", "hosted"])
async def test_only_a_server_reads_through_a_memory_map(tmp_path: Path, hosting: HostingOptions | None) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", hosting=hosting)
    await backend.set("db", "k", "v", 60)
    assert await backend.get("db", "k") == "v"
    assert backend._cursor is not None
    # A page that the disk cannot give ends a process with a map, which a program of somebody else's must not be exposed to.
    assert (backend._cursor.execute("PRAGMA mmap_size").fetchone()[0] > 0) == (hosting is not None)
    await backend.aclose()


async def test_figures_tell_of_groups_and_of_the_log(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await asyncio.gather(*(backend.set("db", f"k{i}", "v" * 10, 60) for i in range(300)))
    gauges = backend.gauges()
    assert (gauges.entries, gauges.value_bytes, gauges.committed_writes, gauges.failures) == (300, 3000, 300, 0)
    assert gauges.commits is not None
    assert 0 < gauges.commits < 100
    assert gauges.wal_bytes == (tmp_path / "kv.db-wal").stat().st_size > 0
    assert gauges.disk_free_bytes
    await backend.aclose()


async def test_account_that_stores_nothing_any_more_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, sweep_interval_seconds=0.01)
    await backend.set("a:db", "k", "v", 60)
    await backend.delete("a:db", "k")

    def accounts() -> int:
        connection = sqlite3.connect(path)
        try:
            number: int = connection.execute("SELECT count(*) FROM usage").fetchone()[0]
            return number
        finally:
            connection.close()

    await asyncio.to_thread(wait_until, lambda: accounts() == 0)
    await backend.aclose()
