"""`aiokv backup` and `aiokv check`, as an operator calls them."""

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import clean_environment, served_process

from aiokv import AsyncKVStore
from aiokv.backends.sqlite_maintenance import backup
from aiokv.errors import StorageError


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aiokv", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**clean_environment(folder), **environment},
    )


@pytest.mark.slow
async def test_copy_of_a_served_store_is_whole_private_and_served_again(tmp_path: Path) -> None:
    with served_process("--store", f"sqlite:///{tmp_path}/kv.db", home=tmp_path) as (_, address):
        async with AsyncKVStore("db", url=address) as store:
            await store.set("key", "first")
            done = run("backup", "copy.db", "--store", f"sqlite:///{tmp_path}/kv.db", folder=tmp_path)
            assert (done.returncode, done.stdout) == (0, "")
            assert "copy.db" in done.stderr
            await store.set("key", "second")
    copy = tmp_path / "copy.db"
    assert copy.stat().st_mode & 0o777 == 0o600
    async with AsyncKVStore("db", url=f"sqlite:///{copy}") as store:
        assert await store.get("key") == "first"


def test_store_of_the_server_is_the_default_and_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    assert run("set", "db", "key", "value", "--url", "sqlite:///a.db", folder=tmp_path).returncode == 0
    assert run("backup", "b.db", folder=tmp_path, AIOKV_SERVE_STORE="sqlite:///a.db").returncode == 0
    again = run("backup", "b.db", folder=tmp_path, AIOKV_SERVE_STORE="sqlite:///a.db")
    assert again.returncode == 2
    assert "b.db exists" in again.stderr
    assert run("backup", "--overwrite", "b.db", "--store", "sqlite:///a.db", folder=tmp_path).returncode == 0
    for url in ("memory://", "http://127.0.0.1:1"):
        refused = run("backup", "c.db", "--store", url, folder=tmp_path)
        assert refused.returncode == 2
        assert "sqlite:///kv.db" in refused.stderr


def test_sound_file_is_told_from_a_damaged_one_by_the_exit_status(tmp_path: Path) -> None:
    run("set", "db", "good", "value", "--url", "sqlite:///kv.db", folder=tmp_path)
    assert "sound: 1 entry, " in run("check", "kv.db", folder=tmp_path).stdout
    run("set", "db", "bad", "secret-value", "--url", "sqlite:///kv.db", folder=tmp_path)
    sound = run("check", "kv.db", folder=tmp_path)
    assert (sound.returncode, sound.stderr) == (0, "")
    assert "sound: 2 entries" in sound.stdout
    connection = sqlite3.connect(tmp_path / "kv.db")
    assert connection.execute("UPDATE entries_v2 SET value = ? WHERE key = 'bad'", (b"Secret-value",)).rowcount == 1
    connection.commit()
    connection.close()
    damaged = run("check", "kv.db", folder=tmp_path)
    assert damaged.returncode == 1
    assert "DAMAGED" in damaged.stdout
    assert "key 'bad'" in damaged.stdout
    assert "ecret-value" not in damaged.stdout + damaged.stderr


def test_damaged_store_is_told_by_exit_status_1_and_replaces_no_backup(tmp_path: Path) -> None:
    run("set", "db", "key", "secret-value", "--url", "sqlite:///kv.db", folder=tmp_path)
    assert run("backup", "copy.db", folder=tmp_path).returncode == 0
    good = (tmp_path / "copy.db").read_bytes()
    connection = sqlite3.connect(tmp_path / "kv.db")
    connection.execute("UPDATE entries_v2 SET value = ?", (b"Secret-value",))
    connection.commit()
    connection.close()
    refused = run("backup", "--overwrite", "copy.db", folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "key 'key'" in refused.stderr
    assert "--no-check" in refused.stderr
    assert "ecret-value" not in refused.stderr
    assert (tmp_path / "copy.db").read_bytes() == good
    assert run("backup", "--no-check", "damaged.db", folder=tmp_path).returncode == 0
    (tmp_path / "cut.db").write_bytes(good[:4096])
    cut = run("check", "cut.db", folder=tmp_path)
    assert (cut.returncode, cut.stderr) == (1, "")
    assert "DAMAGED: nothing in it can be read" in cut.stdout
    assert "its end is missing" in cut.stdout


def test_file_of_version_1_is_sound_and_said_to_be_of_that_version(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "old.db")
    connection.executescript(
        "CREATE TABLE entries (db_name, key, expires_at, value); INSERT INTO entries VALUES ('db', 'k', 2e9, 'value'); "
        "PRAGMA application_id = 1634299755; PRAGMA user_version = 1;"
    )
    connection.close()
    done = run("check", "old.db", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sound: 1 entry, 5 bytes of values, tables of version 1 (renewed when a store or server opens it)" in done.stdout


def test_missing_file_is_named(tmp_path: Path) -> None:
    done = run("check", "none.db", folder=tmp_path)
    assert done.returncode == 2
    assert "none.db does not exist" in done.stderr


def test_copy_that_is_in_the_way_names_the_option_that_replaces_it(tmp_path: Path) -> None:
    run("set", "db", "key", "value", "--url", "sqlite:///kv.db", folder=tmp_path)
    (tmp_path / "copy.db").write_text("mine")
    done = run("backup", "copy.db", folder=tmp_path)
    assert (done.returncode, "--overwrite" in done.stderr) == (2, True)
    assert (tmp_path / "copy.db").read_text() == "mine"


def test_copy_for_which_its_disk_is_too_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("set", "db", "key", "value", "--url", "sqlite:///kv.db", folder=tmp_path)
    connect = sqlite3.connect

    def connect_to_full_disk(path: Path, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(path, **options)
        if path.name.startswith(".copy.db"):
            connection.execute("PRAGMA max_page_count = 1")
        return connection

    monkeypatch.setattr("aiokv.backends.sqlite_maintenance.sqlite3.connect", connect_to_full_disk)
    with pytest.raises(StorageError, match=r"copy\.db cannot be written: its disk is full"):
        backup(tmp_path / "kv.db", tmp_path / "copy.db")
    assert not (tmp_path / "copy.db").exists()
