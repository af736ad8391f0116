"""Watches of a SQLite file: told by whichever process wrote, without a gap that is not named, and at no cost where none is."""

import asyncio
import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest
from child_processes import child, execute
from helpers import FakeClock

from aiokv import ConfigurationError, StorageError, StoreClosedError
from aiokv.backends import sqlite_changes, sqlite_schema
from aiokv.backends.base import HostingOptions
from aiokv.backends.capabilities import Entry
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_maintenance import backup, check
from aiokv.backends.watching import HEARTBEAT_SECONDS, Alive, Changed, Lost, Watch, WatchEvent
from aiokv.testing import movable_clock

SET_UNTIL_TOLD = """
async def main():
    backend = SqliteBackend(sys.argv[1])
    number, stop = 0, asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    while not stop.done():
        number += 1
        await backend.set("db", "n", str(number), 600)
        if number == 20:
            print("begun", flush=True)
    await backend.aclose()
    print(number)
asyncio.run(main())
"""
WATCH = """
async def main():
    backend = SqliteBackend(sys.argv[1])
    async for event in backend.watch("db"):
        print(event, flush=True)
asyncio.run(main())
"""
TRIGGERS = "SELECT count(*) FROM sqlite_schema WHERE type = 'trigger' AND name LIKE 'change_%'"
# As version 2 had it before there were watches.
OLD_SET = """
INSERT INTO entries_v2 (db_name, key, expires_at, checksum, size_bytes, value) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (db_name, key) DO UPDATE SET
    expires_at = excluded.expires_at, checksum = excluded.checksum, size_bytes = excluded.size_bytes, value = excluded.value
"""
OLD_DELETE = "DELETE FROM entries_v2 WHERE db_name = ? AND key = ?"


async def begun(watch: Watch) -> Watch:
    async with asyncio.timeout(15):
        assert await anext(watch) == Lost()
    return watch


async def told(watch: Watch, number: int = 1) -> list[WatchEvent]:
    """Return the next events but heartbeats."""
    events: list[WatchEvent] = []
    async with asyncio.timeout(15):
        while len(events) < number:
            event = await anext(watch)
            if not isinstance(event, Alive):
                events.append(event)
    return events


async def told_until(watch: Watch, key: str) -> list[WatchEvent]:
    events: list[WatchEvent] = []
    while not events or events[-1] != Changed(key):
        events += await told(watch)
    return events


async def test_change_by_another_process_is_told_soon(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    watch = await begun(backend.watch("db"))
    delays = []
    for number in range(20):
        await asyncio.sleep(0.007)
        execute(path, OLD_SET, "db", f"k{number}", 2e9, 0, 0, b"")
        committed = time.monotonic()
        assert await told(watch) == [Changed(f"k{number}")]
        delays.append(time.monotonic() - committed)
    # A machine that is busy is late sometimes, never always.
    assert sorted(delays)[len(delays) // 4] < 0.05
    await backend.aclose()


async def test_process_of_the_version_before_is_told_of_too_and_disturbs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.set("db", "k", "v", 60)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        # Its statements were prepared before the log was there.
        old.execute(OLD_SET, ("db", "k", 2e9, 0, 0, b""))
        watch = await begun(backend.watch("db"))
        old.execute(OLD_SET, ("db", "k", 2e9, 0, 0, b""))
        old.execute(OLD_SET, ("db", "new", 2e9, 0, 0, b""))
        old.execute(OLD_DELETE, ("db", "k"))
        assert await told(watch, 3) == [Changed("k"), Changed("new"), Changed("k", is_delete=True)]
    assert backend.usage("").entries == 1
    await backend.aclose()


@pytest.mark.parametrize("watchers", [1, 3])
async def test_no_change_is_missed_between_the_first_read_and_the_changes(tmp_path: Path, watchers: int) -> None:
    path = tmp_path / "kv.db"
    backends = [SqliteBackend(path) for _ in range(watchers)]

    async def follow(backend: SqliteBackend, delay: float) -> tuple[Watch, int]:
        await asyncio.sleep(delay)
        watch = await begun(backend.watch("db"))
        first = int(await backend.get("db", "n") or "0")
        assert await told(watch, 50) == [Changed("n")] * 50
        return watch, first + 50

    with child(SET_UNTIL_TOLD, path) as process:
        process.line()
        followed = await asyncio.gather(*(follow(backend, 0.05 * place) for place, backend in enumerate(backends)))
        process.go()
        (number,) = await asyncio.to_thread(process.join)
    await backends[0].set("db", "end", "v", 60)
    for watch, counted in followed:
        events = await told_until(watch, "end")
        assert set(events) <= {Changed("n"), Changed("end")}
        assert counted + len(events) - 1 >= int(number)
    await asyncio.gather(*(backend.aclose() for backend in backends))


async def test_nothing_is_kept_in_a_file_that_nobody_watches(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, sweep_interval_seconds=0.02)
    await backend.set_many("db", [Entry("k", "v", 60)])
    assert execute(path, "SELECT name FROM sqlite_schema WHERE name IN ('changes', 'watchers') OR name LIKE 'change_%'") == []
    watch = await begun(backend.watch("db"))
    await backend.set("db", "k", "v", 60)
    await backend.set("other", "k", "v", 60)
    await told(watch)
    assert execute(path, "SELECT DISTINCT db_name FROM changes") in ([("db",)], [])
    assert execute(path, TRIGGERS) == [(3,)]
    await watch.aclose()
    async with asyncio.timeout(10):
        while execute(path, TRIGGERS) != [(0,)]:
            await asyncio.sleep(0.01)
    await backend.set("db", "k", "v", 60)
    assert execute(path, "SELECT count(*) FROM changes") == execute(path, "SELECT count(*) FROM watchers") == [(0,)]
    # And it begins anew.
    watch = await begun(backend.watch("db"))
    await backend.set("db", "again", "v", 60)
    assert await told(watch) == [Changed("again")]
    await backend.aclose()


async def test_closed_backend_leaves_no_watcher_behind(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    watches = [await begun(backend.watch(name)) for name in ("db", "db", "other")]
    await backend.aclose()
    assert [event for watch in watches async for event in watch] == []
    assert execute(path, "SELECT count(*) FROM watchers") == [(0,)]


async def test_killed_watcher_is_forgotten_at_the_end_of_its_lease(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    with child(WATCH, path) as process:
        assert process.line() == "Lost()"
        process.kill()
    backend = SqliteBackend(path, sweep_interval_seconds=0.02)
    await backend.set("db", "k", "v", 60)
    assert execute(path, "SELECT count(*) FROM watchers") == [(1,)]
    assert execute(path, "SELECT count(*) FROM changes") == [(1,)]
    execute(path, "UPDATE watchers SET lease_until = lease_until - 40")
    async with asyncio.timeout(10):
        while execute(path, TRIGGERS) != [(0,)]:
            await asyncio.sleep(0.01)
    assert execute(path, "SELECT count(*) FROM changes") == [(0,)]
    await backend.aclose()


@pytest.mark.parametrize("statement", ["DELETE FROM watchers", "UPDATE watchers SET lease_until = 0"])
async def test_watcher_that_was_taken_for_dead_is_told_of_a_loss_and_goes_on(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, sweep_interval_seconds=0.02)
    watch = await begun(backend.watch("db"))
    execute(path, statement)
    assert await told(watch) == [Lost()]
    # Once more when it is registered again: changes between the two may be missing.
    assert await told(watch) == [Lost()]
    await backend.set("db", "k", "v", 60)
    assert await told(watch) == [Changed("k")]
    await backend.aclose()


async def test_lease_that_was_made_anew_by_a_renewal_is_a_loss(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    watch = await begun(backend.watch("db"))
    watcher = backend._watcher
    assert watcher is not None
    # All in one step of the loop: what a process sees that was stopped for longer than its lease.
    execute(path, "DELETE FROM watchers")
    execute(path, OLD_SET, "db", "missed", 2e9, 0, 0, b"")
    watcher._next_renewal = 0.0
    watcher._next_alive = 0.0
    assert await anext(watch) == Lost()
    await backend.aclose()


async def test_watcher_that_falls_behind_the_log_is_told_of_a_loss_and_the_log_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    watch = await begun(backend.watch("db"))
    number = sqlite_changes.MAX_LOGGED_CHANGES + 500
    # In the loop's own thread, so that nothing is read meanwhile.
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN")
        other.executemany(OLD_SET, [("db", f"k{n}", 2e9, 0, 0, b"") for n in range(number)])
        other.execute("COMMIT")
    assert execute(path, "SELECT count(*) FROM changes") == [(sqlite_changes.MAX_LOGGED_CHANGES,)]
    assert await told(watch) == [Lost()]
    await backend.set("db", "later", "v", 60)
    assert (await told_until(watch, "later"))[-1] == Changed("later")
    await backend.aclose()


async def test_log_keeps_only_what_a_watcher_has_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokv.backends.sqlite_watch._RENEWAL_SECONDS", 0.02)
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, sweep_interval_seconds=0.02)
    watch = await begun(backend.watch("db"))
    await backend.set_many("db", [Entry(f"k{number}", "v", 60) for number in range(100)])
    assert len(await told(watch, 100)) == 100
    async with asyncio.timeout(10):
        while execute(path, "SELECT count(*) FROM changes") != [(0,)]:
            await asyncio.sleep(0.01)
    await backend.set("db", "later", "v", 60)
    assert await told(watch) == [Changed("later")]
    await backend.aclose()


async def test_idle_watch_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, sweep_interval_seconds=0.01)
    watch = await begun(backend.watch("db"))
    await backend.set("db", "k", "v", 60)
    await told(watch)
    with contextlib.closing(sqlite3.connect(path)) as other:
        await asyncio.sleep(0.1)
        before = other.execute("PRAGMA data_version").fetchone()
        await asyncio.sleep(0.3)
        assert other.execute("PRAGMA data_version").fetchone() == before
    await backend.aclose()


async def test_expiry_is_no_change_and_clearing_is_one_for_each_key(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=0.02)
    await backend.set_many("db", [Entry(f"k{number}", "v", 60) for number in range(50)])
    watch = await begun(backend.watch("db"))
    clock.advance(60)
    async with asyncio.timeout(10):
        while backend.usage("").entries:
            await asyncio.sleep(0.01)
    await backend.set_many("db", [Entry(key, "v", 60) for key in "ab"])
    assert (await backend.clear("db")).deleted == 2
    expected = [Changed("a"), Changed("b"), Changed("a", is_delete=True), Changed("b", is_delete=True)]
    assert await told(watch, 4) == expected
    await backend.aclose()


async def test_clock_that_a_test_moves_breaks_no_watch(tmp_path: Path) -> None:
    with movable_clock() as moved:
        backend = SqliteBackend(tmp_path / "kv.db", sweep_interval_seconds=0.02)
        watch = await begun(backend.watch("db"))
        for step in (3600, 86_400, 10):
            moved.advance(step)
            await asyncio.sleep(0.1)
            await backend.set("db", f"k{step}", "v", 60)
            assert await told(watch) == [Changed(f"k{step}")]
        await backend.aclose()


async def test_many_watches_of_one_backend_share_one_task_and_each_has_its_namespace(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    names = [f"db{number % 10}" for number in range(50)]
    watches = [backend.watch(name) for name in names]
    for watch in watches:
        await begun(watch)
    assert sum("watch" in task.get_name() for task in asyncio.all_tasks()) == 1
    for number in range(10):
        await backend.set(f"db{number}", f"k{number}", "v", 60)
    for name, watch in zip(names, watches, strict=True):
        assert await told(watch) == [Changed(f"k{name[2:]}")]
        await watch.aclose()
    await asyncio.sleep(0.1)
    assert sum("watch" in task.get_name() for task in asyncio.all_tasks()) == 0
    await backend.aclose()


async def test_heartbeats_come_only_while_the_file_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiokv.backends.sqlite_watch.HEARTBEAT_SECONDS", 0.05)
    backend = SqliteBackend(tmp_path / "kv.db")
    watch = await begun(backend.watch("db"))
    async with asyncio.timeout(HEARTBEAT_SECONDS * 2):
        assert await anext(watch) == Alive()
    cursor, backend._cursor = backend._cursor, None
    await asyncio.sleep(0.03)
    while watch._queued:
        await anext(watch)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await anext(watch)
    backend._cursor = cursor
    async with asyncio.timeout(5):
        assert await anext(watch) == Alive()
    await backend.aclose()


@pytest.mark.parametrize("replace", [False, True])
async def test_file_that_vanishes_or_is_replaced_ends_the_watch_after_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replace: bool
) -> None:
    monkeypatch.setattr("aiokv.backends.sqlite_watch.HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    watch = await begun(backend.watch("db"))
    path.unlink()
    if replace:
        path.write_bytes(b"")
    assert await told(watch) == [Lost()]
    with pytest.raises(StorageError, match="was deleted or replaced"):
        await anext(watch)
    with pytest.raises(StorageError, match="was deleted or replaced"):
        await anext(backend.watch("db"))
    await backend.aclose()


async def test_watch_of_a_file_that_cannot_be_opened_or_is_closed_fails(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "absent" / "kv.db")
    with pytest.raises(ConfigurationError):
        await anext(backend.watch("db"))
    await backend.aclose()
    with pytest.raises(StoreClosedError):
        await anext(backend.watch("db"))


async def test_watch_goes_on_where_a_renewal_fails_and_a_new_one_says_why_it_cannot_begin(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    watch = await begun(backend.watch("db"))
    execute(path, "CREATE TRIGGER no_more BEFORE INSERT ON watchers BEGIN SELECT raise(ABORT, 'no more'); END")
    with pytest.raises(StorageError):
        await anext(backend.watch("other"))
    await backend.set("db", "k", "v", 60)
    assert await told(watch) == [Changed("k")]
    execute(path, "DROP TRIGGER no_more")
    await asyncio.sleep(1.1)
    other = await begun(backend.watch("other"))
    await backend.set("other", "k", "v", 60)
    assert await told(other) == [Changed("k")]
    await backend.aclose()


async def test_watched_file_is_backed_up_and_checked_and_its_copy_is_no_longer_watched(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    watch = await begun(backend.watch("db"))
    await backend.set_many("db", [Entry(f"k{number}", "v", 600) for number in range(50)])
    backup(tmp_path / "kv.db", tmp_path / "copy.db")
    assert check(tmp_path / "kv.db").problems == ()
    assert check(tmp_path / "kv.db").schema_version == sqlite_schema.SCHEMA_VERSION == 2
    await backend.set("db", "later", "v", 60)
    assert (await told(watch, 51))[-1] == Changed("later")
    await backend.aclose()
    copy = SqliteBackend(tmp_path / "copy.db", sweep_interval_seconds=0.02, hosting=HostingOptions(quick_check=True))
    assert await copy.get("db", "k49") == "v"
    watch = await begun(copy.watch("db"))
    await copy.set("db", "new", "v", 60)
    assert await told(watch) == [Changed("new")]
    await copy.aclose()


async def test_deletes_on_a_full_disk_are_told(small_disk: Path) -> None:
    path = small_disk / "kv.db"
    backend = SqliteBackend(path, hosting=HostingOptions(ballast_bytes=1024 * 1024))
    watch = await begun(backend.watch("db"))
    await backend.set_many("db", [Entry(f"k{number:02}", "x" * 50_000, 600) for number in range(60)])
    await told(watch, 60)
    with (small_disk / "other").open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), b"\0" * 4096)
    for number in range(60):
        await backend.delete("db", f"k{number:02}")
    assert await told(watch, 60) == [Changed(f"k{number:02}", is_delete=True) for number in range(60)]
    await backend.aclose()
    assert check(path).problems == ()
