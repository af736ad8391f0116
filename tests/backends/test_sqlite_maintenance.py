"""Copies of a file that is served, and what a check of a file finds."""

import asyncio
import contextlib
import os
import pickle
import sqlite3
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from helpers import FakeClock

from aiokv import ConfigurationError
from aiokv.backends import sqlite_maintenance
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_maintenance import CheckReport, DamagedFileError, backup, check


@pytest.fixture
async def backend(tmp_path: Path, clock: FakeClock) -> AsyncGenerator[SqliteBackend]:
    opened = SqliteBackend(tmp_path / "kv.db", clock=clock)
    await asyncio.gather(*(opened.set(f"acc{i % 3}:db", f"k{i}", f"s3cret {i}" * 50, 60) for i in range(3000)))
    yield opened
    await opened.aclose()


def execute(path: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def checked(path: Path) -> CheckReport:
    return await asyncio.to_thread(check, path)


async def test_copy_of_a_served_file_holds_what_was_there_at_its_start(
    backend: SqliteBackend, tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_maintenance, "_BACKUP_STEP_PAGES", 16)
    seen: list[tuple[str, int, int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        begun.set()
        assert go_on.wait(10)

    copying = asyncio.create_task(
        asyncio.to_thread(backup, tmp_path / "kv.db", tmp_path / "copy.db", verify=False, progress=progress)
    )
    await asyncio.to_thread(begun.wait)
    await asyncio.gather(*(backend.set("acc0:db", f"k{i}", "late", 60) for i in range(0, 3000, 3)))
    go_on.set()
    report = await copying
    assert len(seen) > 10
    assert seen[-1][0] == "pages"
    assert seen[-1][1] == seen[-1][2]
    assert seen == sorted(seen)
    copy = SqliteBackend(tmp_path / "copy.db", clock=clock)
    assert [await copy.get("acc0:db", f"k{i}") for i in (0, 2997)] == ["s3cret 0" * 50, "s3cret 2997" * 50]
    assert copy.usage("acc1").entries == 1000
    await copy.aclose()
    assert report.path == str(tmp_path / "copy.db")
    assert report.size_bytes == seen[-1][2] * 4096
    assert await backend.get("acc0:db", "k0") == "late"


async def test_copy_is_one_private_sound_file(backend: SqliteBackend, tmp_path: Path) -> None:
    folder = tmp_path / "copies"
    folder.mkdir()
    report = await asyncio.to_thread(backup, tmp_path / "kv.db", folder / "copy.db")
    assert names(folder) == ["copy.db"]
    assert (folder / "copy.db").stat().st_mode & 0o777 == 0o600
    assert report.size_bytes == (folder / "copy.db").stat().st_size
    found = await checked(folder / "copy.db")
    assert (found.is_sound, found.entries) == (True, backend.gauges().entries)


@pytest.mark.usefixtures("backend")
async def test_copy_replaces_a_file_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    target.write_text("precious")
    with pytest.raises(ConfigurationError, match="exists; name another file, or ask to overwrite it"):
        await asyncio.to_thread(backup, tmp_path / "kv.db", target)
    assert target.read_text() == "precious"
    await asyncio.to_thread(backup, tmp_path / "kv.db", target, overwrite=True)
    assert (await checked(target)).entries == 3000


@pytest.mark.usefixtures("backend")
async def test_file_that_appears_while_the_copy_is_made_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "copy.db"
    with pytest.raises(ConfigurationError, match="exists"):
        await asyncio.to_thread(backup, tmp_path / "kv.db", target, progress=lambda *_: target.write_text("precious") and None)
    assert target.read_text() == "precious"
    assert names(tmp_path) == ["copy.db", "kv.db", "kv.db-shm", "kv.db-wal"]


@pytest.mark.parametrize(
    ("source", "target", "overwrite", "words"),
    [
        ("absent.db", "copy.db", False, "absent.db does not exist"),
        ("kv.db", "absent/copy.db", False, "the folder .*absent does not exist; make it first"),
        ("kv.db", "kv.db", True, "the very file"),
        ("kv.db", "link.db", True, "the very file"),
        ("kv.db", "kv.db-wal", True, "or belongs to it"),
        ("kv.db", "kv.db-shm", True, "or belongs to it"),
        ("kv.db", "kv.db-ballast", False, "or belongs to it"),
        ("link.db", "kv.db-wal", True, "or belongs to it"),
        ("kv.db", "folder", True, "exists"),
        ("kv.db", "other.db", True, "is in use as a store"),
        ("text", "copy.db", False, "not a SQLite database"),
        ("foreign.db", "copy.db", False, "database of another application"),
        ("empty.db", "copy.db", False, "is empty"),
    ],
)
@pytest.mark.usefixtures("backend")
async def test_copy_that_cannot_be_right_is_refused_and_leaves_nothing(
    tmp_path: Path,
    source: str,
    target: str,
    overwrite: bool,  # noqa: FBT001
    words: str,
) -> None:
    (tmp_path / "link.db").symlink_to(tmp_path / "kv.db")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no database, but a text that is longer than a header would be" * 20)
    (tmp_path / "empty.db").touch()
    execute(tmp_path / "foreign.db", "CREATE TABLE other (x)")
    other = SqliteBackend(tmp_path / "other.db")
    await other.set("db", "k", "v", 60)
    before = names(tmp_path)
    with pytest.raises(ConfigurationError, match=words):
        await asyncio.to_thread(backup, tmp_path / source, tmp_path / target, overwrite=overwrite)
    assert names(tmp_path) == before
    await other.aclose()


@pytest.mark.usefixtures("backend")
async def test_copy_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = names(tmp_path)

    def copy() -> None:
        with pytest.raises(KeyboardInterrupt):
            backup(tmp_path / "kv.db", tmp_path / "copy.db", progress=interrupt)

    await asyncio.to_thread(copy)
    assert names(tmp_path) == before


@pytest.mark.usefixtures("backend")
async def test_sound_file_is_found_sound_while_it_is_served(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = await asyncio.to_thread(check, tmp_path / "kv.db", progress=lambda *step: seen.append(step))
    assert report == CheckReport(
        path=str(tmp_path / "kv.db"),
        schema_version=2,
        entries=3000,
        old_entries=0,
        value_bytes=sum(len(f"s3cret {i}") * 50 for i in range(3000)),
        damaged_values=0,
        examples=(),
        problems=(),
    )
    assert report.is_sound
    assert [step for step in seen if step[0] == "entries"] == [("entries", done, 3000) for done in (0, 1000, 2000, 3000)]
    assert [step[0] for step in seen[:2]] == ["pages", "pages"]


@pytest.mark.usefixtures("backend")
async def test_damaged_values_are_counted_and_the_first_ones_named(tmp_path: Path) -> None:
    execute(tmp_path / "kv.db", "UPDATE entries_v2 SET value = CAST(x'ff' || substr(value, 2) AS BLOB) WHERE rowid % 100 = 0")
    execute(tmp_path / "kv.db", "UPDATE entries_v2 SET key = 'moved' WHERE key = 'k1'")
    report = await checked(tmp_path / "kv.db")
    assert (report.damaged_values, len(report.examples), report.is_sound) == (31, 20, False)
    assert ("acc1:db", "moved") in report.examples
    assert report.problems == ("31 values are damaged; set their keys anew, or delete them",)
    assert "s3cret" not in repr(report)


@pytest.mark.usefixtures("backend")
async def test_wrong_count_of_an_account_is_a_problem(tmp_path: Path) -> None:
    execute(tmp_path / "kv.db", "UPDATE usage SET value_bytes = value_bytes + 1 WHERE account = 'acc1'")
    execute(tmp_path / "kv.db", "INSERT INTO usage VALUES ('ghost', 5, 1)")
    assert (await checked(tmp_path / "kv.db")).problems == (
        "what is counted for 2 accounts is not what they store; restore a backup",
    )


async def test_damaged_pages_are_problems_and_not_errors(backend: SqliteBackend, tmp_path: Path) -> None:
    await backend.aclose()
    data = bytearray((tmp_path / "kv.db").read_bytes())
    data[4096 * 40 : 4096 * 44] = b"\x5a" * (4096 * 4)
    (tmp_path / "kv.db").write_bytes(data)
    report = await checked(tmp_path / "kv.db")
    assert not report.is_sound
    assert any(problem.startswith("SQLite: ") or "a page is damaged" in problem for problem in report.problems)
    assert "s3cret" not in repr(report)


@pytest.mark.parametrize("size_bytes", [50, 4096, 4096 * 41 + 7])
async def test_truncated_file_is_reported_and_not_an_error(backend: SqliteBackend, tmp_path: Path, size_bytes: int) -> None:
    await backend.aclose()
    os.truncate(tmp_path / "kv.db", size_bytes)
    report = await checked(tmp_path / "kv.db")
    assert (report.is_sound, report.schema_version, report.entries) == (False, 0, 0)
    assert report.problems[0].startswith("SQLite: a page cannot be right (SQLITE_")
    assert size_bytes == 50 or f"the file has {size_bytes:,} bytes of " in report.problems[1]
    assert "put a backup in its place" in report.problems[-1]
    assert "s3cret" not in repr(report)


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.usefixtures("backend")
async def test_copy_of_a_damaged_file_is_not_kept_and_replaces_nothing(
    tmp_path: Path,
    overwrite: bool,  # noqa: FBT001
) -> None:
    execute(tmp_path / "kv.db", "UPDATE entries_v2 SET value = CAST(x'ff' || substr(value, 2) AS BLOB) WHERE key = 'k1'")
    target = tmp_path / "copy.db"
    if overwrite:
        target.write_text("precious")
    before = names(tmp_path)
    with pytest.raises(DamagedFileError, match=r"damaged: db 'acc1:db', key 'k1'") as caught:
        await asyncio.to_thread(backup, tmp_path / "kv.db", target, overwrite=overwrite)
    assert "1 value is damaged; set its key anew, or delete it" in caught.value.problems
    assert "s3cret" not in str(caught.value)
    assert names(tmp_path) == before
    assert not overwrite or target.read_text() == "precious"
    await asyncio.to_thread(backup, tmp_path / "kv.db", target, overwrite=overwrite, verify=False)
    assert (await checked(target)).damaged_values == 1


async def test_copy_of_a_truncated_file_is_not_made(backend: SqliteBackend, tmp_path: Path) -> None:
    await backend.aclose()
    os.truncate(tmp_path / "kv.db", 4096 * 9)
    before = names(tmp_path)
    with pytest.raises(DamagedFileError, match="its end is missing") as caught:
        await asyncio.to_thread(backup, tmp_path / "kv.db", tmp_path / "copy.db", verify=False)
    assert names(tmp_path) == before
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("name", ["absent.db", "folder", "text", "foreign.db", "empty.db"])
async def test_check_of_what_is_no_store_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no database, but a text that is longer than a header would be" * 20)
    (tmp_path / "empty.db").touch()
    execute(tmp_path / "foreign.db", "CREATE TABLE other (x)")
    before = names(tmp_path)
    with pytest.raises(ConfigurationError, match=name):
        await checked(tmp_path / name)
    assert names(tmp_path) == before


async def test_copy_of_a_locked_file_is_made_all_the_same(backend: SqliteBackend, tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "kv.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        await asyncio.to_thread(backup, tmp_path / "kv.db", tmp_path / "copy.db")
        assert (await checked(tmp_path / "kv.db")).is_sound
    assert (await checked(tmp_path / "copy.db")).entries == backend.gauges().entries
