"""Stores of the program's own that answer nonsense, hang, or fail in groups, and what stays when a store is closed."""

import asyncio
from typing import Any

import pytest
from caching_under_test import MovedTime, WatchedBackend, settle, watched_store

from aiokv import AsyncKVStore, CallTimeoutError, NearCache, StorageError, StoreClosedError, kv_cached, kv_cached_many


class Answering(WatchedBackend):
    """A backend whose reads answer what a test says."""

    answer: Any = None

    async def get(self, db_name: str, key: str) -> Any:
        await super().get(db_name, key)
        return self.answer


@pytest.mark.parametrize("answer", [b"{}", 1, [], {}, True, object()])
async def test_answer_that_is_no_text_is_a_miss(answer: object) -> None:
    backend = Answering()
    backend.answer = answer

    @kv_cached(60, store=AsyncKVStore("db", backend=backend), key=lambda: "one")
    async def number() -> int:
        return 1

    assert [await number(), await number()] == [1, 1]
    assert await number.peek() is None


@pytest.mark.parametrize("near", [None, NearCache(60)], ids=["far", "near"])
async def test_refresh_returns_no_sooner_than_nothing_older_can_be_served(near: NearCache | None) -> None:
    backend, store = watched_store()
    world = 0

    @kv_cached(60, store=store, key=lambda: "one", write="background", near=near, early=0)
    async def read() -> int:
        return world

    await read()
    await settle()
    world = 1
    gate = backend.hold("set")
    first = asyncio.create_task(read.refresh())
    await settle()
    assert not first.done()
    gate.set()
    assert await first == 1
    assert await read() == 1


@pytest.mark.parametrize("verb", ["prime", "invalidate"])
def test_store_that_hangs_for_ever_is_given_up_on_and_said_so(verb: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)

        @kv_cached(60, store=store, key=lambda: "one", early=0)
        async def read() -> int:
            return value

        value = 1
        assert await read() == 1
        value = 2
        backend.hold("set")
        backend.hold("delete")
        with pytest.raises(CallTimeoutError) as caught:
            await (read.prime(2) if verb == "prime" else read.invalidate())
        assert caught.value.maybe_applied
        if verb == "invalidate":
            assert await read() == 2
        await read.aclose()

    moved_time.run(scenario())


async def test_failures_of_several_ids_are_one_error() -> None:
    backend, store = watched_store()
    backend.failing, backend.error = {"get"}, OSError("broken")

    @kv_cached_many(60, store=store, key=lambda id_: id_, on_store_error="raise")
    async def many(ids: list[int]) -> dict[int, int]:
        return dict.fromkeys(ids, 1)

    with pytest.raises(OSError, match="broken"):
        await many([1, 2])


def test_store_that_was_closed_is_not_probed(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing, backend.error = {"get"}, StorageError("broken", verb="get", attempts=1)

        @kv_cached(60, store=store, key=lambda number: number)
        async def double(number: int) -> int:
            return 2 * number

        for number in range(3):
            await double(number)
        await store.aclose()
        backend.calls.clear()
        await asyncio.sleep(60)
        assert backend.calls == []

    moved_time.run(scenario())


async def test_prime_that_is_closed_before_it_is_stored_raises() -> None:
    backend, store = watched_store()

    @kv_cached(60, store=store, key=lambda: "one", read_timeout=0.01)
    async def read() -> int:
        return 1

    backend.hold("set")
    priming = asyncio.create_task(read.prime(2))
    await settle()
    await read.aclose()
    with pytest.raises(StoreClosedError) as caught:
        await priming
    assert caught.value.maybe_applied


async def test_prime_whose_task_is_cancelled_before_it_begins_says_so_at_once() -> None:
    backend, store = watched_store()

    @kv_cached(60, store=store, key=lambda: "one")
    async def read() -> int:
        return 1

    backend.hold("set")
    before = asyncio.all_tasks()
    priming = asyncio.create_task(read.prime(2))
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - before - {priming}:
        task.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(StoreClosedError, match="before the result was stored"):
            await priming
    backend.gates.clear()
    assert await read() == 1
