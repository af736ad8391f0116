"""How long a cached result is served, by what it is replaced, and what a program can say about that."""

import asyncio
import dataclasses
import math
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ClassVar

import caching_under_test
import orjson
import pytest
from caching_under_test import WatchedBackend, Work, settle, watched_store
from helpers import FakeClock

import aiokv.caching.cache
from aiokv import (
    AsyncKVStore,
    CachedFunction,
    CacheEvent,
    Encrypted,
    NearCache,
    ValueTooLargeError,
    Zstd,
    cache_bypass,
    cache_refresh,
    kv_cached,
)

backend = caching_under_test.backend
store = caching_under_test.store
work = caching_under_test.work


@pytest.fixture
def watched(clock: FakeClock) -> tuple[WatchedBackend, AsyncKVStore]:
    return watched_store(clock)


Cached = Callable[..., CachedFunction[[], int]]


@pytest.fixture
def cached(store: AsyncKVStore, work: Work, clock: FakeClock) -> Cached:
    """Give the work's cached form, by options of the test's; two of them are as two processes that share the store."""

    def make(ttl: Any = 60, **options: Any) -> CachedFunction[[], int]:
        @kv_cached(ttl, **{"store": store, "key": lambda: "one", "prefix": "number", "early": 0.0, **options})
        async def number() -> int:
            return await work()

        number._cache.clock = clock
        return number

    return make


async def _with_compute_seconds(number: CachedFunction[[], int], store: AsyncKVStore, seconds: float) -> None:
    text = await store.get(number.key())
    assert text is not None
    head, _, payload = text.partition("\n")
    fields = orjson.loads(head)
    fields[4] = seconds
    await store.set(number.key(), f"{orjson.dumps(fields).decode()}\n{payload}", 3600)


@pytest.mark.parametrize("ttl", [1, 1.0, 2.5, timedelta(seconds=1.5), 59, 60, 3600])
async def test_result_is_served_until_its_ttl_and_not_at_it(ttl: Any, cached: Cached, clock: FakeClock) -> None:
    number = cached(ttl)
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    assert await number() == 1
    clock.advance(seconds - 0.01)
    assert await number() == 1
    clock.advance(0.02)
    assert await number() == 2


async def test_ttl_may_follow_from_the_result(cached: Cached, clock: FakeClock) -> None:
    number = cached(lambda result: None if result == 1 else 10 * result)
    assert [await number(), await number()] == [1, 2]
    clock.advance(19)
    assert await number() == 2
    clock.advance(2)
    assert await number() == 3


@pytest.mark.parametrize("ttl", [0, 0.5, True, math.nan, 2_592_001, "60"])
async def test_ttl_of_the_result_is_checked(ttl: Any, cached: Cached, backend: WatchedBackend) -> None:
    with pytest.raises((ValueError, TypeError), match="ttl must be"):
        await cached(lambda _: ttl)()
    assert backend.asked("set") == 0


@pytest.mark.parametrize(("none_ttl", "stored_seconds"), [(..., 60), (None, 0), (5, 5), (timedelta(seconds=7), 7)], ids=str)
async def test_none_has_a_ttl_of_its_own(
    none_ttl: Any, stored_seconds: int, store: AsyncKVStore, clock: FakeClock, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", none_ttl=none_ttl, early=0.0)
    async def nothing() -> int | None:
        await work()
        return None

    nothing._cache.clock = clock
    assert await nothing() is None
    clock.advance(max(stored_seconds - 1, 0))
    assert await nothing() is None
    assert work.runs == (1 if stored_seconds else 2)
    clock.advance(2)
    await nothing()
    assert work.runs == (2 if stored_seconds else 3)


async def test_when_decides_what_is_stored(cached: Cached, backend: WatchedBackend) -> None:
    number = cached(when=lambda result: result >= 2)
    assert [await number(), backend.asked("set"), await number(), await number()] == [1, 0, 2, 2]


async def test_jitter_shortens_within_its_bounds_and_differs(store: AsyncKVStore, clock: FakeClock) -> None:
    @kv_cached(100, store=store, key=lambda name: name, jitter=0.2)
    async def number(name: int) -> int:
        return name

    number._cache.clock = clock
    ends = []
    for name in range(200):
        await number(name)
        text = await store.get(number.key(name))
        assert text is not None
        ends.append(orjson.loads(text.partition("\n")[0])[3] - clock.now)
    assert 80 <= min(ends) < 85
    assert 95 < max(ends) <= 100


async def test_stale_result_is_served_at_once_and_computed_once_behind(
    cached: Cached, backend: WatchedBackend, work: Work, clock: FakeClock
) -> None:
    number = cached(10, stale_while_revalidate=20)
    await number()
    clock.advance(15)
    gate = work.hold()
    async with asyncio.timeout(1):
        assert await asyncio.gather(*(number() for _ in range(10))) == [1] * 10
    await settle()
    # One look at what other processes do, not one for each caller.
    assert sum(verb == "set" or ":refreshing" in key for verb, key in backend.calls) <= 4
    gate.set()
    await settle()
    assert (await number(), work.runs) == (2, 2)


@pytest.fixture(params=[15.0, 9.9], ids=["stale", "early"])
async def behind(
    request: pytest.FixtureRequest, cached: Cached, store: AsyncKVStore, clock: FakeClock
) -> CachedFunction[[], int]:
    """Give a function whose stored result, 1, is computed anew behind the next caller."""
    number = cached(10, stale_while_revalidate=20, early=1_000_000.0)
    await number()
    await _with_compute_seconds(number, store, 1.0)
    clock.advance(request.param)
    return number


async def test_nobody_waits_for_what_is_computed_behind(behind: CachedFunction[[], int], work: Work) -> None:
    gate = work.hold()
    assert await behind() == 1
    await settle()
    assert work.runs == 2
    try:
        async with asyncio.timeout(10):
            assert await asyncio.gather(behind(), behind()) == [1, 1]
    finally:
        gate.set()
        await behind.aclose()
    assert (await behind(), work.runs) == (2, 2)


async def test_failure_behind_is_nobodys(behind: CachedFunction[[], int], work: Work) -> None:
    work.error = LookupError("behind")
    gate = work.hold()
    first = await behind()
    await settle()
    others = [asyncio.create_task(behind()) for _ in range(3)]
    await settle()
    gate.set()
    assert (first, await asyncio.gather(*others)) == (1, [1, 1, 1])
    await behind.aclose()
    assert work.runs == 2


async def test_cancelled_caller_does_not_end_what_is_computed_behind(behind: CachedFunction[[], int], work: Work) -> None:
    gate = work.hold()
    first = asyncio.create_task(behind())
    await settle()
    second = asyncio.create_task(behind())
    await settle()
    first.cancel()
    second.cancel()
    await settle()
    gate.set()
    await asyncio.gather(first, second, return_exceptions=True)
    await behind.aclose()
    assert (await behind(), work.runs, work.cancelled) == (2, 2, 0)


async def test_result_past_its_stale_time_is_computed_in_front(cached: Cached, work: Work, clock: FakeClock) -> None:
    number = cached(10, stale_while_revalidate=20)
    await number()
    clock.advance(31)
    assert (await number(), work.runs) == (2, 2)


async def test_invalidate_while_it_is_computed_behind_discards_that(cached: Cached, work: Work, clock: FakeClock) -> None:
    number = cached(10, stale_while_revalidate=20)
    await number()
    clock.advance(15)
    gate = work.hold()
    assert await number() == 1
    await settle()
    await number.invalidate()
    gate.set()
    await number.aclose()
    assert (work.runs, await number.peek()) == (2, None)


async def test_failure_is_answered_with_the_last_good_result_within_its_window(
    cached: Cached, work: Work, clock: FakeClock
) -> None:
    number = cached(10, stale_if_error=20)
    await number()
    work.error = LookupError("down")
    clock.advance(29)
    assert await number() == 1
    assert await asyncio.gather(*(number() for _ in range(5))) == [1] * 5
    clock.advance(2)
    with pytest.raises(LookupError, match="down"):
        await number()
    work.error = None
    assert await number() == work.runs


async def test_window_counts_at_the_time_of_the_failure(cached: Cached, work: Work, clock: FakeClock) -> None:
    number = cached(10, stale_if_error=20)
    await number()
    clock.advance(29)
    work.error = LookupError("down")
    gate = work.hold()
    call = asyncio.create_task(number())
    await settle()
    clock.advance(2)
    gate.set()
    with pytest.raises(LookupError, match="down"):
        await call


async def test_only_what_counts_as_a_failure_is_answered_so(cached: Cached, work: Work, clock: FakeClock) -> None:
    number = cached(10, stale_if_error=20, error_types=(OSError,))
    await number()
    clock.advance(11)
    work.error = ConnectionError("down")
    assert await number() == 1
    work.error = LookupError("a fault of the program")
    with pytest.raises(LookupError):
        await number()


@pytest.fixture
def certain_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiokv.caching.cache.random, "random", lambda: 0.5)


@pytest.mark.usefixtures("certain_chance")
async def test_result_is_computed_anew_before_it_expires_once_and_behind(
    cached: Cached, store: AsyncKVStore, work: Work, clock: FakeClock
) -> None:
    number = cached(60, early=1.0)
    await number()
    await _with_compute_seconds(number, store, 10.0)
    clock.advance(60 - 7.5)
    assert await number() == 1
    await settle()
    assert work.runs == 1
    clock.advance(1)
    gate = work.hold()
    async with asyncio.timeout(1):
        assert await asyncio.gather(*(number() for _ in range(10))) == [1] * 10
    await settle()
    gate.set()
    await settle()
    assert (await number(), work.runs) == (2, 2)


@pytest.mark.usefixtures("certain_chance")
async def test_early_of_nought_never_computes_before_the_end(
    cached: Cached, store: AsyncKVStore, work: Work, clock: FakeClock
) -> None:
    number = cached(60, early=0.0)
    await number()
    await _with_compute_seconds(number, store, 10.0)
    clock.advance(59.9)
    await number()
    await settle()
    assert work.runs == 1


async def test_newer_entry_of_another_process_is_taken_in_place_of_computing(
    cached: Cached, store: AsyncKVStore, backend: WatchedBackend, work: Work, clock: FakeClock
) -> None:
    number, other = cached(10, stale_while_revalidate=60), cached(10, stale_while_revalidate=60)
    await number()
    old = await store.get(number.key())
    assert old is not None
    clock.advance(15)
    await other.prime(100)
    newer = await store.get(number.key())
    assert newer is not None
    answers = iter([old])

    async def get(db_name: str, key: str) -> str | None:
        return next(answers, newer) if key == number.key() else await WatchedBackend.get(backend, db_name, key)

    backend.get = get  # type: ignore[method-assign]
    assert await number() == 1
    await settle()
    assert (await number(), work.runs) == (100, 1)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("garbage", id="garbage"),
        pytest.param("[1]\n1", id="another envelope"),
        pytest.param("{}\n1", id="an object"),
        pytest.param("1\n1", id="a number"),
        pytest.param('[1,"number:0:other",1000000,2000000,0,""]\n1', id="another key"),
        pytest.param('[2,KEY,1000000,2000000,0,""]\n1', id="another format"),
        pytest.param('[1,KEY,1000000,"x",0,""]\n1', id="a time that is none"),
        pytest.param('[1,KEY,1000000,2000000,-1,""]\n1', id="a negative duration"),
        pytest.param('[1,KEY,1000000,2000000,0,"zstd"]\nxxxxx', id="another codec"),
        pytest.param('[1,KEY,1000000,2000000,0,""]\n{', id="a broken payload"),
        pytest.param('[1,KEY,1000000,2000000,0,""]\n', id="no payload"),
    ],
)
async def test_entry_that_cannot_be_read_is_a_miss_that_is_overwritten(
    text: str, cached: Cached, store: AsyncKVStore, work: Work
) -> None:
    number = cached()
    await store.set(number.key(), text.replace("KEY", f'"{number.key()}"'))
    assert [await number(), await number(), work.runs] == [1, 1, 1]


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

    def encode(self, data: bytes, key: str) -> bytes:
        return data + key[:0].encode()

    def decode(self, data: bytes, key: str) -> bytes:
        if self.is_bad:
            raise zlib.error(key)
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


async def test_write_in_the_background_does_not_hold_the_caller(cached: Cached, backend: WatchedBackend, work: Work) -> None:
    number = cached(write="background")
    gate = backend.hold("set")
    async with asyncio.timeout(10):
        assert await number() == 1
    gate.set()
    await settle()
    assert (await number(), work.runs) == (1, 1)


async def test_bypass_neither_reads_nor_writes(cached: Cached, backend: WatchedBackend) -> None:
    number = cached(near=NearCache(30))
    await number()
    backend.calls.clear()
    with cache_bypass():
        assert await number() == 2
        assert await asyncio.gather(number(), number()) == [3, 4]
    assert (backend.calls, await number()) == ([], 1)


async def test_refresh_computes_anew_and_stores_for_everybody(cached: Cached) -> None:
    near = NearCache(30)
    number, elsewhere = cached(near=near), cached()
    await number()
    with cache_refresh():
        assert await number() == 2
    assert [await number(), await elsewhere()] == [2, 2]
    assert [await number.refresh(), await number(), await elsewhere()] == [3, 3, 3]


async def test_failed_refresh_leaves_what_is_stored(cached: Cached, work: Work) -> None:
    number = cached()
    await number()
    work.error = LookupError("down")
    with pytest.raises(LookupError):
        await number.refresh()
    assert await number() == 1


async def test_mode_ends_with_its_block_and_stays_in_its_task(cached: Cached, work: Work) -> None:
    number = cached()
    await number()
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def other() -> int:
        with cache_bypass():
            inside.set()
            await go_on.wait()
            return await number()

    bypassing = asyncio.create_task(other())
    await inside.wait()
    assert await number() == 1
    go_on.set()
    assert (await bypassing, work.runs) == (2, 2)
    with pytest.raises(LookupError), cache_bypass():
        raise LookupError
    assert await number() == 1


async def test_peek_looks_without_computing(cached: Cached, work: Work, clock: FakeClock) -> None:
    number = cached(10, stale_while_revalidate=20)
    assert await number.peek() is None
    await number()
    clock.advance(4)
    assert await number.peek() == (1, 4.0, True)
    clock.advance(8)
    assert await number.peek() == (1, 12.0, False)
    assert work.runs == 1


async def test_primed_result_is_served_like_a_computed_one(cached: Cached, work: Work, clock: FakeClock) -> None:
    number = cached(10)
    await number.prime(7)
    assert (await number(), work.runs) == (7, 0)
    clock.advance(11)
    assert (await number(), work.runs) == (1, 1)


async def test_prime_refuses_what_would_come_back_changed(cached: Cached) -> None:
    number = cached()
    with pytest.raises(TypeError):
        await number.prime((1, 2))  # type: ignore[arg-type]
    assert await number.peek() is None


@pytest.mark.parametrize("near", [False, True])
async def test_invalidated_result_is_computed_anew(*, near: bool, cached: Cached) -> None:
    number = cached(near=NearCache(30) if near else None)
    await number()
    await number.invalidate()
    assert [await number(), await number()] == [2, 2]


async def test_invalidate_of_nothing_succeeds(cached: Cached) -> None:
    await cached().invalidate()


async def test_key_is_where_the_store_holds_the_result(cached: Cached, store: AsyncKVStore) -> None:
    number = cached(version="v2")
    assert number.key().startswith("number:v2:")
    await number()
    assert await store.get(number.key()) is not None


async def test_info_counts_what_was_done(cached: Cached, store: AsyncKVStore, work: Work, clock: FakeClock) -> None:
    number = cached(10, stale_while_revalidate=10, stale_if_error=100)
    await number()
    await _with_compute_seconds(number, store, 2.0)
    await number()
    await number()
    clock.advance(15)
    gate = work.hold()
    await number()
    info = number.info()
    assert (info.hits, info.near_hits, info.stale_hits, info.misses, info.computations) == (2, 0, 1, 1, 1)
    assert info.seconds_saved == pytest.approx(6.0)
    gate.set()
    await settle()
    assert number.info().computations == 2


async def test_near_hits_are_counted_and_not_read(cached: Cached, backend: WatchedBackend, clock: FakeClock) -> None:
    number = cached(60, near=NearCache(30))
    await number()
    await number()
    assert (number.info().near_hits, number.info().hits, backend.asked("get")) == (1, 0, 1)
    clock.advance(31)
    assert await number() == 1
    assert (number.info().hits, backend.asked("get")) == (1, 2)


async def test_near_result_does_not_outlive_its_ttl(cached: Cached, clock: FakeClock) -> None:
    number = cached(10, near=NearCache(3600))
    await number()
    clock.advance(11)
    assert await number() == 2


async def test_observer_is_told_each_event_without_arguments_or_results(cached: Cached, work: Work, clock: FakeClock) -> None:
    events: list[CacheEvent] = []
    number = cached(10, stale_while_revalidate=10, stale_if_error=100, observer=events.append)
    await number()
    await number()
    clock.advance(15)
    await number()
    await settle()
    clock.advance(30)
    work.error = LookupError("down")
    await number()
    kinds = [event.kind for event in events]
    assert kinds == ["miss", "computed", "hit", "stale_hit", "computed", "miss", "stale_on_error"]
    assert {event.key for event in events} == {number.key()}
    assert all((event.seconds > 0) == (event.kind == "computed") for event in events)


async def test_raising_observer_harms_nobody(cached: Cached, caplog: pytest.LogCaptureFixture) -> None:
    def observer(event: CacheEvent) -> None:
        raise LookupError(event.kind)

    number = cached(observer=observer, near=NearCache(30))
    assert [await number(), await number(), await number()] == [1, 1, 1]
    assert "the observer of cached calls failed" in caplog.text


async def test_stale_window_is_kept_by_the_store(cached: Cached, work: Work, clock: FakeClock) -> None:
    number = cached(100, stale_if_error=500)
    await number()
    clock.advance(590)
    work.error = LookupError("down")
    assert await number() == 1


@pytest.mark.parametrize("reason", ["when", "too large"])
@pytest.mark.parametrize("near", [False, True])
async def test_refresh_whose_result_is_not_stored_leaves_nothing_older(
    reason: str, *, near: bool, store: AsyncKVStore, clock: FakeClock
) -> None:
    results = ["old", "x" * 2_100_000 if reason == "too large" else "new", "newest"]

    @kv_cached(60, store=store, key=lambda: "one", near=NearCache(30) if near else None, when=lambda text: text != "new")
    async def text() -> str:
        return results.pop(0)

    text._cache.clock = clock
    assert await text() == "old"
    refreshed = await text.refresh()
    assert refreshed != "old"
    assert await text() in {refreshed, "newest"}
    assert await text() in {refreshed, "newest"}


async def test_prime_of_what_cannot_be_stored_discards_nothing(cached: Cached, work: Work) -> None:
    number = cached()
    gate = work.hold()
    computing = asyncio.create_task(number())
    await settle()
    with pytest.raises(TypeError):
        await number.prime((1, 2))  # type: ignore[arg-type]
    gate.set()
    assert await computing == 1
    assert (await number(), work.runs) == (1, 1)
