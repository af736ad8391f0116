"""Stored entries that cannot be read or were written otherwise, and results that are too large to be stored."""

import asyncio
import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from caching_under_test import Cached, WatchedBackend, Work

from aiokv import (
    AsyncKVStore,
    CachedFunction,
    CacheEvent,
    Encrypted,
    ValueTooLargeError,
    Zstd,
    kv_cached,
)
from aiokv.caching.entries import FORMAT_VERSION
from aiokv.caching.results import ResultCodec


def _filled_in(text: str, number: CachedFunction[[], int]) -> str:
    schema = ResultCodec(number.__wrapped__, int, None).schema
    return text.replace("KEY", f'"{number.key()}"').replace("FORMAT", str(FORMAT_VERSION)).replace("SCHEMA", f'"{schema}"')


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("garbage", id="garbage"),
        pytest.param("[1]\n1", id="another envelope"),
        pytest.param("{}\n1", id="an object"),
        pytest.param("1\n1", id="a number"),
        pytest.param('[FORMAT,"number:0:other",SCHEMA,1700000000,1800000000,0,""]\n7', id="another key"),
        pytest.param('[1,KEY,SCHEMA,1700000000,1800000000,0,""]\n7', id="another format"),
        pytest.param('[1,KEY,1700000000,1800000000,0,""]\n7', id="the format of before"),
        pytest.param('[FORMAT,KEY,"other",1700000000,1800000000,0,""]\n7', id="another type"),
        pytest.param('[FORMAT,KEY,SCHEMA,1700000000,"x",0,""]\n7', id="a time that is none"),
        pytest.param('[FORMAT,KEY,SCHEMA,1700000000,1800000000,-1,""]\n7', id="a negative duration"),
        pytest.param('[FORMAT,KEY,SCHEMA,1700000000,1800000000,0,"zstd"]\nxxxxx', id="another codec"),
        pytest.param('[FORMAT,KEY,SCHEMA,1700000000,1800000000,0,""]\n{', id="a broken payload"),
        pytest.param('[FORMAT,KEY,SCHEMA,1700000000,1800000000,0,""]\n', id="no payload"),
    ],
)
async def test_entry_that_cannot_be_read_is_a_miss_that_is_overwritten(
    text: str, cached: Cached, store: AsyncKVStore, work: Work
) -> None:
    number = cached()
    await store.set(number.key(), _filled_in(text, number))
    assert [await number(), await number(), work.runs] == [1, 1, 1]


async def test_entry_that_another_process_wrote_is_read(cached: Cached, store: AsyncKVStore, work: Work) -> None:
    number = cached()
    await store.set(number.key(), _filled_in('[FORMAT,KEY,SCHEMA,1700000000,1800000000,0,""]\n7', number))
    assert (await number(), work.runs) == (7, 0)


async def test_entry_of_another_schema_is_a_miss_that_is_overwritten(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one", prefix="p")
    async def before() -> dict[str, str]:
        return {"a": "x"}

    @kv_cached(60, store=store, key=lambda: "one", prefix="p", returns=tuple[int, int])
    async def after() -> tuple[int, int]:
        return (1, 2)

    await before()
    assert await after() == (1, 2)
    peeked = await after.peek()
    assert peeked is not None
    assert peeked.value == (1, 2)


@pytest.mark.parametrize("before", [None, Zstd(min_bytes=0), Encrypted(b"a" * 32), [Zstd(min_bytes=0), Encrypted(b"a" * 32)]])
@pytest.mark.parametrize("after", [None, Encrypted(b"b" * 32)])
async def test_entry_of_another_codec_is_a_miss_that_is_overwritten(
    before: Any, after: Any, cached: Cached, work: Work
) -> None:
    if before is after is None:
        return
    await cached(codec=before)()
    number = cached(codec=after)
    assert [await number(), await number(), work.runs] == [2, 2, 2]


class Rotten:
    """A step that fails on reading with an error of its own."""

    name = "rotten"
    required = False

    def encode(self, data: bytes, context: bytes) -> bytes:
        return data + context[:0]

    def decode(self, data: bytes, context: bytes) -> bytes:
        if self.is_bad:
            raise zlib.error(context)
        return data

    is_bad = False


async def test_codec_that_fails_in_a_way_of_its_own_on_reading_is_a_miss_too(
    cached: Cached, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = cached(codec=Rotten())
    await number()
    monkeypatch.setattr(Rotten, "is_bad", True)
    assert await number.peek() is None
    monkeypatch.setattr(Rotten, "is_bad", False)
    assert (await number(), work.runs) == (1, 1)


@dataclasses.dataclass
class Strict:
    rate: int
    limit: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if self.rate > self.limit:
            raise LookupError("an entry of before the limit was lowered")


async def test_entry_that_todays_class_refuses_is_a_miss_that_is_overwritten(
    store: AsyncKVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([10, 5])

    @kv_cached(60, store=store, key=lambda: "one", returns=Strict)
    async def rate() -> Strict:
        await asyncio.sleep(0)
        return Strict(next(rates))

    assert (await rate()).rate == 10
    monkeypatch.setattr(Strict, "limit", 5)
    assert [(await rate()).rate, (await rate()).rate] == [5, 5]


async def test_new_version_leaves_old_entries_behind(cached: Cached, work: Work) -> None:
    old, new = cached(version=1), cached(version=2)
    assert [await old(), await new(), await old(), await new(), work.runs] == [1, 2, 1, 2, 2]
    assert old.key() != new.key()


@pytest.fixture
def large(store: AsyncKVStore) -> Callable[..., CachedFunction[[], str]]:
    def make(**options: Any) -> CachedFunction[[], str]:
        @kv_cached(60, store=store, key=lambda: "one", **options)
        async def text() -> str:
            await asyncio.sleep(0)
            return "s3cret" * 350_000

        return text

    return make


@pytest.mark.parametrize("write", ["await", "background"])
async def test_result_too_large_for_the_store_is_served_unstored(
    write: str,
    large: Callable[..., CachedFunction[[], str]],
    backend: WatchedBackend,
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[CacheEvent] = []
    text = large(write=write, observer=events.append)
    assert len(await text()) == 2_100_000
    await text.aclose()
    assert (backend.asked("set"), [event.kind for event in events]) == (0, ["miss", "computed", "not_stored"])
    assert "too large" in caplog.text
    assert "s3cret" not in caplog.text
    assert text.info().store_errors == 0


async def test_result_too_large_for_the_store_raises_where_that_is_asked_for(
    large: Callable[..., CachedFunction[[], str]],
) -> None:
    text = large(on_oversize="raise")
    with pytest.raises(ValueTooLargeError, match="1,900,000"):
        await text()


async def test_result_too_large_fits_compressed(large: Callable[..., CachedFunction[[], str]], backend: WatchedBackend) -> None:
    text = large(codec=Zstd(), on_oversize="raise")
    assert await text() == await text()
    assert backend.asked("set") == 1
