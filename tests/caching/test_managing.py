"""Modes, `refresh`, `prime`, `peek` and `invalidate` of a cached function, and what it counts and reports."""

import asyncio

import pytest
from caching_under_test import Cached, MovedTime, WatchedBackend, Work, settle, with_compute_seconds

from aiokv import (
    AsyncKVStore,
    CacheEvent,
    NearCache,
    cache_bypass,
    cache_refresh,
    kv_cached,
)


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


async def test_refresh_computes_anew_and_stores_for_everybody(cached: Cached, twin: AsyncKVStore) -> None:
    near = NearCache(30)
    number, elsewhere = cached(near=near), cached(store=twin)
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


async def test_peek_looks_without_computing(cached: Cached, work: Work, moved_time: MovedTime) -> None:
    number = cached(10, stale_while_revalidate=20)
    assert await number.peek() is None
    await number()
    moved_time.advance(4)
    assert await number.peek() == (1, 4.0, True)
    moved_time.advance(8)
    assert await number.peek() == (1, 12.0, False)
    assert work.runs == 1


async def test_primed_result_is_served_like_a_computed_one(cached: Cached, work: Work, moved_time: MovedTime) -> None:
    number = cached(10)
    await number.prime(7)
    assert (await number(), work.runs) == (7, 0)
    moved_time.advance(11)
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


async def test_info_counts_what_was_done(cached: Cached, store: AsyncKVStore, work: Work, moved_time: MovedTime) -> None:
    number = cached(10, stale_while_revalidate=10, stale_if_error=100)
    await number()
    await with_compute_seconds(number, store, 2.0)
    await number()
    await number()
    moved_time.advance(15)
    gate = work.hold()
    await number()
    info = number.info()
    assert (info.hits, info.near_hits, info.stale_hits, info.misses, info.computations) == (2, 0, 1, 1, 1)
    assert info.seconds_saved == pytest.approx(6.0)
    gate.set()
    await settle()
    assert number.info().computations == 2


async def test_near_hits_are_counted_and_not_read(cached: Cached, backend: WatchedBackend, moved_time: MovedTime) -> None:
    number = cached(60, near=NearCache(30))
    await number()
    await number()
    assert (number.info().near_hits, number.info().hits, backend.asked("get")) == (1, 0, 1)
    moved_time.advance(31)
    assert await number() == 1
    assert (number.info().hits, backend.asked("get")) == (1, 2)


async def test_observer_is_told_each_event_without_arguments_or_results(
    cached: Cached, work: Work, moved_time: MovedTime
) -> None:
    events: list[CacheEvent] = []
    number = cached(10, stale_while_revalidate=10, stale_if_error=100, observer=events.append)
    await number()
    await number()
    moved_time.advance(15)
    await number()
    await settle()
    moved_time.advance(30)
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


@pytest.mark.parametrize("reason", ["when", "too large"])
@pytest.mark.parametrize("near", [False, True])
async def test_refresh_whose_result_is_not_stored_leaves_nothing_older(reason: str, *, near: bool, store: AsyncKVStore) -> None:
    results = ["old", "x" * 2_100_000 if reason == "too large" else "new", "newest"]

    @kv_cached(60, store=store, key=lambda: "one", near=NearCache(30) if near else None, when=lambda text: text != "new")
    async def text() -> str:
        return results.pop(0)

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
