"""Computations whose task is cancelled before it begins."""

import asyncio
import gc
import warnings

import pytest
from caching_under_test import settle

from aiokv import AsyncKVStore, kv_cached


async def test_caller_that_leaves_before_the_computation_begins_leaves_nothing_behind(store: AsyncKVStore) -> None:
    begun = 0

    @kv_cached(60, store=store, key=lambda number: number)
    async def double(number: int) -> int:
        nonlocal begun
        begun += 1
        await asyncio.sleep(0)
        return 2 * number

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turns in range(6):
            leaving = asyncio.create_task(double(turns))
            for _ in range(turns):
                await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait([leaving])
        await settle()
        gc.collect()
    assert not double._cache.flights_of(store).computed
    assert [await double(number) for number in range(6)] == [0, 2, 4, 6, 8, 10]


async def test_task_that_is_cancelled_before_it_begins_ends_its_callers(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        await asyncio.sleep(0)
        return 1

    if asyncio.get_running_loop().get_task_factory() is not None:
        pytest.skip("an eager task begins at once")
    cache = number._cache
    flights = cache.flights_of(store)
    waiting = asyncio.create_task(number())
    while not flights.tasks:
        await asyncio.sleep(0)
    (task,) = flights.tasks
    task.cancel()
    # The caller begins anew, since nobody has cancelled it.
    assert await waiting == 1
