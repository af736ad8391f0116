"""How long a cached result is served, and by what it is replaced."""

import asyncio
import math
from datetime import timedelta
from typing import Any

import orjson
import pytest
from caching_under_test import Cached, MovedTime, WatchedBackend, Work, settle, with_compute_seconds

import aiokv.caching.cache
from aiokv import (
    AsyncKVStore,
    CachedFunction,
    NearCache,
    kv_cached,
)


@pytest.mark.parametrize("ttl", [1, 1.0, 2.5, timedelta(seconds=1.5), 59, 60, 3600])
async def test_result_is_served_until_its_ttl_and_not_at_it(ttl: Any, cached: Cached, moved_time: MovedTime) -> None:
    number = cached(ttl)
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    assert await number() == 1
    moved_time.advance(seconds - 0.01)
    assert await number() == 1
    moved_time.advance(0.02)
    assert await number() == 2


async def test_ttl_may_follow_from_the_result(cached: Cached, moved_time: MovedTime) -> None:
    number = cached(lambda result: None if result == 1 else 10 * result)
    assert [await number(), await number()] == [1, 2]
    moved_time.advance(19)
    assert await number() == 2
    moved_time.advance(2)
    assert await number() == 3


@pytest.mark.parametrize("ttl", [True, math.nan, "60"])
async def test_ttl_of_the_result_is_checked(ttl: Any, cached: Cached, backend: WatchedBackend) -> None:
    with pytest.raises((ValueError, TypeError), match="ttl must be"):
        await cached(lambda _: ttl)()
    assert backend.asked("set") == 0


@pytest.mark.parametrize("ttl", [0, -1, 0.0, timedelta(0), timedelta(seconds=-1), -math.inf])
async def test_result_whose_ttl_is_over_already_is_not_stored(ttl: Any, cached: Cached, backend: WatchedBackend) -> None:
    number = cached(lambda _: ttl)
    assert [await number(), await number()] == [1, 2]
    assert (backend.asked("set"), number.info().not_stored) == (0, 2)


async def test_ttl_of_the_result_may_be_below_a_second(cached: Cached, moved_time: MovedTime) -> None:
    number = cached(lambda _: 0.5)
    assert await number() == 1
    moved_time.advance(0.49)
    assert await number() == 1
    moved_time.advance(0.02)
    assert await number() == 2


@pytest.mark.parametrize("ttl", [2_592_001, 10.0**12, timedelta(days=365), math.inf])
async def test_ttl_of_the_result_is_cut_at_30_days(ttl: Any, cached: Cached, moved_time: MovedTime) -> None:
    number = cached(lambda _: ttl)
    assert await number() == 1
    moved_time.advance(30 * 86_400 - 1)
    assert await number() == 1
    moved_time.advance(2)
    assert await number() == 2


async def test_ttl_counts_from_the_end_of_the_computation(store: AsyncKVStore, moved_time: MovedTime) -> None:
    runs = 0

    @kv_cached(60, store=store, key=lambda: "one", early=0.0)
    async def slow() -> int:
        nonlocal runs
        runs += 1
        moved_time.advance(50)
        return runs

    assert await slow() == 1
    moved_time.advance(59)
    assert await slow() == 1
    moved_time.advance(2)
    assert await slow() == 2


@pytest.mark.parametrize(("none_ttl", "stored_seconds"), [(..., 60), (None, 0), (5, 5), (timedelta(seconds=7), 7)], ids=str)
async def test_none_has_a_ttl_of_its_own(
    none_ttl: Any, stored_seconds: int, store: AsyncKVStore, moved_time: MovedTime, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", none_ttl=none_ttl, early=0.0)
    async def nothing() -> int | None:
        await work()
        return None

    assert await nothing() is None
    moved_time.advance(max(stored_seconds - 1, 0))
    assert await nothing() is None
    assert work.runs == (1 if stored_seconds else 2)
    moved_time.advance(2)
    await nothing()
    assert work.runs == (2 if stored_seconds else 3)


async def test_when_decides_what_is_stored(cached: Cached, backend: WatchedBackend) -> None:
    number = cached(when=lambda result: result >= 2)
    assert [await number(), backend.asked("set"), await number(), await number()] == [1, 0, 2, 2]


async def test_jitter_shortens_within_its_bounds_and_differs(store: AsyncKVStore, moved_time: MovedTime) -> None:
    @kv_cached(100, store=store, key=lambda name: name, jitter=0.2)
    async def number(name: int) -> int:
        return name

    ends = []
    for name in range(200):
        await number(name)
        text = await store.get(number.key(name))
        assert text is not None
        ends.append(orjson.loads(text.partition("\n")[0])[4] - moved_time.now())
    assert 80 <= min(ends) < 85
    assert 95 < max(ends) <= 100


async def test_stale_result_is_served_at_once_and_computed_once_behind(
    cached: Cached, backend: WatchedBackend, work: Work, moved_time: MovedTime
) -> None:
    number = cached(10, stale_while_revalidate=20)
    await number()
    moved_time.advance(15)
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
    request: pytest.FixtureRequest, cached: Cached, store: AsyncKVStore, moved_time: MovedTime
) -> CachedFunction[[], int]:
    """Return a function whose stored result, 1, the next call refreshes in the background."""
    number = cached(10, stale_while_revalidate=20, early=1_000_000.0)
    await number()
    await with_compute_seconds(number, store, 1.0)
    moved_time.advance(request.param)
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
    # Counted before the next call, which computes ahead again.
    assert work.runs == 2
    assert await behind() == 2


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
    assert (work.runs, work.cancelled) == (2, 0)
    assert await behind() == 2


async def test_result_past_its_stale_time_is_computed_in_front(cached: Cached, work: Work, moved_time: MovedTime) -> None:
    number = cached(10, stale_while_revalidate=20)
    await number()
    moved_time.advance(31)
    assert (await number(), work.runs) == (2, 2)


async def test_invalidate_while_it_is_computed_behind_discards_that(cached: Cached, work: Work, moved_time: MovedTime) -> None:
    number = cached(10, stale_while_revalidate=20)
    await number()
    moved_time.advance(15)
    gate = work.hold()
    assert await number() == 1
    await settle()
    await number.invalidate()
    gate.set()
    await number.aclose()
    assert (work.runs, await number.peek()) == (2, None)


async def test_failure_is_answered_with_the_last_good_result_within_its_window(
    cached: Cached, work: Work, moved_time: MovedTime
) -> None:
    number = cached(10, stale_if_error=20)
    await number()
    work.error = LookupError("down")
    moved_time.advance(29)
    assert await number() == 1
    assert await asyncio.gather(*(number() for _ in range(5))) == [1] * 5
    moved_time.advance(2)
    with pytest.raises(LookupError, match="down"):
        await number()
    work.error = None
    assert await number() == work.runs


async def test_window_counts_at_the_time_of_the_failure(cached: Cached, work: Work, moved_time: MovedTime) -> None:
    number = cached(10, stale_if_error=20)
    await number()
    moved_time.advance(29)
    work.error = LookupError("down")
    gate = work.hold()
    call = asyncio.create_task(number())
    await settle()
    moved_time.advance(2)
    gate.set()
    with pytest.raises(LookupError, match="down"):
        await call


async def test_only_what_counts_as_a_failure_is_answered_so(cached: Cached, work: Work, moved_time: MovedTime) -> None:
    number = cached(10, stale_if_error=20, error_types=(OSError,))
    await number()
    moved_time.advance(11)
    work.error = ConnectionError("down")
    assert await number() == 1
    work.error = LookupError("a fault of the program")
    # After a failure the next attempt waits a second.
    moved_time.advance(1)
    with pytest.raises(LookupError):
        await number()


@pytest.fixture
def certain_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiokv.caching.cache.random, "random", lambda: 0.5)


@pytest.mark.usefixtures("certain_chance")
async def test_result_is_computed_anew_before_it_expires_once_and_behind(
    cached: Cached, store: AsyncKVStore, work: Work, moved_time: MovedTime
) -> None:
    number = cached(60, early=1.0)
    await number()
    await with_compute_seconds(number, store, 10.0)
    moved_time.advance(60 - 7.5)
    assert await number() == 1
    await settle()
    assert work.runs == 1
    moved_time.advance(1)
    gate = work.hold()
    async with asyncio.timeout(1):
        assert await asyncio.gather(*(number() for _ in range(10))) == [1] * 10
    await settle()
    gate.set()
    await settle()
    assert (await number(), work.runs) == (2, 2)


@pytest.mark.usefixtures("certain_chance")
async def test_early_of_nought_never_computes_before_the_end(
    cached: Cached, store: AsyncKVStore, work: Work, moved_time: MovedTime
) -> None:
    number = cached(60, early=0.0)
    await number()
    await with_compute_seconds(number, store, 10.0)
    moved_time.advance(59.9)
    await number()
    await settle()
    assert work.runs == 1


async def test_newer_entry_of_another_process_is_taken_in_place_of_computing(  # noqa: PLR0913, PLR0917 (fixtures)
    cached: Cached, store: AsyncKVStore, twin: AsyncKVStore, backend: WatchedBackend, work: Work, moved_time: MovedTime
) -> None:
    number, other = cached(10, stale_while_revalidate=60), cached(10, store=twin, stale_while_revalidate=60)
    await number()
    old = await store.get(number.key())
    assert old is not None
    moved_time.advance(15)
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


async def test_near_result_does_not_outlive_its_ttl(cached: Cached, moved_time: MovedTime) -> None:
    number = cached(10, near=NearCache(3600))
    await number()
    moved_time.advance(11)
    assert await number() == 2


async def test_stale_window_is_kept_by_the_store(cached: Cached, work: Work, moved_time: MovedTime) -> None:
    number = cached(100, stale_if_error=500)
    await number()
    moved_time.advance(590)
    work.error = LookupError("down")
    assert await number() == 1
