"""Calls, writes and refreshes that an invalidation, a refresh or another write overtakes."""

import asyncio
import gc

import pytest
from caching_under_test import MovedTime, WatchedBackend, Work, settle

from aiokv import AsyncKVStore, CachedFunction, NearCache, kv_cached

pytestmark = pytest.mark.usefixtures("nothing_left_pending")


@pytest.mark.parametrize("fails", [False, True])
async def test_call_that_was_invalidated_ends_without_touching_the_newer_entry(
    *, fails: bool, work: Work, numbered: CachedFunction[[], int]
) -> None:
    gate = work.hold()
    work.error = LookupError("old") if fails else None
    old = asyncio.create_task(numbered())
    await settle()
    await numbered.invalidate()
    work.gate, work.error = None, None
    assert await numbered() == 2
    gate.set()
    (result,) = await asyncio.gather(old, return_exceptions=True)
    assert isinstance(result, LookupError) if fails else result == 1
    await settle()
    assert (await numbered(), work.runs) == (2, 2)


@pytest.mark.parametrize("fails", [False, True])
async def test_call_that_was_invalidated_does_not_end_the_newer_flight(
    *, fails: bool, work: Work, numbered: CachedFunction[[], int]
) -> None:
    old_gate = work.hold()
    work.error = LookupError("old") if fails else None
    old = asyncio.create_task(numbered())
    await settle()
    await numbered.invalidate()
    work.error = None
    new_gate = work.hold()
    newer = asyncio.create_task(numbered())
    await settle()
    old_gate.set()
    await asyncio.gather(old, return_exceptions=True)
    joined = asyncio.create_task(numbered())
    await settle()
    new_gate.set()
    assert (await newer, await joined, work.runs) == (2, 2, 2)


async def test_invalidate_during_a_call_discards_its_write(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    gate = work.hold()
    call = asyncio.create_task(numbered())
    await settle()
    await numbered.invalidate()
    gate.set()
    assert (await call, backend.asked("set"), await numbered.peek()) == (1, 0, None)


@pytest.mark.parametrize("write", ["await", "background"])
async def test_invalidate_is_not_undone_by_a_write_under_way(
    write: str, backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", write=write)  # type: ignore[arg-type]
    async def number() -> int:
        return await work()

    gate = backend.hold("set")
    call = asyncio.create_task(number())
    await settle()
    assert backend.asked("set") == 1
    invalidation = asyncio.create_task(number.invalidate())
    await settle()
    gate.set()
    await asyncio.gather(call, invalidation)
    await number.aclose()
    assert await number.peek() is None


async def test_invalidate_is_not_undone_by_a_write_that_the_caller_did_not_wait_for(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", read_timeout=0.02)
    async def number() -> int:
        return await work()

    gate = backend.hold("set")
    assert await number() == 1
    invalidation = asyncio.create_task(number.invalidate())
    await settle()
    gate.set()
    await invalidation
    await number.aclose()
    assert await number.peek() is None


async def test_older_write_does_not_land_over_a_newer_one(backend: WatchedBackend, store: AsyncKVStore, work: Work) -> None:
    @kv_cached(60, store=store, key=lambda: "one", write="background")
    async def number() -> int:
        return await work()

    slow = backend.hold("set")
    assert await number() == 1
    await settle()
    del backend.gates["set"]
    refreshing = asyncio.create_task(number.refresh())
    await settle()
    slow.set()
    assert await refreshing == 2
    await number.aclose()
    peeked = await number.peek()
    assert peeked is not None
    assert peeked.value == 2


async def test_computation_behind_does_not_land_over_a_refresh_that_began_later(
    store: AsyncKVStore, work: Work, moved_time: MovedTime
) -> None:
    @kv_cached(10, store=store, key=lambda: "one", stale_while_revalidate=60)
    async def number() -> int:
        return await work()

    await number()
    moved_time.advance(15)
    gate = work.hold()
    assert await number() == 1
    await settle()
    assert work.runs == 2
    moved_time.advance(1)
    work.gate = None
    assert await number.refresh() == 3
    gate.set()
    await number.aclose()
    assert await number() == 3


async def test_writes_that_wait_for_each_other_are_given_up_on_without_a_warning(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    @kv_cached(60, store=store, key=lambda: "one", write="background", read_timeout=0.02)
    async def number() -> int:
        return await work()

    backend.hold("set")
    assert [await number(), await number.refresh(), await number.refresh()] == [1, 2, 3]
    await settle()
    await number.aclose()
    await number.refresh()
    await number.aclose()
    gc.collect()
    assert backend.asked("set") == 2


async def test_read_that_was_under_way_at_an_invalidation_leaves_nothing_in_the_near_cache(
    backend: WatchedBackend, store: AsyncKVStore, work: Work
) -> None:
    near = NearCache(30)

    @kv_cached(60, store=store, key=lambda: "one", near=near)
    async def number() -> int:
        return await work()

    await number()
    near.clear()
    gate = backend.hold("get")
    reader = asyncio.create_task(number())
    await settle()
    await number.invalidate()
    gate.set()
    assert await reader == 1
    assert await number() == 2


async def test_refresh_during_a_read_is_not_answered_with_what_is_stored(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    await numbered()
    gate = backend.hold("get")
    reader = asyncio.create_task(numbered())
    await settle()
    refreshed = asyncio.create_task(numbered.refresh())
    await settle()
    gate.set()
    assert (await reader, await refreshed, work.runs) == (1, 2, 2)


async def test_invalidate_discards_both_a_refresh_and_the_call_that_it_overtook(
    backend: WatchedBackend, work: Work, numbered: CachedFunction[[], int]
) -> None:
    reading = backend.hold("get")
    reader = asyncio.create_task(numbered())
    await settle()
    computing = work.hold()
    refreshed = asyncio.create_task(numbered.refresh())
    await settle()
    reading.set()
    await settle()
    await numbered.invalidate()
    computing.set()
    await asyncio.gather(reader, refreshed)
    await settle()
    assert (backend.asked("set"), await numbered.peek()) == (0, None)
