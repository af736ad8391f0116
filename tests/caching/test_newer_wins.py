"""What a call gives after an invalidation, a refresh or a prime has returned is never what was there before."""

import asyncio

import pytest
from caching_under_test import settle, watched_store

from aiokv import AsyncKVStore, NearCache, kv_cached, kv_cached_many


class Source:
    """What a cached function reads, and what it may be held up by."""

    def __init__(self) -> None:
        self.value = 1
        self.gate: asyncio.Event | None = None

    async def read(self) -> int:
        value = self.value
        if self.gate is not None:
            await self.gate.wait()
        return value


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
async def test_call_during_an_invalidation_leaves_nothing_old_behind(source: Source, near: NearCache | None) -> None:
    backend, store = watched_store()
    read = kv_cached(60, store=store, key=lambda: "one", near=near)(source.read)
    assert await read() == 1
    source.value = 2
    gate = backend.hold("delete")
    invalidation = asyncio.create_task(read.invalidate())
    await settle()
    during = asyncio.create_task(read())
    await settle()
    gate.set()
    await invalidation
    assert await read() == 2
    await during
    assert await read() == 2


async def test_refreshed_result_is_read_though_its_write_is_under_way(source: Source) -> None:
    backend, store = watched_store()
    read = kv_cached(60, store=store, key=lambda: "one", write="background")(source.read)
    await read()
    await read.aclose()
    source.value = 2
    gate = backend.hold("set")
    assert await read.refresh() == 2
    following = asyncio.create_task(read())
    await settle()
    gate.set()
    assert await following == 2


async def test_primed_result_is_not_replaced_by_what_was_being_computed(source: Source) -> None:
    _, store = watched_store()
    read = kv_cached(60, store=store, key=lambda: "one")(source.read)
    source.gate = asyncio.Event()
    computing = asyncio.create_task(read())
    await settle()
    await read.prime(7)
    source.gate.set()
    assert await computing == 1
    assert await read() == 7


async def test_many_that_were_being_computed_at_an_invalidation_are_not_stored(source: Source) -> None:
    _, store = watched_store()

    @kv_cached_many(60, store=store, key=lambda id_: id_)
    async def many(ids: list[int]) -> dict[int, int]:
        value = await source.read()
        return dict.fromkeys(ids, value)

    source.gate = asyncio.Event()
    computing = asyncio.create_task(many([1, 2]))
    await settle()
    source.value = 2
    await many.invalidate([1])
    source.gate.set()
    assert await computing == {1: 1, 2: 1}
    assert await many([1, 2]) == {1: 2, 2: 1}


async def test_functions_that_are_made_and_dropped_never_share_a_near_result() -> None:
    near = NearCache(30)
    for number in range(50):
        store = AsyncKVStore(f"tenant-{number}", url="memory://cached-order")

        @kv_cached(60, store=store, key=lambda _: "one", near=near)
        async def tenant(number: int = number) -> int:
            return number

        assert await tenant() == number
        await tenant.aclose()
        del tenant
