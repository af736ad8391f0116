"""Listings of a SQLite file: in the order of code points, bounded, and past damaged and expired rows."""

import asyncio
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from child_processes import execute
from helpers import FakeClock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokv import StorageError
from aiokv.backends.capabilities import Entry, Page
from aiokv.backends.sqlite import SqliteBackend
from aiokv.backends.sqlite_maintenance import check
from aiokv.backends.sqlite_scan import end_of
from aiokv.extension_wire import Listing, keys_path, shorten_cursor
from aiokv.server.requests import MAX_LINE_BYTES
from aiokv.testing.contract.scan import clearing

LAST = chr(sys.maxunicode)


async def listed(backend: SqliteBackend, prefix: str = "", limit: int = 1000) -> tuple[list[str], int]:
    """Return all keys of a prefix, and how many pages they took."""
    keys: list[str] = []
    pages, cursor = 0, None
    while True:
        page = await backend.scan("db", prefix, cursor, limit)
        assert len(page.infos) <= limit
        keys += [info.key for info in page.infos]
        pages, cursor = pages + 1, page.cursor
        if cursor is None:
            return keys, pages


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        ("", None),
        ("a", "b"),
        ("a\x7f", "a\x80"),
        ("\u07ff", "\u0800"),
        ("\ud7ff", "\ue000"),
        ("\uffff", "\U00010000"),
        (LAST, None),
        (LAST * 3, None),
        ("a" + LAST, "b"),
        ("\ud7ff" + LAST * 2, "\ue000"),
    ],
    ids=ascii,
)
def test_end_of_a_prefix_is_the_next_code_point_that_text_can_have(prefix: str, end: str | None) -> None:
    assert end_of(prefix) == end


EDGES = ["a", "b", "\x01", "\x7f", "\x80", "\u07ff", "\u0800", "\ud7ff", "\ue000", "\uffff", "\U00010000", LAST, "%", "_", "*"]
TEXTS = st.text(st.sampled_from(EDGES), min_size=1, max_size=4)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sets(TEXTS, max_size=40), prefix=TEXTS | st.just(""), limit=st.sampled_from([1, 2, 7, 1000]))
def test_prefix_lists_counts_and_clears_what_begins_with_it(tmp_path: Path, keys: set[str], prefix: str, limit: int) -> None:
    async def examine() -> None:
        backend = SqliteBackend(tmp_path / "kv.db")
        while (await backend.clear("db")).deleted:
            pass
        await backend.set_many("db", [Entry(key, "v", 60) for key in keys])
        expected = sorted(key for key in keys if key.startswith(prefix))
        assert (await listed(backend, prefix, limit))[0] == expected
        assert await backend.count("db", prefix) == len(expected)
        assert (await backend.clear("db", prefix)).deleted == len(expected)
        assert (await listed(backend))[0] == sorted(keys - set(expected))
        await backend.aclose()

    asyncio.run(examine())


async def test_long_run_of_expired_entries_is_passed_in_bounded_pages(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=3600)
    for start in range(0, 5000, 1000):
        await backend.set_many("db", [Entry(f"k{number:04}", "v", 60) for number in range(start, start + 1000)])
    await backend.set("db", "z", "v", 120)
    clock.advance(60)
    first = await backend.scan("db")
    assert first.infos == []
    assert first.cursor is not None
    assert await listed(backend) == (["z"], 6)
    keys, pages = await listed(backend, limit=1)
    assert keys == ["z"]
    assert pages <= 21
    assert await backend.count("db") == 1
    assert await backend.count("db", "k") == 0
    assert (await backend.clear("db", "k")).deleted == 1000
    await backend.aclose()


async def test_page_of_one_key_costs_no_page_for_each_expired_one_behind_it(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=3600)
    await backend.set_many("db", [Entry(f"k{number}", "v", 60 + 60 * (number % 2)) for number in range(10)])
    clock.advance(60)
    assert await listed(backend, limit=1) == (["k1", "k3", "k5", "k7", "k9"], 5)
    await backend.aclose()


async def test_listing_goes_on_in_another_process_and_after_reopening(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set_many("db", [Entry(key, "v", 60) for key in "abcd"])
    first = await backend.scan("db", limit=2)
    await backend.delete("db", "b")
    await backend.aclose()
    backend = SqliteBackend(tmp_path / "kv.db")
    second = await backend.scan("db", cursor=first.cursor, limit=2)
    assert [info.key for info in (*first.infos, *second.infos)] == list("abcd")
    await backend.aclose()


async def test_cursor_is_no_longer_than_the_key_without_its_prefix(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    prefix = "p" * 3000
    await backend.set_many("db", [Entry(prefix + name * 10, "v", 60) for name in "abc"])
    page = await backend.scan("db", prefix, limit=1)
    assert page.cursor is not None
    assert len(page.cursor) <= 11
    assert (await listed(backend, prefix, 1))[0] == [prefix + name * 10 for name in "abc"]
    await backend.aclose()


@pytest.mark.parametrize("cursor", ["", "z", "0123", "xx", "x0", "k\ud800"], ids=ascii)
async def test_cursor_of_something_else_is_refused(tmp_path: Path, cursor: str) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set("db", "k", "v", 60)
    with pytest.raises(ValueError, match=r"is none of a listing; give that of the page before, or None"):
        await backend.scan("db", cursor=cursor)
    await backend.aclose()


async def test_damaged_keys_end_no_listing(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.set_many("db", [Entry(f"k{number:03}", "v", 60) for number in range(600)])
    execute(path, "UPDATE entries_v2 SET key = CAST(x'6bff' || CAST(key AS BLOB) AS TEXT) WHERE key BETWEEN 'k100' AND 'k499'")
    expected = [f"k{number:03}" for number in (*range(100), *range(500, 600))]
    for limit in (1, 64, 1000):
        assert (await listed(backend, limit=limit))[0] == expected
        assert (await listed(backend, "k", limit))[0] == expected
    assert (await backend.clear("db", "k")).deleted == 600
    assert backend.usage("").entries == 0
    await backend.aclose()


async def test_size_and_expiry_are_those_of_the_entry(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock)
    await backend.set("db", "é", "😀" * 1000, 90)
    assert await backend.scan("db") == Page([("é", 1_000_090.0, 4000)], None)
    await backend.aclose()


async def test_clear_of_large_values_goes_in_several_transactions_and_to_its_end(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    for number in range(20):
        await backend.set("a:db", f"k{number}", "x" * 1_900_000, 60)
    commits = backend.gauges().commits or 0
    assert (await backend.clear("a:db", limit=19)).deleted == 19
    assert (backend.gauges().commits or 0) - commits == 3
    assert (await backend.clear("a:db")).deleted == 1
    assert backend.usage("a").entries == 0
    await backend.aclose()
    assert check(tmp_path / "kv.db").problems == ()


async def test_clear_that_fails_half_way_says_that_some_may_be_gone(tmp_path: Path) -> None:
    path = tmp_path / "kv.db"
    backend = SqliteBackend(path)
    await backend.set_many("db", [Entry(f"k{number}", "x", 60) for number in range(20)])
    execute(path, "UPDATE entries_v2 SET size_bytes = 16000000")
    execute(
        path,
        "CREATE TRIGGER no_more BEFORE DELETE ON entries_v2 WHEN (SELECT count(*) FROM entries_v2) < 18 "
        "BEGIN SELECT raise(ABORT, 'no more'); END",
    )
    with pytest.raises(StorageError) as raised:
        await backend.clear("db")
    assert raised.value.maybe_applied
    assert await backend.count("db") == 17
    await backend.aclose()


async def test_count_is_that_of_one_moment_in_another_thread(tmp_path: Path, clock: FakeClock) -> None:
    backend = SqliteBackend(tmp_path / "kv.db", clock=clock, sweep_interval_seconds=3600)
    await backend.set_many("db", [Entry(f"a{number}", "v", 60 + 60 * (number % 2)) for number in range(100)])
    await backend.set_many("other", [Entry(f"a{number}", "v", 60) for number in range(100)])
    await backend.set_many("db", [Entry(f"b{number}", "v", 60) for number in range(100)])
    clock.advance(60)
    assert [await backend.count("db"), await backend.count("db", "a"), await backend.count("db", "b")] == [50, 50, 0]
    assert [await backend.count("other"), await backend.count("none")] == [0, 0]
    counted = await asyncio.gather(*(backend.count("db", "a") for _ in range(8)))
    assert counted == [50] * 8
    await backend.aclose()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sets(TEXTS, max_size=40), prefix=TEXTS | st.just(""), limit=st.sampled_from([1, 2, 7, 1000]))
def test_clearing_in_steps_deletes_a_prefix_and_nothing_else(tmp_path: Path, keys: set[str], prefix: str, limit: int) -> None:
    async def run() -> None:
        backend = SqliteBackend(tmp_path / "kv.db")
        await backend.clear("db")
        await backend.set_many("db", [Entry(key, "v", 60) for key in sorted(keys)])
        steps = [step async for step in clearing(backend, "db", prefix, limit)]
        assert sum(step.deleted for step in steps) == sum(key.startswith(prefix) for key in keys)
        assert (await listed(backend))[0] == sorted(key for key in keys if not key.startswith(prefix))
        await backend.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("db_name", ["db", "d" * 2_000])
@pytest.mark.parametrize("prefix", ["", "p" * 4_000])
@pytest.mark.parametrize("letter", ["k", "é"])
async def test_longest_keys_are_cleared_by_cursors_that_fit_a_request_line(
    tmp_path: Path, db_name: str, prefix: str, letter: str
) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    room = (8_000 - len(db_name) - len(prefix) - 3) // len(quote(letter))
    keys = [f"{prefix}{letter * room}{number}" for number in range(5)]
    await backend.set_many(db_name, [Entry(key, "v", 60) for key in keys])
    steps = [step async for step in clearing(backend, db_name, prefix, 1)]
    assert [step.deleted for step in steps] == [1] * 5
    for step in steps[:-1]:
        path = keys_path(db_name, Listing(prefix, shorten_cursor(step.cursor or "", prefix), 1_000))
        assert len(f"DELETE {path} HTTP/1.1") <= MAX_LINE_BYTES
    await backend.aclose()


async def test_keys_that_come_behind_the_last_one_are_left(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set_many("db", [Entry(key, "v", 60) for key in "bdf"])
    first = await backend.clear("db", "", None, 1)
    await backend.set_many("db", [Entry(key, "v", 60) for key in "aceg"])
    second = await backend.clear("db", "", first.cursor)
    assert (first.deleted, second) == (1, (4, None))
    assert (await listed(backend))[0] == ["a", "g"]
    await backend.aclose()


@pytest.mark.parametrize("cursor", ["", "k", "5", ".k", "-1.k", "1.", "99999.k", "1e1.k", "0.y", "0.xzz"])
async def test_cursor_of_no_clearing_is_refused(tmp_path: Path, cursor: str) -> None:
    backend = SqliteBackend(tmp_path / "kv.db")
    await backend.set("db", "k", "v", 60)
    with pytest.raises(ValueError, match="cursor"):
        await backend.clear("db", "", cursor)
    assert await backend.count("db") == 1
    await backend.aclose()
