"""Cached functions that call each other, or themselves."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from caching_under_test import Work, watched_store

from aiokv import AsyncKVStore, kv_cached

pytestmark = pytest.mark.usefixtures("nothing_left_pending")


def _ways_back(store: AsyncKVStore) -> dict[str, Callable[[], Awaitable[int]]]:
    async def through_itself() -> int:
        return await depth("inner")

    @kv_cached(60, store=store, key=lambda: "other")
    async def through_another() -> int:
        return await depth("inner")

    async def through_gather() -> int:
        return sum(await asyncio.gather(depth("inner"), depth("inner"))) // 2

    async def through_task() -> int:
        return await asyncio.create_task(through_another())

    async def through_refresh() -> int:
        return await depth.refresh("inner")

    ways = {way.__name__: way for way in (through_itself, through_another, through_gather, through_task, through_refresh)}

    @kv_cached(60, store=store, key=lambda _: "one")
    async def depth(way: str) -> int:
        await asyncio.sleep(0)
        return 1 if way == "inner" else 1 + await ways[way]()

    return {name: (lambda name=name: depth(name)) for name in ways}  # type: ignore[misc]


@pytest.mark.parametrize("way", ["through_itself", "through_another", "through_gather", "through_task", "through_refresh"])
async def test_call_of_its_own_key_from_inside_runs_inline(way: str, store: AsyncKVStore) -> None:
    call = _ways_back(store)[way]
    async with asyncio.timeout(2):
        assert await asyncio.gather(call(), call()) == [2, 2]
        # A refresh from inside began after the computation around it, and stays.
        assert await call() == 2


async def test_computations_that_call_each_others_keys_do_not_wait_for_each_other(store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda node, _: node)
    async def walk(node: int, depth: int) -> int:
        await asyncio.sleep(0.01)
        return depth if depth == 2 else await walk(1 - node, depth + 1)

    async with asyncio.timeout(1):
        assert await asyncio.gather(walk(0, 0), walk(1, 0)) == [2, 2]


async def test_task_that_a_computation_leaves_behind_is_cached_like_any_other(store: AsyncKVStore, work: Work) -> None:
    left: list[asyncio.Task[int]] = []
    go_on = asyncio.Event()

    @kv_cached(60, store=store, key=lambda: "one")
    async def number() -> int:
        if not left:
            left.append(asyncio.create_task(later()))
        return await work()

    async def later() -> int:
        await go_on.wait()
        return await number()

    assert await number() == 1
    go_on.set()
    assert (await left[0], work.runs) == (1, 1)


async def test_cached_function_may_be_cached_again_in_a_nearer_store(store: AsyncKVStore, work: Work) -> None:
    far_backend, far = watched_store()

    @kv_cached(60, store=store, key=lambda: "one")
    @kv_cached(3600, store=far, key=lambda: "one")
    async def number() -> int:
        return await work()

    await number()
    assert far_backend.asked("set") == 1
    await number.invalidate()
    assert (await number(), work.runs) == (1, 1)
