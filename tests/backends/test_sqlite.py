"""What the SQLite backend promises beyond the contract: durability, groups, sweeping, and which files it takes."""

import asyncio
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import FakeClock, wait_until

from aiokv import ConfigurationError, StorageError, StorageFullError, StoreClosedError
from aiokv.backends import sqlite_commit, sqlite_file
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_schema import APPLICATION_ID, SCHEMA_VERSION


def row_count(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        count: int = connection.execute("SELECT count(*) FROM entries_v2").fetchone()[0]
        return count
    finally:
        connection.close()


def page_count(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        count: int = connection.execute("PRAGMA page_count").fetchone()[0]
        return count
    finally:
        connection.close()


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("aiokv-sqlite")]


async def filled(path: Path, count: int, value: str = "v") -> SqliteBackend:
    backend = SqliteBackend(path)
    await asyncio.gather(*(backend.set("db", f"k{i}", value, 60) for i in range(count)))
    return backend


async def test_file_is_ours_in_wal_mode_and_bears_its_schema_version(tmp_path: Path) -> None:
    backend = await filled(tmp_path / "kv.db", 1)
    connection = sqlite3.connect(tmp_path / "kv.db")
    facts = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version", "journal_mode")]
    connection.close()
    await backend.aclose()
    assert facts == [APPLICATION_ID, SCHEMA_VERSION, "wal"]


async def test_writer_flushes_every_commit(tmp_path: Path) -> None:
    connection = sqlite_file.connect(tmp_path / "kv.db")
    # 2 is FULL; the default of WAL mode elsewhere, NORMAL, loses acknowledged writes when the power fails.
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    connection.close()


async def test_values_outlive_the_process_that_wrote_them(tmp_path: Path) -> None:
    await (await filled(tmp_path / "kv.db", 10)).aclose()
    backend = SqliteBackend(tmp_path / "kv.db")
    assert await backend.get("db", "k9") == "v"
    await backend.aclose()


async def test_concurrent_sets_are_committed_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    commit = sqlite_commit.Committer.commit

    def count(self: sqlite_commit.Committer, batch: list[sqlite_commit.Write]) -> object:
        batches.append(len(batch))
        return commit(self, batch)

    monkeypatch.setattr(sqlite_commit.Committer, "commit", count)
    await (await filled(tmp_path / "kv.db", 500)).aclose()
    assert sum(batches) == 500
    assert len(batches) < 50


async def test_group_keeps_the_order_in_which_writes_were_made(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    for _ in range(20):
        await asyncio.gather(*(backend.set("db", "k", str(i), 60) for i in range(30)))
        assert await backend.get("db", "k") == "29"
    await backend.aclose()


async def test_reads_go_on_while_another_process_holds_the_write_lock(tmp_path: Path) -> None:
    backend = await filled(tmp_path / "kv.db", 1)
    other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    write = asyncio.create_task(backend.set("db", "k0", "new", 60))
    for _ in range(100):
        assert await backend.get("db", "k0") == "v"
        await asyncio.sleep(0)
    assert not write.done()
    other.execute("COMMIT")
    other.close()
    await write
    assert await backend.get("db", "k0") == "new"
    await backend.aclose()


async def test_write_that_never_gets_the_lock_fails_and_says_it_was_not_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file.connect, "__kwdefaults__", {"busy_timeout_seconds": 0.05})
    backend = await filled(tmp_path / "kv.db", 1)
    other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match=r"stayed locked for .*the set was not applied") as caught:
        await backend.set("db", "k0", "s3cret", 60)
    assert (caught.value.verb, caught.value.db_name, caught.value.key) == ("set", "db", "k0")
    assert "s3cret" not in repr(caught.value)
    other.execute("COMMIT")
    other.close()
    await backend.set("db", "k0", "new", 60)
    assert await backend.get("db", "k0") == "new"
    await backend.aclose()


async def test_full_disk_is_told_apart_and_the_store_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = await filled(tmp_path / "kv.db", 1)
    connect = sqlite_file.connect

    def connect_small(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA max_page_count = 20")
        return connection

    monkeypatch.setattr(sqlite_file, "connect", connect_small)
    # The next connection of the writer is the small one.
    with pytest.raises(StorageError):
        await backend.set("db", "k0", b"no text", 60)  # type: ignore[arg-type]
    with pytest.raises(StorageFullError, match=r"no room left.*the set was not applied"):
        await backend.set("db", "k1", "x" * 1_000_000, 60)
    await backend.set("db", "k0", "small", 60)
    assert await backend.get("db", "k0") == "small"
    await backend.aclose()


async def test_sweeper_removes_expired_entries_and_gives_the_space_back(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, clock=clock, sweep_interval_seconds=0.01)
    await asyncio.gather(*(backend.set("db", f"k{i}", "x" * 20_000, 60) for i in range(300)))
    await backend.set("db", "stays", "v", 3600)
    clock.advance(60)
    await asyncio.to_thread(wait_until, lambda: row_count(path) == 1)
    assert await backend.get("db", "stays") == "v"
    await asyncio.to_thread(wait_until, lambda: page_count(path) < 400)
    await backend.aclose()
    assert path.stat().st_size < 300 * 20_000 / 3


async def test_sweeper_comes_round_while_writes_never_pause(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, clock=clock, sweep_interval_seconds=0.01)
    await asyncio.gather(*(backend.set("db", f"old{i}", "v", 60) for i in range(200)))
    clock.advance(60)
    stop = asyncio.Event()

    async def write_on(name: str) -> None:
        while not stop.is_set():
            await backend.set("db", name, "v", 60)

    writers = [asyncio.create_task(write_on(f"new{i}")) for i in range(8)]
    await asyncio.to_thread(wait_until, lambda: row_count(path) <= 8)
    stop.set()
    await asyncio.gather(*writers)
    await backend.aclose()


async def test_several_processes_write_one_file_and_lose_nothing(tmp_path: Path) -> None:
    script = """
import asyncio, sys
from aiokv import AsyncKVStore
async def main():
    async with AsyncKVStore("db", url=f"sqlite:///{sys.argv[1]}") as store:
        await asyncio.gather(*(store.set(f"{sys.argv[2]}-{i}", sys.argv[2]) for i in range(200)))
asyncio.run(main())
"""
    path = tmp_path / "kv.db"
    # All of them find no file, and one makes it.
    processes = [subprocess.Popen([sys.executable, "-c", script, str(path), str(i)]) for i in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert row_count(path) == 800


async def test_many_openers_at_once_make_one_schema(tmp_path: Path) -> None:
    backends = [SqliteBackend(tmp_path / "kv.db") for _ in range(16)]
    await asyncio.gather(*(backend.set("db", f"k{i}", "v", 60) for i, backend in enumerate(backends)))
    assert [await backends[0].get("db", f"k{i}") for i in range(16)] == ["v"] * 16
    await asyncio.gather(*(backend.aclose() for backend in backends))


async def test_log_cut_at_any_byte_leaves_a_prefix_of_the_commits(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set("db", "seed", "v", 60)
    for i in range(30):
        await backend.set("db", f"k{i}", "x" * 500, 60)
    # Copied while open: a close would empty the log into the database.
    shutil.copy(tmp_path / "kv.db", tmp_path / "copy.db")
    log = (tmp_path / "kv.db-wal").read_bytes()
    await backend.aclose()
    randomness = random.Random(7)
    lengths: set[int] = set()
    for round_number in range(25):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        shutil.copy(tmp_path / "copy.db", folder / "kv.db")
        (folder / "kv.db-wal").write_bytes(log[: randomness.randrange(len(log))])
        survivor = SqliteBackend(folder / "kv.db")
        present = [await survivor.get("db", f"k{i}") is not None for i in range(30)]
        await survivor.aclose()
        assert present == sorted(present, reverse=True)
        lengths.add(sum(present))
    assert len(lengths) > 5


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda path: path.write_text("no database, but a text that is longer than a header would be" * 20),
            "not a SQLite database",
        ),
        (lambda path: _database(path, "CREATE TABLE other (x)"), "database of another application"),
        (lambda path: _database(path, "PRAGMA application_id = 7"), "database of another application"),
        (
            lambda path: _database(
                path, f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION + 1}"
            ),
            "schema version 3, this aiokv knows up to 2.*Upgrade",
        ),
        (lambda path: path.mkdir(), "cannot be opened"),
    ],
    ids=["text", "table", "application", "newer", "folder"],
)
async def test_file_of_another_kind_is_refused_and_left_as_it_is(tmp_path: Path, make: object, words: str) -> None:
    path = tmp_path / "kv.db"
    make(path)  # type: ignore[operator]
    before = path.read_bytes() if path.is_file() else None
    backend = SqliteBackend(path)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=words):
            await backend.get("db", "k")
    with pytest.raises(ConfigurationError, match=words):
        await backend.set("db", "k", "v", 60)
    await backend.aclose()
    assert (path.read_bytes() if path.is_file() else None) == before


def _database(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


async def test_missing_folder_is_named(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "absent" / "kv.db")
    with pytest.raises(ConfigurationError, match=r"the folder .*absent does not exist; make it first"):
        await backend.get("db", "k")
    await backend.aclose()


async def test_store_opens_once_what_kept_it_from_opening_is_gone(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "folder" / "kv.db")
    with pytest.raises(ConfigurationError):
        await backend.get("db", "k")
    (tmp_path / "folder").mkdir()
    assert await backend.get("db", "k") is None
    await backend.aclose()


async def test_closing_commits_what_was_queued_and_ends_the_thread(tmp_path: Path) -> None:
    backend = await filled(tmp_path / "kv.db", 1)
    writes = [asyncio.create_task(backend.set("db", f"late{i}", "v", 60)) for i in range(100)]
    await asyncio.sleep(0)
    await backend.aclose()
    await asyncio.gather(*writes)
    assert row_count(tmp_path / "kv.db") == 101
    await asyncio.to_thread(wait_until, no_thread_is_left)


async def test_call_after_closing_is_a_typed_error(tmp_path: Path) -> None:
    backend = await filled(tmp_path / "kv.db", 1)
    await backend.aclose()
    with pytest.raises(StoreClosedError):
        await backend.get("db", "k0")
    with pytest.raises(StoreClosedError):
        await backend.set("db", "k0", "v", 60)


async def test_file_is_the_same_after_the_process_has_changed_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    backend = SqliteBackend("kv.db")
    await backend.get("db", "k")
    monkeypatch.chdir(tmp_path / "b")
    await backend.set("db", "k", "v", 60)
    assert await backend.get("db", "k") == "v"
    await backend.aclose()
    assert list((tmp_path / "b").iterdir()) == []


@pytest.mark.parametrize("replace", [False, True])
async def test_write_to_a_file_that_is_gone_is_never_acknowledged(tmp_path: Path, replace: bool) -> None:  # noqa: FBT001
    path = tmp_path / "kv.db"
    backend = await filled(path, 1)
    path.rename(tmp_path / "moved.db")
    if replace:
        shutil.copy(tmp_path / "moved.db", path)
    with pytest.raises(StorageError, match=r"deleted or replaced while it was open.*was not applied"):
        await backend.set("db", "k", "v", 60)
    await backend.aclose()


async def test_write_that_cannot_be_stored_fails_alone(tmp_path: Path) -> None:
    backend = await filled(tmp_path / "kv.db", 1)
    writes = [
        backend.set("db", "before", "v", 60),
        backend.set("db", "bad", b"no text", 60),  # type: ignore[arg-type]
        backend.set("db", "worse", "\ud800", 60),
        backend.set("db", "after", "v", 60),
    ]
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StorageError, StorageError, type(None)]
    assert [await backend.get("db", key) for key in ("before", "bad", "worse", "after")] == ["v", None, None, "v"]
    await backend.aclose()


async def test_thread_that_cannot_be_started_fails_the_call_and_not_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    backend = SqliteBackend(tmp_path / "kv.db")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StorageError, match="can't start new thread"):
            await backend.set("db", "k", "v", 60)
    await backend.set("db", "k", "v", 60)
    assert await backend.get("db", "k") == "v"
    await backend.aclose()


async def test_close_that_is_cancelled_while_the_file_opens_still_ends_the_thread(tmp_path: Path) -> None:
    (await filled_connection(tmp_path / "kv.db")).close()
    other = sqlite3.connect(tmp_path / "kv.db", isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    backend = SqliteBackend(tmp_path / "kv.db")
    read = asyncio.create_task(backend.get("db", "k"))
    await asyncio.sleep(0.01)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(backend.aclose(), 0.05)
    other.execute("COMMIT")
    other.close()
    await backend.aclose()
    with pytest.raises(StoreClosedError):
        await read
    await asyncio.to_thread(wait_until, no_thread_is_left)


async def filled_connection(path: Path) -> sqlite3.Connection:
    await (await filled(path, 1)).aclose()
    return sqlite3.connect(path)


async def test_opening_needs_no_thread_of_the_loops_pool(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    loop = asyncio.get_running_loop()
    release = threading.Event()
    busy = [loop.run_in_executor(None, release.wait) for _ in range(64)]
    try:
        await asyncio.wait_for(backend.set("db", "k", "v", 60), 5)
        await asyncio.wait_for(backend.aclose(), 5)
    finally:
        release.set()
        await asyncio.gather(*busy)


async def test_sweeper_keeps_up_with_as_many_writes_as_there_are(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path, clock=clock, sweep_interval_seconds=0.0)
    for generation in range(12):
        await asyncio.gather(*(backend.set("db", f"{generation}-{i}", "v", 60) for i in range(1_000)))
        clock.advance(60)
    # Without keeping up, only 64 of a thousand would be gone after each.
    assert row_count(path) < 6_000
    await backend.aclose()
