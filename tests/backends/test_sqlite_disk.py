"""A disk that is full: sets are refused, deletes and the sweeper have room, and it heals without a restart."""

import asyncio
import contextlib
import errno
import os
import sqlite3
from pathlib import Path

import pytest
from helpers import FakeClock, wait_until

from aiokv import StorageFullError
from aiokv.backends.base import HostingOptions
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_disk import Disk
from aiokv.backends.sqlite_maintenance import check

MIB = 1024 * 1024
VALUE = "x" * 100_000
HOSTING = HostingOptions(min_free_bytes=2 * MIB, ballast_bytes=MIB)


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def fill(folder: Path) -> None:
    """Take the last byte of a disk, as another program would."""
    with (folder / "other").open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), b"\0" * 65_536)
    with (folder / "rest").open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), b"\0" * 512)


async def set_until_full(backend: SqliteBackend, prefix: str = "k") -> int:
    """Set until the store refuses; return how many sets it took."""
    for number in range(1000):
        try:
            await backend.set("a:db", f"{prefix}{number}", VALUE, 60)
        except StorageFullError:
            return number
    raise AssertionError("the store never refused")


async def eventually_sets(backend: SqliteBackend, key: str = "late") -> None:
    """Set a key as soon as the store takes it again."""
    async with asyncio.timeout(15):
        while True:
            try:
                await backend.set("a:db", key, VALUE, 60)
            except StorageFullError:
                await asyncio.sleep(0.02)
            else:
                return


async def test_sets_are_refused_at_the_floor_and_nothing_else_is(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HOSTING)
    taken = await set_until_full(backend)
    assert taken > 50
    assert 0 < free_bytes(small_disk) < 3 * MIB
    with pytest.raises(StorageFullError, match=r"floor of 2,097,152 free bytes.*the set was not applied"):
        await backend.set("a:db", "large", VALUE * 10, 60)
    assert await backend.get("a:db", "k0") == VALUE
    assert backend.usage("a").entries == taken
    for number in range(20):
        await backend.delete("a:db", f"k{number}")
    await eventually_sets(backend)
    assert await backend.get("a:db", "late") == VALUE
    await backend.aclose()
    assert check(small_disk / "kv.db").problems == ()


async def test_writes_of_one_group_that_fit_are_done_and_the_others_refused(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HOSTING)
    await backend.set("a:db", "k", "v", 60)
    (small_disk / "other").write_bytes(b"\0" * (free_bytes(small_disk) - 3 * MIB))
    results = await asyncio.gather(
        backend.set("a:db", "large", "x" * 1_500_000, 60),
        backend.delete("a:db", "k"),
        backend.set("a:db", "small", "v", 60),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [StorageFullError, type(None), type(None)]
    await backend.aclose()


async def test_deletes_have_room_on_a_disk_without_a_free_byte_and_give_it_back(
    small_disk: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    path, ballast = small_disk / "kv.db", small_disk / "kv.db-ballast"
    backend = SqliteBackend(path, clock=clock, hosting=HOSTING, sweep_interval_seconds=0.05)
    taken = await set_until_full(backend)
    # The log is emptied, so that it has no room to spare either.
    await asyncio.to_thread(wait_until, lambda: (backend.gauges().wal_bytes or 0) == 0)
    fill(small_disk)
    assert free_bytes(small_disk) == 0
    assert ballast.stat().st_size == MIB
    with pytest.raises(StorageFullError):
        await backend.set("a:db", "k", VALUE, 60)
    assert backend.usage("a").entries == taken
    for number in range(taken):
        await backend.delete("a:db", f"k{number}")
    assert "its ballast was deleted" in caplog.text
    assert backend.usage("a").entries == 0
    await asyncio.to_thread(wait_until, ballast.exists)
    for number in range(taken // 2):
        await eventually_sets(backend, f"new{number}")
    assert backend.usage("a").entries == taken // 2
    assert await backend.health() is None
    await backend.aclose()
    assert check(path).problems == ()


async def test_expired_entries_are_swept_on_a_disk_without_a_free_byte(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HOSTING, sweep_interval_seconds=0.05)
    await set_until_full(backend)
    await asyncio.to_thread(wait_until, lambda: (backend.gauges().wal_bytes or 0) == 0)
    fill(small_disk)
    assert "no room left" in (await backend.health() or "")
    clock.advance(60)
    await eventually_sets(backend)
    await asyncio.to_thread(wait_until, (small_disk / "kv.db-ballast").exists)
    assert await backend.health() is None
    await backend.aclose()


async def test_pages_that_are_free_in_the_file_take_sets_while_the_disk_is_below_its_floor(
    small_disk: Path, clock: FakeClock
) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HOSTING, sweep_interval_seconds=0.05)
    taken = await set_until_full(backend)
    await asyncio.to_thread(wait_until, lambda: (backend.gauges().wal_bytes or 0) == 0)
    # Another program takes all but half a megabyte, and what deletes free later would be the file's own.
    (small_disk / "other").write_bytes(b"\0" * (free_bytes(small_disk) - MIB // 2))
    for number in range(0, taken - 1, 2):
        await backend.delete("a:db", f"k{number}")
        await backend.delete("a:db", f"k{number + 1}")
        await eventually_sets(backend, f"new{number}")
        assert free_bytes(small_disk) < 2 * MIB
    assert backend.usage("a").entries == taken // 2 + taken % 2
    await backend.aclose()
    assert check(small_disk / "kv.db").problems == ()


async def test_log_is_emptied_after_a_refused_set_though_a_reader_was_in_the_way_at_first(
    small_disk: Path, clock: FakeClock
) -> None:
    path = small_disk / "kv.db"
    backend = SqliteBackend(path, clock=clock, hosting=HOSTING, sweep_interval_seconds=0.05)
    await backend.set("a:db", "k", "v", 60)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM entries_v2").fetchone() == (1,)
        await set_until_full(backend)
        # Several sweeps pass meanwhile, and nobody sets again.
        await asyncio.sleep(0.8)
        assert (path.with_name("kv.db-wal")).stat().st_size > 0
        reader.execute("COMMIT")
    await asyncio.to_thread(wait_until, lambda: path.with_name("kv.db-wal").stat().st_size == 0)
    await backend.aclose()


async def test_log_leaves_room_to_be_written_into_the_database(small_disk: Path, clock: FakeClock) -> None:
    # Without a ballast the log may grow to 16 MB, which is the whole disk.
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HostingOptions(min_free_bytes=MIB))
    await set_until_full(backend)
    await asyncio.to_thread(wait_until, lambda: (backend.gauges().wal_bytes or 0) == 0)
    for number in range(100):
        await eventually_sets(backend, f"k{number}")
    await backend.aclose()


async def test_log_that_does_not_fit_into_the_database_leaves_the_room_to_deletes(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock)
    for number in range(60):
        await backend.set("a:db", f"k{number}", VALUE, 60)
    (small_disk / "other").write_bytes(b"\0" * (free_bytes(small_disk) - MIB))
    assert backend._writer is not None
    committer = backend._writer._committer
    assert committer is not None
    with backend._writer.writer_lock:
        assert not committer._truncate_log(at_once=True)
    assert free_bytes(small_disk) >= MIB - 4096
    (small_disk / "other").unlink()
    with backend._writer.writer_lock:
        assert committer._truncate_log(at_once=True)
    await backend.aclose()


async def test_sets_do_not_take_the_room_that_the_ballast_gave_to_deletes(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HostingOptions(ballast_bytes=2 * MIB))
    await backend.set("a:db", "k", VALUE, 60)
    fill(small_disk)
    results = await asyncio.gather(
        backend.set("a:db", "large", "x" * 1_900_000, 60),
        backend.delete("a:db", "k"),
        backend.set("a:db", "other", "x" * 1_000_000, 60),
        backend.set("a:db", "third", "x" * 500_000, 60),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [StorageFullError, type(None), StorageFullError, StorageFullError]
    await backend.aclose()


async def test_store_that_opens_on_a_disk_without_a_free_byte_reads_and_deletes(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HOSTING)
    taken = await set_until_full(backend)
    await backend.aclose()
    fill(small_disk)
    assert free_bytes(small_disk) == 0
    backend = SqliteBackend(small_disk / "kv.db", clock=clock, hosting=HOSTING, sweep_interval_seconds=0.05)
    assert await backend.get("a:db", "k0") == VALUE
    with pytest.raises(StorageFullError):
        await backend.set("a:db", "k", VALUE, 60)
    for number in range(taken):
        await backend.delete("a:db", f"k{number}")
    await eventually_sets(backend)
    assert await backend.health() is None
    await backend.aclose()


async def test_store_that_cannot_be_opened_for_want_of_room_says_so(small_disk: Path) -> None:
    first = SqliteBackend(small_disk / "kv.db")
    await first.set("a:db", "k", "v", 60)
    await first.aclose()
    fill(small_disk)
    backend = SqliteBackend(small_disk / "kv.db")
    with pytest.raises(StorageFullError, match="no room left; free some space on it"):
        await backend.get("a:db", "k")
    (small_disk / "other").unlink()
    assert await backend.get("a:db", "k") is not None
    await backend.aclose()


async def test_store_without_options_heals_too_when_another_program_leaves(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(small_disk / "kv.db", clock=clock)
    await backend.set("a:db", "k", "v", 60)
    fill(small_disk)
    with pytest.raises(StorageFullError, match="no room left; free some space on it"):
        await backend.set("a:db", "large", "x" * 1_900_000, 60)
    assert await backend.get("a:db", "k") == "v"
    (small_disk / "other").unlink()
    await backend.set("a:db", "large", "x" * 1_900_000, 60)
    await backend.aclose()


async def test_concurrent_sets_and_deletes_on_a_full_disk_leave_a_sound_file(small_disk: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(
        small_disk / "kv.db", clock=clock, hosting=HOSTING._replace(ballast_bytes=4 * MIB), sweep_interval_seconds=0.01
    )
    await backend.set("a:db", "k", "v", 60)
    expected: dict[str, str | None] = {}

    async def work(worker: int) -> None:
        for step in range(40):
            key = f"{worker}-{step % 5}"
            if step % 7 == 6:
                await backend.delete("a:db", key)
                expected[key] = None
                continue
            value = f"{step}" + "x" * (20_000 * (worker + 1))
            with contextlib.suppress(StorageFullError):
                await backend.set("a:db", key, value, 60)
                expected[key] = value

    workers = [asyncio.create_task(work(worker)) for worker in range(16)]
    await asyncio.sleep(0.2)
    fill(small_disk)
    await asyncio.sleep(0.2)
    (small_disk / "other").unlink()
    await asyncio.gather(*workers)
    wrong = [key for key, value in expected.items() if await backend.get("a:db", key) != value]
    assert wrong == []
    await backend.aclose()
    assert check(small_disk / "kv.db").problems == ()


async def test_log_is_written_into_the_database_before_it_outgrows_the_ballast(tmp_path: Path, clock: FakeClock) -> None:
    hosting = HostingOptions(ballast_bytes=MIB)
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, hosting=hosting)

    async def growth_bytes(first: int) -> int:
        for number in range(first, first + 40):
            await backend.set("a:db", f"k{number}", VALUE, 60)
        assert backend._writer is not None
        committer = backend._writer._committer
        assert committer is not None
        with backend._writer.writer_lock:
            return committer._growth_bytes(committer._connected())

    assert await growth_bytes(0) < MIB
    # As another process does where deletes need the room: from now on the room is for the log of deletes.
    Disk(tmp_path / "kv.db", hosting).release_ballast()
    assert await growth_bytes(100) > 3 * MIB
    Disk(tmp_path / "kv.db", hosting).restore_ballast()
    assert await growth_bytes(200) < MIB
    await backend.aclose()


def test_ballast_holds_its_room_and_is_left_out_where_there_is_none(small_disk: Path) -> None:
    disk = Disk(small_disk / "kv.db", HostingOptions(ballast_bytes=4 * MIB))
    before = free_bytes(small_disk)
    assert disk.restore_ballast()
    assert before - free_bytes(small_disk) == 4 * MIB
    assert disk.release_ballast()
    assert not disk.release_ballast()
    (small_disk / "other").write_bytes(b"\0" * (before - 4 * MIB))
    assert not disk.restore_ballast()
    assert [path.name for path in small_disk.iterdir()] == ["other"]


def test_ballast_that_could_not_be_finished_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    assert not Disk(tmp_path / "kv.db", HostingOptions(ballast_bytes=MIB)).restore_ballast()
    assert list(tmp_path.iterdir()) == []


def test_ballast_has_no_holes_where_files_cannot_be_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    assert Disk(tmp_path / "kv.db", HostingOptions(ballast_bytes=MIB + 1)).restore_ballast()
    assert (tmp_path / "kv.db-ballast").read_bytes() == b"\xff" * (MIB + 1)
