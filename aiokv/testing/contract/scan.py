"""What a backend promises that lists its keys."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Final

import pytest

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import MAX_BATCH_KEYS, Cleared, KeyInfo, ScanBackend, capabilities_of
from aiokv.testing.contract.suite import ODD_KEYS, ContractSuite, Passing

_PREFIXES: Final = [
    "k",
    "a",
    "%",
    "_",
    "*",
    "[",
    "[a",
    "{",
    "\\",
    "/",
    "é",
    "e\u0301",
    "😀",
    "\uffff",
    "\U0010ffff",
    "?",
    "'",
    "x",
]


async def pages(scan: ScanBackend, db_name: str, prefix: str = "", limit: int = MAX_BATCH_KEYS) -> AsyncIterator[list[KeyInfo]]:
    """List a namespace page by page.

    Args:
        scan: The capability.
        db_name: The namespace.
        prefix: What the keys begin with.
        limit: Most keys of a page.

    Yields:
        Each page's entries.
    """
    cursor: str | None = None
    while True:
        page = await scan.scan(db_name, prefix, cursor, limit)
        assert len(page.infos) <= limit
        yield list(page.infos)
        if page.cursor is None:
            return
        cursor = page.cursor


async def listed(scan: ScanBackend, db_name: str, prefix: str = "", limit: int = MAX_BATCH_KEYS) -> list[KeyInfo]:
    """List a namespace whole.

    Args:
        scan: The capability.
        db_name: The namespace.
        prefix: What the keys begin with.
        limit: Most keys of a page.

    Returns:
        The entries of all pages.
    """
    return [info async for page in pages(scan, db_name, prefix, limit) for info in page]


async def clearing(scan: ScanBackend, db_name: str, prefix: str, limit: int) -> AsyncIterator[Cleared]:
    """Clear a prefix step by step.

    Args:
        scan: The capability.
        db_name: The namespace.
        prefix: What the keys begin with.
        limit: Most entries of a step.

    Yields:
        Each step.
    """
    cursor: str | None = None
    while True:
        step = await scan.clear(db_name, prefix, cursor, limit)
        yield step
        if step.cursor is None:
            return
        cursor = step.cursor


async def fill(backend: Backend, db_name: str, keys: list[str]) -> None:
    """Store an entry for each key.

    Args:
        backend: The backend.
        db_name: The namespace.
        keys: The keys.
    """
    for start in range(0, len(keys), 200):
        await asyncio.gather(*(backend.set(db_name, key, "v", 3600) for key in keys[start : start + 200]))


class ScanContract(ContractSuite):
    """The promises of `ScanBackend`."""

    @pytest.fixture
    def scan(self, backend: Backend) -> ScanBackend:
        """The backend's capability."""
        found = capabilities_of(backend).scan
        assert found is not None, "the backend has no ScanBackend"
        return found

    async def test_listing_of_an_empty_namespace_is_empty(self, scan: ScanBackend) -> None:
        assert await listed(scan, "db") == []
        assert (await scan.count("db"), await scan.clear("db")) == (0, (0, None))

    async def test_listing_has_size_and_expiry_of_each_entry(self, backend: Backend, scan: ScanBackend) -> None:
        await backend.set("db", "one", "é😀", 100)
        await backend.set("db", "two", "", 1100)
        infos = {info.key: info for info in await listed(scan, "db")}
        assert {key: info.value_bytes for key, info in infos.items()} == {"one": 6, "two": 0}
        assert 990 < infos["two"].expires_at - infos["one"].expires_at < 1010

    @pytest.mark.parametrize("limit", [1, 7, MAX_BATCH_KEYS])
    async def test_pages_together_list_every_key_once(self, backend: Backend, scan: ScanBackend, limit: int) -> None:
        keys = [f"k{i}" for i in range(30)]
        await fill(backend, "db", keys)
        assert sorted(info.key for info in await listed(scan, "db", limit=limit)) == sorted(keys)

    async def test_namespace_of_more_keys_than_a_page_is_listed_whole(self, backend: Backend, scan: ScanBackend) -> None:
        keys = [f"k{i}" for i in range(MAX_BATCH_KEYS + 100)]
        await fill(backend, "db", keys)
        assert sorted(info.key for info in await listed(scan, "db")) == sorted(keys)
        assert await scan.count("db") == len(keys)

    async def test_listing_in_order_is_in_the_order_of_code_points(self, backend: Backend, scan: ScanBackend) -> None:
        if not scan.scans_in_order:
            pytest.skip("the backend does not promise it")
        await fill(backend, "db", ODD_KEYS)
        assert [info.key for info in await listed(scan, "db", limit=3)] == sorted(ODD_KEYS)

    async def test_odd_keys_are_listed_and_counted_as_they_are(self, backend: Backend, scan: ScanBackend) -> None:
        await fill(backend, "db", ODD_KEYS)
        assert sorted(info.key for info in await listed(scan, "db", limit=5)) == sorted(ODD_KEYS)
        assert await scan.count("db") == len(ODD_KEYS)

    @pytest.mark.parametrize("prefix", _PREFIXES, ids=ascii)
    async def test_prefix_is_taken_literally(self, backend: Backend, scan: ScanBackend, prefix: str) -> None:
        keys = [*ODD_KEYS, *(f"{other}{tail}" for other in _PREFIXES for tail in ("1", "\U0010ffff", other))]
        keys = list(dict.fromkeys(keys))
        await fill(backend, "db", keys)
        expected = sorted(key for key in keys if key.startswith(prefix))
        assert sorted(info.key for info in await listed(scan, "db", prefix, limit=2)) == expected
        assert await scan.count("db", prefix) == len(expected)
        assert await scan.clear("db", prefix) == (len(expected), None)
        assert sorted(info.key for info in await listed(scan, "db")) == sorted(set(keys) - set(expected))

    async def test_other_namespaces_are_neither_listed_nor_cleared(self, backend: Backend, scan: ScanBackend) -> None:
        names = ["one", "on", "one:", "one ", "One", "o%", "o*"]
        for db_name in names:
            await backend.set(db_name, f"key of {db_name}", "v", 60)
        for db_name in names:
            assert [info.key for info in await listed(scan, db_name)] == [f"key of {db_name}"]
            assert await scan.count(db_name) == 1
        assert await scan.clear("o%") == (1, None)
        assert [await scan.count(db_name) for db_name in names] == [1, 1, 1, 1, 1, 0, 1]

    async def test_expired_entries_are_neither_listed_nor_counted(
        self, backend: Backend, scan: ScanBackend, passing: Passing
    ) -> None:
        for i in range(5):
            await backend.set("db", f"short {i}", "v", passing.life_seconds)
        await backend.set("db", "long", "v", 600)
        await passing.wait(0.5)
        assert (len(await listed(scan, "db")), await scan.count("db"), await scan.count("db", "short")) == (6, 6, 5)
        await passing.wait(0.5)
        assert [info.key for info in await listed(scan, "db")] == ["long"]
        assert (await scan.count("db"), await scan.count("db", "short")) == (1, 0)

    async def test_setting_anew_changes_the_listing_of_an_entry(self, backend: Backend, scan: ScanBackend) -> None:
        await backend.set("db", "k", "v", 100)
        before = (await listed(scan, "db"))[0]
        await backend.set("db", "k", "longer", 1100)
        (after,) = await listed(scan, "db")
        assert (before.value_bytes, after.value_bytes) == (1, 6)
        assert 990 < after.expires_at - before.expires_at < 1010

    @pytest.mark.parametrize("seed", range(4))
    async def test_entry_that_stays_is_listed_exactly_once_under_writes(
        self, backend: Backend, scan: ScanBackend, seed: int
    ) -> None:
        draw = random.Random(seed)  # noqa: S311 (a reproducible choice, no secret)
        staying, passing_by = [f"stays {i}" for i in range(120)], [f"goes {i}" for i in range(120)]
        both = [*staying, *passing_by]
        draw.shuffle(both)
        await fill(backend, "db", both)
        keys: list[str] = []
        added = 0
        async for page in pages(scan, "db", limit=draw.choice([3, 10, 40])):
            keys += [info.key for info in page]
            for _ in range(8):
                key = draw.choice(both)
                if key in staying or draw.random() < 0.3:
                    await backend.set("db", key, "anew", 3600)
                elif draw.random() < 0.5:
                    await backend.delete("db", key)
                else:
                    await backend.set("db", f"new {draw.random()}", "v", 3600)
                    added += 1
            if added > 60:
                # The listing must be able to catch up with the writer.
                both = staying
        counts = Counter(keys)
        assert [key for key in staying if counts[key] != 1] == []
        assert [key for key, count in counts.items() if count > 1 and key.startswith("new")] == []

    async def test_entry_that_was_deleted_before_is_not_listed(self, backend: Backend, scan: ScanBackend) -> None:
        await fill(backend, "db", [f"k{i}" for i in range(20)])
        for i in range(0, 20, 2):
            await backend.delete("db", f"k{i}")
        assert sorted(info.key for info in await listed(scan, "db", limit=4)) == sorted(f"k{i}" for i in range(1, 20, 2))
        assert await scan.count("db") == 10

    async def test_cursor_stays_good_when_the_entries_around_it_go(self, backend: Backend, scan: ScanBackend) -> None:
        keys = [f"k{i}" for i in range(20)]
        await fill(backend, "db", keys)
        page = await scan.scan("db", "", None, 5)
        for info in page.infos:
            await backend.delete("db", info.key)
        left = {*keys} - {info.key for info in page.infos}
        following, cursor = [], page.cursor
        while cursor is not None:
            page = await scan.scan("db", "", cursor, 5)
            following += [info.key for info in page.infos]
            cursor = page.cursor
        assert sorted(following) == sorted(left)

    async def test_clear_deletes_up_to_its_limit_and_says_how_many(self, backend: Backend, scan: ScanBackend) -> None:
        keys = [f"k{i}" for i in range(25)]
        await fill(backend, "db", keys)
        assert [(await scan.clear("db", limit=10)).deleted for _ in range(4)] == [10, 10, 5, 0]
        assert [await backend.get("db", key) for key in keys] == [None] * 25
        assert await scan.count("db") == 0

    async def test_clear_of_expired_entries_leaves_nothing(self, backend: Backend, scan: ScanBackend, passing: Passing) -> None:
        await backend.set("db", "short", "v", passing.life_seconds)
        await backend.set("db", "long", "v", 600)
        await passing.wait(1)
        assert (await scan.clear("db")).deleted in {1, 2}
        assert await scan.clear("db") == (0, None)

    async def test_steps_of_clearing_come_to_an_end_and_never_to_a_cursor_twice(
        self, backend: Backend, scan: ScanBackend
    ) -> None:
        keys = [*(f"k{i}" for i in range(40)), *(f"other {i}" for i in range(10))]
        await fill(backend, "db", keys)
        cleared = [step async for step in clearing(scan, "db", "k", 7)]
        assert sum(step.deleted for step in cleared) == 40
        assert all(step.deleted <= 7 for step in cleared)
        cursors = [step.cursor for step in cleared]
        assert len({*cursors}) == len(cursors)
        assert sorted(info.key for info in await listed(scan, "db")) == sorted(keys[40:])

    @pytest.mark.parametrize("new", ["after {}", "before {}", "k{}"])
    async def test_clearing_ends_beside_a_writer_that_is_faster(self, backend: Backend, scan: ScanBackend, new: str) -> None:
        keys = [f"k{i:02}" for i in range(30)]
        await fill(backend, "db", keys)
        steps = 0
        async with asyncio.timeout(15):
            async for _ in clearing(scan, "db", "", 10):
                steps += 1
                await fill(backend, "db", [new.format(f"{steps:04} {i:02}") for i in range(12)])
        # A table that grows meanwhile may take a few steps more.
        assert steps <= 60
        assert [await backend.get("db", key) for key in keys] == [None] * 30

    @pytest.mark.parametrize("cursor", ["", "x", "1", "-1", "99999999999999999999999999999999999999", "1.1.1.1", "\ud800"])
    async def test_made_up_cursor_is_refused_or_deletes_nothing_else(
        self, backend: Backend, scan: ScanBackend, cursor: str
    ) -> None:
        await fill(backend, "db", ["other"])
        for call in (scan.scan("db", "k", cursor), scan.clear("db", "k", cursor)):
            with contextlib.suppress(ValueError):
                await call
        assert [info.key for info in await listed(scan, "db")] == ["other"]

    async def test_cleared_keys_can_be_set_anew(self, backend: Backend, scan: ScanBackend) -> None:
        await fill(backend, "db", ["a", "b"])
        await scan.clear("db")
        await backend.set("db", "b", "again", 60)
        assert [info.key for info in await listed(scan, "db")] == ["b"]
