"""Eager tasks (Python 3.12): a computation that ends before its task is handed back is not joined by those who come later."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from caching_under_test import MovedTime, settle, watched_store

from aiokv import AsyncKVStore, NearCache, cache_refresh, kv_cached, kv_cached_many

pytestmark = pytest.mark.skipif(sys.version_info < (3, 12), reason="asyncio.eager_task_factory is there from Python 3.12 on")


class Function:
    """A function that never waits, or for a moment, and knows how often it was run."""

    def __init__(self, *, waits: bool) -> None:
        self.runs = 0
        self.error: Exception | None = None
        self.waits = waits

    async def __call__(self) -> int:
        self.runs += 1
        run = self.runs
        if self.waits:
            await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return run


class Cached:
    """One call of a function that is cached by either decorator."""

    def __init__(self, of: str, function: Function, store: AsyncKVStore, **options: Any) -> None:
        options = {"store": store, "key": lambda *ids: ids, "early": 0, **options}
        self.call: Callable[[], Coroutine[Any, Any, int]]
        if of == "one":

            @kv_cached(60, **options)
            async def one() -> int:
                return await function()

            self.cached: Any = one
            self.call, self.invalidate, self.refresh = one, one.invalidate, one.refresh
            return

        @kv_cached_many(60, **options)
        async def many(ids: list[int]) -> dict[int, int]:
            return dict.fromkeys(ids, await function())

        async def call() -> int:
            return (await many([1]))[1]

        async def refresh() -> int:
            with cache_refresh():
                return (await many([1]))[1]

        self.cached = many
        self.call, self.invalidate, self.refresh = call, lambda: many.invalidate([1]), refresh


@pytest.fixture(params=[False, True], ids=["never waits", "waits"])
def function(request: pytest.FixtureRequest) -> Function:
    return Function(waits=request.param)


def test_result_that_is_not_stored_is_computed_by_each_call(of: str, function: Function, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached = Cached(of, function, watched_store(moved_time.now)[1], when=lambda _: False)
        assert [await cached.call() for _ in range(5)] == [1, 2, 3, 4, 5]

    moved_time.run(scenario(), eager=True)


def test_call_after_an_invalidation_computes_anew(of: str, function: Function, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached = Cached(of, function, watched_store(moved_time.now)[1], near=NearCache(30))
        for run in range(1, 6):
            assert await cached.call() == run
            assert await cached.call() == run
            await cached.invalidate()

    moved_time.run(scenario(), eager=True)


def test_refreshes_one_after_the_other_compute_each_time(of: str, function: Function, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached = Cached(of, function, watched_store(moved_time.now)[1])
        for run in range(1, 6):
            assert await cached.refresh() == run
            assert await cached.call() == run

    moved_time.run(scenario(), eager=True)


def test_failed_computation_is_not_joined(of: str, function: Function, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached = Cached(of, function, watched_store(moved_time.now)[1])
        for run in range(1, 4):
            function.error = LookupError(str(run))
            with pytest.raises(LookupError, match=str(run)):
                await cached.call()
        function.error = None
        assert await cached.call() == 4

    moved_time.run(scenario(), eager=True)


def test_calls_after_the_store_has_failed_compute_each_for_itself(of: str, function: Function, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        backend.failing = {"get", "set"}
        cached = Cached(of, function, store)
        assert [await cached.call() for _ in range(5)] == [1, 2, 3, 4, 5]
        await cached.cached.aclose()

    moved_time.run(scenario(), eager=True)


def test_callers_at_once_compute_once(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        function = Function(waits=True)
        cached = Cached(of, function, watched_store(moved_time.now)[1])
        assert await asyncio.gather(*(cached.call() for _ in range(20))) == [1] * 20
        assert function.runs == 1

    moved_time.run(scenario(), eager=True)


def test_stale_result_is_refreshed_in_the_background(of: str, function: Function, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached = Cached(of, function, watched_store(moved_time.now)[1], stale_while_revalidate=600)
        for run in range(1, 5):
            first = await cached.call()
            assert first == max(run - 1, 1)
            await settle(50)
            assert await cached.call() == run
            moved_time.advance(100)

    moved_time.run(scenario(), eager=True)


def test_computation_that_calls_itself_does_not_wait_for_itself(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        depth = 0

        @kv_cached(60, store=watched_store(moved_time.now)[1], key=lambda: "one")
        async def nested() -> int:
            nonlocal depth
            depth += 1
            return depth if depth > 2 else await nested()

        async with asyncio.timeout(100):
            assert await nested() == 3

    moved_time.run(scenario(), eager=True)


def test_caller_that_leaves_at_once_leaves_nothing_behind(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        function = Function(waits=True)
        cached = Cached(of, function, watched_store(moved_time.now)[1])
        leaving = asyncio.ensure_future(cached.call())
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await cached.call() == function.runs

    moved_time.run(scenario(), eager=True)


def test_everything_is_done_after_closing(of: str, function: Function, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached = Cached(of, function, watched_store(moved_time.now)[1], stale_while_revalidate=600, write="background")
        await cached.call()
        moved_time.advance(100)
        await cached.call()
        await cached.cached.aclose()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    moved_time.run(scenario(), eager=True)


@pytest.mark.parametrize("of", ["one", "many"])
def test_cached_functions_that_call_each_other_may_do_so_as_deep_as_without_eager_tasks(of: str, moved_time: MovedTime) -> None:
    store = watched_store(moved_time.now)[1]

    @kv_cached(60, store=store, key=lambda number: number)
    async def one(number: int) -> int:
        return number and 1 + await one(number - 1)

    @kv_cached_many(60, store=store, key=lambda id_: id_)
    async def many(ids: list[int]) -> dict[int, int]:
        return {id_: id_ and 1 + (await many([id_ - 1]))[id_ - 1] for id_ in ids}

    async def scenario() -> None:
        async with asyncio.timeout(60):
            assert (await one(300) if of == "one" else (await many([300]))[300]) == 300

    moved_time.run(scenario(), eager=True)
