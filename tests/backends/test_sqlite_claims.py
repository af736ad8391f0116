"""Claims in a SQLite file: one owner at a time over all processes, counted, swept, and gone with their time."""

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from child_processes import child, execute
from helpers import FakeClock, wait_until

from aiokv import StorageFullError
from aiokv.backends.base import HostingOptions, Usage
from aiokv.backends.capabilities import Entry
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_maintenance import backup, check
from aiokv.testing import movable_clock

CLAIM_ALL = """
async def main():
    backend = SqliteBackend(sys.argv[1])
    await backend.get("db", "opens the file")
    print("ready", flush=True)
    sys.stdin.readline()
    for key in range(150):
        if (await backend.claim("a:db", f"k{key}", sys.argv[2], 600)).is_held:
            print(key, flush=True)
    await backend.aclose()
asyncio.run(main())
"""
HOLD_IN_TURNS = """
async def main():
    backend = SqliteBackend(sys.argv[1])
    for _ in range(25):
        while not (await backend.claim("db", "k", sys.argv[2], 600)).is_held:
            await asyncio.sleep(0.002)
        number = int(await backend.get("db", "counter") or "0")
        await asyncio.sleep(0.001)
        await backend.set("db", "counter", str(number + 1), 600)
        assert await backend.release("db", "k", sys.argv[2])
    await backend.aclose()
asyncio.run(main())
"""
HOLD = """
async def main():
    backend = SqliteBackend(sys.argv[1])
    print((await backend.claim("db", "k", "child", 2)).is_held, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_each_claim_goes_to_one_of_several_processes(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(child(CLAIM_ALL, tmp_path / "kv.db", f"owner-{number}")) for number in range(3)]
        for process in children:
            assert process.line() == "ready"
        for process in children:
            process.go()
        won = [process.join() for process in children]
    assert sorted(int(key) for keys in won for key in keys) == list(range(150))


async def test_processes_that_hold_a_claim_in_turns_lose_no_update(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        for process in [stack.enter_context(child(HOLD_IN_TURNS, tmp_path / "kv.db", f"owner-{n}")) for n in range(3)]:
            process.join()
    backend = SqliteBackend(tmp_path / "kv.db")
    assert await backend.get("db", "counter") == "75"
    await backend.aclose()


async def test_claim_of_a_killed_process_lasts_as_long_as_it_asked(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    with child(HOLD, tmp_path / "kv.db") as process:
        assert process.line() == "True"
        claimed_at = time.time()
        process.kill()
        while not (outcome := await backend.claim("db", "k", "me", 30)).is_held:
            assert 0 < outcome.seconds_left <= 2
            await asyncio.sleep(0.02)
    assert 1 < time.time() - claimed_at < 10
    await backend.aclose()


async def test_claims_count_as_entries_of_their_account_until_they_are_swept(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=0.02)
    await backend.set("a:db", "k", "v", 600)
    for number in range(10):
        await backend.claim("a:db", f"k{number}", "me", 30)
    await backend.claim("a:db", "k9", "somebody-else", 30)
    await backend.claim("db", "k", "me", 30)
    assert (backend.usage("a").entries, backend.usage("").entries) == (11, 1)
    await backend.release("a:db", "k0", "me")
    assert backend.usage("a").entries == 10
    clock.advance(30)
    async with asyncio.timeout(10):
        while backend.usage("a").entries > 1:
            await asyncio.sleep(0.01)
    assert backend.usage("a") == Usage(1, 1)
    await backend.aclose()
    assert check(tmp_path / "kv.db").problems == ()


async def test_claims_survive_the_process_and_go_into_backups(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock)
    await backend.claim("db", "k", "me", 30)
    backup(tmp_path / "kv.db", tmp_path / "copy.db")
    await backend.aclose()
    for name in ("kv.db", "copy.db"):
        backend = SqliteBackend(tmp_path / name, clock=clock)
        assert (await backend.claim("db", "k", "you", 30))[:2] == (False, 30)
        assert (await backend.claim("db", "k", "me", 10))[:2] == (True, 10)
        await backend.aclose()


async def test_claim_that_is_longer_ended_than_swept_is_free(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=3600)
    await backend.claim("db", "k", "me", 30)
    clock.advance(30)
    assert not await backend.release("db", "k", "me")
    assert (await backend.claim("db", "k", "you", 30)).is_held
    assert not await backend.release("db", "k", "me")
    assert backend.usage("").entries == 1
    await backend.aclose()


async def test_owner_that_cannot_be_read_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.claim("db", "k", "me", 30)
    execute(path, "UPDATE entries_v2 SET value = x'ff'")
    assert not (await backend.claim("db", "k", "me", 30)).is_held
    assert not await backend.release("db", "k", "me")
    await backend.aclose()


async def test_claims_are_in_no_listing_and_no_clearing(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.claim("db", "k", "me", 30)
    await backend.set_many("db", [Entry("a", "v", 60)])
    assert [info.key for info in (await backend.scan("db")).infos] == ["a"]
    assert await backend.count("db") == (await backend.clear("db")).deleted == 1
    assert not (await backend.claim("db", "k", "you", 30)).is_held
    await backend.aclose()


async def test_claims_are_refused_at_the_floor_of_the_disk_and_releases_are_not(small_disk: Path) -> None:
    backend = SqliteBackend(small_disk / "kv.db", hosting=HostingOptions(min_free_bytes=2 * 1024 * 1024))
    await backend.claim("db", "k", "me", 30)
    with contextlib.suppress(StorageFullError):
        for number in range(200):
            await backend.set("db", f"k{number}", "x" * 100_000, 60)
    # The log is emptied, so that it has no room to spare either.
    await asyncio.to_thread(wait_until, lambda: (backend.gauges().wal_bytes or 0) == 0)
    is_filled = 0
    with (small_disk / "other").open("ab", buffering=0) as other:
        # What was refused may give room back for a while.
        while is_filled < 5:
            too_much = (backend.gauges().disk_free_bytes or 0) - 1024 * 1024
            is_filled = 0 if too_much > 0 else is_filled + 1
            other.write(b"\0" * max(0, too_much))
            await asyncio.sleep(0.05)
    with pytest.raises(StorageFullError):
        await backend.claim("db", "other", "me", 30)
    assert await backend.release("db", "k", "me")
    await backend.aclose()


async def test_claims_end_by_the_clock_that_tests_move(tmp_path: Path) -> None:
    with movable_clock() as moved:
        backend = SqliteBackend(tmp_path / "kv.db")
        assert (await backend.claim("db", "k", "me", 30)).is_held
        moved.advance(29)
        assert not (await backend.claim("db", "k", "you", 30)).is_held
        moved.advance(2)
        assert (await backend.claim("db", "k", "you", 30)).is_held
        await backend.aclose()
