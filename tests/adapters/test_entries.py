"""Bytes under any key, for any time, in a store that keeps texts from 60 seconds to 30 days."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from datetime import timedelta
from pathlib import Path

import pytest
from helpers import still_clock
from hypothesis import given
from hypothesis import strategies as st

from aiokv import MAX_TTL_SECONDS, AsyncKVStore, UnsupportedError
from aiokv.adapters.entries import MAX_NAME_CHARS, Entries, name_of
from aiokv.backends.memory import MemoryBackend

ODD_KEYS = ["", ".", "..", "a\0b", "\udc80", "k" * 3000, "é" * 400, "a~" + "0" * 40, "k" * MAX_NAME_CHARS, "a/b;c d"]


class OnlyFour:
    """A backend without listing, batches and claims, as fal's service."""

    def __init__(self) -> None:
        self._backend = MemoryBackend()
        self.get, self.set, self.delete, self.aclose = (
            self._backend.get,
            self._backend.set,
            self._backend.delete,
            self._backend.aclose,
        )


@pytest.fixture(params=["memory", "sqlite", "four calls"])
async def entries(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Entries]:
    url = {"memory": f"memory://{tmp_path.name}", "sqlite": f"sqlite:///{tmp_path}/kv.db"}.get(request.param)
    store = AsyncKVStore("db", url=url) if url else AsyncKVStore("db", backend=OnlyFour())
    async with store:
        yield Entries(store)


@pytest.fixture
async def listed(tmp_path: Path) -> AsyncGenerator[Entries]:
    async with AsyncKVStore("db", url=f"memory://{tmp_path.name}") as store:
        yield Entries(store)


async def keys_of(entries: Entries, prefix: str = "") -> list[str]:
    listing = entries.keys(prefix)
    return sorted([key async for key in listing])


async def data_of(entries: Entries, key: str) -> bytes | None:
    held = await entries.get(key)
    return None if held is None else held.data


@pytest.mark.parametrize("data", [b"", b"text", "3 °C; rain\n".encode(), b"\0", b"\xff\xfe\0", bytes(range(256)) * 40])
async def test_bytes_come_back_as_they_were(entries: Entries, data: bytes) -> None:
    await entries.set("k", data, 60)
    assert await data_of(entries, "k") == data


@given(st.binary(), st.text(max_size=200))
async def test_any_bytes_come_back_under_any_key(data: bytes, key: str) -> None:
    entries = Entries(AsyncKVStore("any", url="memory://entries-any"))
    await entries.set(key, data)
    assert await data_of(entries, key) == data
    assert await entries.clear(key) == 1


async def test_entries_under_odd_keys_stay_apart(entries: Entries) -> None:
    await entries.set_many({key: str(number).encode() for number, key in enumerate(ODD_KEYS)})
    held = await entries.get_many(ODD_KEYS)
    assert [one and one.data for one in held] == [str(number).encode() for number in range(len(ODD_KEYS))]
    await entries.delete_many(ODD_KEYS[1:])
    assert [await data_of(entries, key) for key in ODD_KEYS] == [b"0"] + [None] * (len(ODD_KEYS) - 1)


@given(st.lists(st.text(max_size=600), unique=True, max_size=6))
def test_no_two_keys_have_one_name(keys: list[str]) -> None:
    keys = [*keys, *map(name_of, keys)]
    assert len({name_of(key) for key in keys}) == len(set(keys))


@pytest.mark.parametrize("ttl", [0.5, 1, 59.5, timedelta(seconds=3), 61.25, 3600])
async def test_entry_ends_exactly_when_it_was_asked_to(entries: Entries, ttl: float | timedelta) -> None:
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    with still_clock() as clock:
        await entries.set("k", b"v", ttl)
        clock.advance(seconds - 0.25)
        held = await entries.get("k")
        assert held is not None
        assert held.seconds_left == pytest.approx(0.25)
        clock.advance(0.25)
        assert await entries.get("k") is None
        assert await entries.get_many(["k"]) == [None]


@pytest.mark.parametrize("ttl", [None, 10 * MAX_TTL_SECONDS, float("inf")])
async def test_what_should_live_longer_than_thirty_days_ends_then(entries: Entries, ttl: float | None) -> None:
    with still_clock() as clock:
        await entries.set("k", b"v", ttl)
        held = await entries.get("k")
        assert held is not None
        assert held.seconds_left == (None if ttl is None else MAX_TTL_SECONDS)
        clock.advance(MAX_TTL_SECONDS - 60)
        assert await data_of(entries, "k") == b"v"
        clock.advance(60)
        assert await entries.get("k") is None


@pytest.mark.parametrize("ttl", [0, -1, timedelta(0)])
async def test_no_time_to_live_deletes(entries: Entries, ttl: float | timedelta) -> None:
    await entries.set("k", b"v")
    await entries.set("k", b"w", ttl)
    assert await entries.get("k") is None


@pytest.mark.parametrize("ttl", ["1", True])
async def test_time_to_live_of_another_type_is_refused(entries: Entries, ttl: object) -> None:
    with pytest.raises(TypeError, match="ttl must be seconds"):
        await entries.set("k", b"v", ttl)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not NaN"):
        await entries.set("k", b"v", float("nan"))


async def test_listing_names_each_key_once_and_no_expired_one(listed: Entries) -> None:
    with still_clock() as clock:
        await listed.set("short", b"v", 10)
        await listed.set("long", b"v", 3600)
        for key in ODD_KEYS:
            await listed.set(key, b"v")
        assert await keys_of(listed) == sorted(["short", "long", *ODD_KEYS])
        clock.advance(10)
        assert await keys_of(listed) == sorted(["long", *ODD_KEYS])


async def test_listing_by_prefix_takes_derived_names_too(listed: Entries) -> None:
    keys = ["a" * 63, "a" * 64, "a" * 65, "a" * 700, "a" * 63 + "b" * 700, "a\0b", "a\0c", "b", "aa~" + "1" * 40]
    await listed.set_many(dict.fromkeys(keys, b"v"))
    for prefix in ["", "a", "aa~", "a" * 63, "a" * 64, "a" * 66, "a" * 63 + "b", "a\0", "a\0b", "c", "."]:
        assert await keys_of(listed, prefix) == sorted(key for key in keys if key.startswith(prefix)), prefix


@pytest.mark.parametrize("prefix", ["", "a", "a" * 66, "a\0"])
async def test_clear_takes_the_entries_of_a_prefix_alone(listed: Entries, prefix: str) -> None:
    keys = ["a" * 63, "a" * 65, "a" * 700, "a\0b", "b"]
    await listed.set_many(dict.fromkeys(keys, b"v"))
    assert await listed.clear(prefix) == sum(key.startswith(prefix) for key in keys)
    assert await keys_of(listed) == sorted(key for key in keys if not key.startswith(prefix))


async def test_store_that_cannot_list_says_so() -> None:
    entries = Entries(AsyncKVStore("db", backend=OnlyFour()))
    with pytest.raises(UnsupportedError, match="cannot list its keys"):
        await entries.clear()


@pytest.mark.parametrize("text", ["", "v", "1;;t", "1;x;t;;v", "1;;b;;?", "1;;z;;v", "2;;t;;v", "1;nan"])
async def test_text_of_another_program_counts_as_absent_and_is_logged_once(
    entries: Entries, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    await entries.store.set("k", text)
    await entries.set("other", b"v")
    with caplog.at_level(logging.WARNING, "aiokv"):
        assert [await entries.get("k"), await entries.get("k")] == [None, None]
        assert [held and held.data for held in await entries.get_many(["k", "other"])] == [None, b"v"]
    assert [record.getMessage().partition(" holds")[0] for record in caplog.records] == ["db 'db'"]
    await entries.set("k", b"v")
    assert await data_of(entries, "k") == b"v"


async def count_up(entries: Entries) -> None:
    async with entries.alone("k"):
        held = await entries.get("k")
        number = int(held.data) if held else 0
        await asyncio.sleep(0)
        await entries.set("k", str(number + 1).encode())


async def test_blocks_of_one_key_run_one_after_the_other(entries: Entries) -> None:
    await asyncio.gather(*(count_up(entries) for _ in range(30)))
    assert await data_of(entries, "k") == b"30"


async def test_blocks_of_two_processes_run_one_after_the_other(listed: Entries) -> None:
    # Another object has locks of its own, as another process has.
    others = [listed, Entries(listed.store), Entries(listed.store)]
    await asyncio.gather(*(count_up(others[number % 3]) for number in range(12)))
    assert await data_of(listed, "k") == b"12"


async def test_block_that_fails_lets_the_next_one_in(entries: Entries) -> None:
    with pytest.raises(ZeroDivisionError):
        async with entries.alone("k"):
            raise ZeroDivisionError
    async with asyncio.timeout(5), entries.alone("k"):
        pass


def test_what_is_no_store_is_refused() -> None:
    with pytest.raises(TypeError, match="store must be an AsyncKVStore, not dict"):
        Entries({})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key must be str, not bytes"):
        name_of(b"k")  # type: ignore[arg-type]
