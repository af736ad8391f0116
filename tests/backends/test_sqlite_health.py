"""Whether a SQLite store says that no write would succeed, and why; and who may read its files."""

import asyncio
import logging
import shutil
import sqlite3
import sys
import time
from pathlib import Path

import pytest
from helpers import wait_until

from aiokv import StorageError
from aiokv.backends import sqlite
from aiokv.backends.base import HostingOptions
from aiokv.backends.sqlite import SqliteBackend


async def opened(path: Path, hosting: HostingOptions | None = None) -> SqliteBackend:
    backend = SqliteBackend(path, hosting=hosting)
    await backend.set("db", "k", "v", 60)
    return backend


async def test_store_that_can_write_is_well_and_stays_as_it_was(tmp_path: Path) -> None:
    backend = await opened(tmp_path / "kv.db")
    before = backend.gauges()
    assert [await backend.health() for _ in range(3)] == [None] * 3
    after = backend.gauges()
    assert (after.entries, after.value_bytes) == (before.entries, before.value_bytes)
    assert after.commits == (before.commits or 0) + 3
    await backend.aclose()
    assert await backend.health() == "the store is closed"


async def test_store_that_was_never_used_is_well_or_says_what_is_wrong(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    assert await backend.health() is None
    await backend.aclose()
    backend = SqliteBackend(tmp_path / "absent" / "kv.db")
    assert "does not exist; make it first" in (await backend.health() or "")
    await backend.aclose()


async def test_held_write_lock_is_the_reason_and_the_loop_runs_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_PROBE_SECONDS", 0.2)
    backend = await opened(tmp_path / "kv.db")
    other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    longest, last, done = 0.0, time.monotonic(), asyncio.Event()

    async def watch() -> None:
        nonlocal longest, last
        while not done.is_set():
            await asyncio.sleep(0.01)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()

    watcher = asyncio.create_task(watch())
    reasons = [await backend.health() for _ in range(3)]
    done.set()
    await watcher
    assert all(reason and "another process locks it" in reason for reason in reasons)
    assert longest < 5, "the loop stood still"
    other.execute("COMMIT")
    other.close()
    monkeypatch.setattr(sqlite, "_PROBE_SECONDS", 10)
    # Only one probe waits in the queue, however often it is asked.
    assert await backend.health() is None
    assert (backend.gauges().committed_writes or 0) <= 3
    await backend.aclose()


async def test_probe_that_is_late_behind_other_writes_is_no_illness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_PROBE_SECONDS", 0.05)
    backend = await opened(tmp_path / "kv.db")

    async def stand_still() -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(backend, "_write_probe", stand_still)
    health = asyncio.create_task(backend.health())
    await asyncio.sleep(0)
    await backend.set("db", "k", "v", 60)
    assert await health is None
    assert "no write" in (await backend.health() or "")
    assert backend._probe is not None
    backend._probe.cancel()
    await backend.aclose()


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("replace", [False, True], ids=["deleted", "replaced"])
async def test_file_that_is_gone_is_the_reason_and_takes_no_write(tmp_path: Path, suffix: str, replace: bool) -> None:  # noqa: FBT001
    path = tmp_path / "kv.db"
    backend = await opened(path)
    moved = path.with_name(f"kv.db{suffix}")
    moved.rename(tmp_path / "moved")
    if replace:
        shutil.copy(tmp_path / "moved", moved)
    assert "deleted or replaced while it was open" in (await backend.health() or "")
    for call in (backend.set("db", "k", "w", 60), backend.delete("db", "k")):
        with pytest.raises(StorageError, match=r"deleted or replaced while it was open.*was not applied"):
            await call
    await backend.aclose()


async def test_floor_above_the_free_space_is_the_reason(tmp_path: Path) -> None:
    await (await opened(tmp_path / "kv.db")).aclose()
    backend = SqliteBackend(tmp_path / "kv.db", hosting=HostingOptions(min_free_bytes=1 << 60))
    assert "no room left above its floor of 1,152,921,504,606,846,976 free bytes" in (await backend.health() or "")
    assert await backend.get("db", "k") == "v"
    await backend.aclose()


def modes(folder: Path) -> dict[str, str]:
    return {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}


async def test_every_file_is_its_owners_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = await opened(tmp_path / "kv.db", HostingOptions(ballast_bytes=8192))
    assert modes(tmp_path) == dict.fromkeys(["kv.db", "kv.db-wal", "kv.db-shm", "kv.db-ballast"], "0o600")
    await backend.aclose()
    assert caplog.text == ""


async def test_file_that_others_may_read_is_tightened_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await (await opened(tmp_path / "kv.db")).aclose()
    (tmp_path / "kv.db").chmod(0o644)
    backend = await opened(tmp_path / "kv.db")
    assert set(modes(tmp_path).values()) == {"0o600"}
    await backend.aclose()
    await (await opened(tmp_path / "kv.db")).aclose()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "could be read by other users" in caplog.text


async def test_file_that_others_may_write_is_left_to_them_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await (await opened(tmp_path / "kv.db")).aclose()
    (tmp_path / "kv.db").chmod(0o660)
    backend = await opened(tmp_path / "kv.db")
    assert set(modes(tmp_path).values()) == {"0o660"}
    await backend.aclose()
    assert "may be written by other users" in caplog.text


async def test_new_file_can_be_opened_by_many_threads_at_once_and_keeps_its_locks(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backends = [SqliteBackend(path) for _ in range(8)]
    await asyncio.gather(*(backend.set("db", f"k{i}", "v", 60) for i, backend in enumerate(backends)))
    # SQLite's shared lock on the file; it would be gone if anything here had opened and closed the file.
    assert await lock_exclusively(path) != 0
    await asyncio.gather(*(backend.aclose() for backend in backends))
    assert await lock_exclusively(path) == 0
    # SQLite leaves the log where two connections close at one moment: each takes the other for one that goes on.
    assert set(modes(tmp_path)) <= {"kv.db", "kv.db-wal", "kv.db-shm"}


async def lock_exclusively(path: Path) -> int:
    """Try to lock the bytes of SQLite's shared lock from another process; return 0 where that succeeds."""
    script = "import fcntl,sys\nf=open(sys.argv[1],'rb+')\nfcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,510,0x40000002)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, str(path), stderr=asyncio.subprocess.DEVNULL)
    return await process.wait()


async def test_store_opens_in_a_folder_whose_file_system_knows_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("os.link", refuse)
    backend = await opened(tmp_path / "kv.db")
    assert await backend.get("db", "k") == "v"
    await backend.aclose()
    await asyncio.to_thread(wait_until, lambda: len(list(tmp_path.iterdir())) == 1)
