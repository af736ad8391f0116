"""Damage in a file: found at the read, never shown, never passed on, and gone once the key is written again."""

import asyncio
import contextlib
import logging
import sqlite3
from pathlib import Path

import pytest
from helpers import FakeClock, all_texts

from aiokv import CorruptValueError, StorageError
from aiokv.backends.base import HostingOptions
from aiokv.backends.registry import open_backend
from aiokv.backends.scheme import ClientOptions
from aiokv.backends.sqlite import SqliteBackend
from aiokv.errors import ConfigurationError

VALUE = "s3cret value"


async def stored(path: Path, clock: FakeClock, value: str = VALUE, hosting: HostingOptions | None = None) -> SqliteBackend:
    backend = SqliteBackend(path, clock=clock, hosting=hosting)
    await backend.set("db", "k", value, 60)
    return backend


def execute(path: Path, statement: str, *parameters: object) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement, parameters)


def flip_bytes(path: Path, needle: bytes, replacement: bytes) -> int:
    """Change bytes of a closed file as a failing disk would; return how many places were changed."""
    data = path.read_bytes()
    path.write_bytes(data.replace(needle, replacement))
    return data.count(needle)


@pytest.mark.parametrize("value", [VALUE, VALUE + "x" * 100_000], ids=["short", "long"])
async def test_flipped_bit_is_an_error_that_shows_nothing(
    tmp_path: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    path = tmp_path / "kv.db"
    await (await stored(path, clock, value)).aclose()
    assert flip_bytes(path, b"s3cret", b"s2cret") == 1
    backend = SqliteBackend(path, clock=clock)
    with caplog.at_level(logging.DEBUG), pytest.raises(CorruptValueError, match="is damaged; set the key anew") as caught:
        await backend.get("db", "k")
    assert "cret" not in all_texts(caught.value) + caplog.text
    assert (caught.value.verb, caught.value.db_name, caught.value.key) == ("get", "db", "k")
    assert not caught.value.transient
    with pytest.raises(CorruptValueError):
        backend.get_now("db", "k")
    assert backend.gauges().failures == 2
    await backend.aclose()


async def test_value_that_is_no_utf_8_is_an_error_that_shows_nothing(tmp_path: Path, clock: FakeClock) -> None:
    path = tmp_path / "kv.db"
    await (await stored(path, clock)).aclose()
    assert flip_bytes(path, b"s3cret value", b"s3cret\xff\xfe\xfa\xc0ue") == 1
    backend = SqliteBackend(path, clock=clock)
    with pytest.raises(CorruptValueError) as caught:
        await backend.get("db", "k")
    assert "cret" not in all_texts(caught.value)
    await backend.aclose()


@pytest.mark.parametrize("column", ["db_name", "key"])
async def test_value_under_another_name_is_not_served(tmp_path: Path, clock: FakeClock, column: str) -> None:
    backend = await stored(tmp_path / "kv.db", clock)
    execute(tmp_path / "kv.db", f"UPDATE entries_v2 SET {column} = 'other'")
    with pytest.raises(CorruptValueError):
        await backend.get("other" if column == "db_name" else "db", "other" if column == "key" else "k")
    await backend.aclose()


async def test_value_of_another_type_is_an_error(tmp_path: Path, clock: FakeClock) -> None:
    backend = await stored(tmp_path / "kv.db", clock)
    execute(tmp_path / "kv.db", "UPDATE entries_v2 SET checksum = checksum + 1")
    with pytest.raises(CorruptValueError):
        await backend.get("db", "k")
    await backend.aclose()


async def test_damaged_entry_can_be_set_anew_and_deleted(tmp_path: Path, clock: FakeClock) -> None:
    backend = await stored(tmp_path / "kv.db", clock)
    await backend.set("db", "other", VALUE, 60)
    execute(tmp_path / "kv.db", "UPDATE entries_v2 SET value = x'00'")
    await backend.set("db", "k", "new", 60)
    await backend.delete("db", "other")
    assert (await backend.get("db", "k"), await backend.get("db", "other")) == ("new", None)
    assert await backend.health() is None
    assert backend.usage("") == (3, 1)
    await backend.aclose()


def spoil_pages(path: Path) -> None:
    """Write noise over every page but the first, which says that it is a database."""
    data = path.read_bytes()
    path.write_bytes(data[:4096] + b"\x5a" * (len(data) - 4096))


async def test_page_of_noise_is_an_error_that_says_what_to_do_and_the_store_is_not_well(
    tmp_path: Path, clock: FakeClock
) -> None:
    path = tmp_path / "kv.db"
    backend = await stored(path, clock)
    await asyncio.gather(*(backend.set("db", f"k{i}", VALUE, 60) for i in range(500)))
    await backend.aclose()
    spoil_pages(path)
    backend = SqliteBackend(path, clock=clock)
    with pytest.raises(StorageError, match=r"is damaged; .*put a backup in its place.*aiokv check"):
        await backend.get("db", "k")
    with pytest.raises(StorageError, match="is damaged"):
        await backend.set("db", "k", "v", 60)
    assert "is damaged" in (await backend.health() or "")
    await backend.aclose()


async def test_quick_check_refuses_a_damaged_file_and_takes_a_sound_one(tmp_path: Path, clock: FakeClock) -> None:
    path, hosting = tmp_path / "kv.db", HostingOptions(quick_check=True)
    await (await stored(path, clock)).aclose()
    backend = SqliteBackend(path, clock=clock, hosting=hosting)
    assert await backend.get("db", "k") == VALUE
    await asyncio.gather(*(backend.set("db", f"k{i}", VALUE, 60) for i in range(500)))
    await backend.aclose()
    data = bytearray(path.read_bytes())
    # Near the end, among pages of entries: the tables can still be opened.
    data[-4096 * 3 :] = b"\x5a" * (4096 * 3)
    path.write_bytes(data)
    backend = SqliteBackend(path, clock=clock, hosting=hosting)
    with pytest.raises(StorageError, match=r"is damaged; .*put a backup in its place"):
        await backend.get("absent", "k")
    await backend.aclose()
    careless = SqliteBackend(path, clock=clock)
    assert await careless.get("absent", "k") is None
    await careless.aclose()


def test_quick_check_is_refused_where_there_is_no_file() -> None:
    with pytest.raises(ConfigurationError, match="quick_check needs a store with a file"):
        open_backend("memory://", ClientOptions(hosting=HostingOptions(quick_check=True)))


async def test_options_of_a_host_reach_a_file_and_nothing_else(tmp_path: Path) -> None:
    options = ClientOptions(hosting=HostingOptions(min_free_bytes=1 << 60, ballast_bytes=4096))
    await open_backend("memory://hosting-options", options).set("db", "k", "v", 60)
    backend = open_backend(f"sqlite:///{tmp_path}/kv.db", options)
    with pytest.raises(StorageError, match="no room left above its floor"):
        await backend.set("db", "k", "v", 60)
    await backend.aclose()


@pytest.mark.parametrize("options", [{"min_free_bytes": -1}, {"ballast_bytes": -1}])
def test_negative_size_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="must be 0 or more"):
        HostingOptions(**options)


@pytest.mark.parametrize("wrong", ["1", 1.5, True])
def test_size_of_another_type_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="min_free_bytes must be int"):
        HostingOptions(min_free_bytes=wrong)  # type: ignore[arg-type]
