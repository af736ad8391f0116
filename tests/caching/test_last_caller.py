"""The last caller to leave cancels the computation, and returns once that has cleaned up."""

import asyncio
from typing import Any

import pytest
from caching_under_test import MovedTime, settle, watched_store

from aiokv import kv_cached, kv_cached_many


class Work:
    """A computation that takes a while to clean up."""

    def __init__(self, of: str, moved: MovedTime) -> None:
        self.begun = 0
        self.cleaned = 0
        self.cleanup: asyncio.Event | None = None
        self.stubborn = False
        store = watched_store(moved.now)[1]
        self.cached: Any
        self.call: Any
        if of == "one":
            self.cached = self.call = kv_cached(60, store=store, key=lambda: "one", early=0)(self._compute)
            return

        @kv_cached_many(60, store=store, key=lambda id_: id_, early=0)
        async def many(ids: list[int]) -> dict[int, int]:
            return dict.fromkeys(ids, await self._compute())

        async def call() -> int:
            return (await many([1]))[1]

        self.cached, self.call = many, call

    async def _compute(self) -> int:
        self.begun += 1
        try:
            await asyncio.sleep(1_000)
        except asyncio.CancelledError:
            if self.cleanup is not None:
                await self.cleanup.wait()
            else:
                await asyncio.sleep(5)
            self.cleaned += 1
            if not self.stubborn:
                raise
        return self.begun


@pytest.mark.parametrize("callers", [1, 2, 20])
def test_last_caller_returns_when_the_computation_has_cleaned_up(callers: int, of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        work = Work(of, moved_time)
        tasks = [asyncio.create_task(work.call()) for _ in range(callers)]
        await settle()
        for task in tasks[:-1]:
            task.cancel()
        await settle()
        # Nobody but the last has anything to wait for.
        assert [task.done() for task in tasks] == [True] * (callers - 1) + [False]
        before = moved_time.elapsed
        tasks[-1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[-1]
        assert (work.begun, work.cleaned) == (1, 1)
        assert moved_time.elapsed - before == pytest.approx(5)

    moved_time.run(scenario())


def test_caller_whose_time_is_up_leaves_a_computation_that_has_cleaned_up(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        work = Work(of, moved_time)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await work.call()
        assert (work.begun, work.cleaned) == (1, 1)

    moved_time.run(scenario())


def test_group_that_fails_ends_after_the_computation_has_cleaned_up(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        work = Work(of, moved_time)

        async def fail() -> None:
            await asyncio.sleep(1)
            raise LookupError("a sibling")

        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(work.call())
                group.create_task(work.call())
                group.create_task(fail())

        with pytest.raises(ExceptionGroup):
            await together()
        assert work.cleaned == 1

    moved_time.run(scenario())


def test_computation_that_returns_in_spite_of_it_is_neither_served_nor_stored(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        work = Work(of, moved_time)
        work.stubborn = True
        task = asyncio.create_task(work.call())
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert work.cleaned == 1
        assert await work.call() == 2

    moved_time.run(scenario())


def test_who_comes_while_it_cleans_up_begins_anew(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        work = Work(of, moved_time)
        work.cleanup = asyncio.Event()
        leaving = asyncio.create_task(work.call())
        await settle()
        leaving.cancel()
        await settle()
        assert not leaving.done()
        coming = asyncio.create_task(work.call())
        await settle()
        assert work.begun == 2
        work.cleanup.set()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert await coming == 2

    moved_time.run(scenario())


def test_error_of_the_clean_up_is_not_taken_for_a_result(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        store = watched_store(moved_time.now)[1]

        async def compute() -> int:
            try:
                await asyncio.sleep(1_000)
            finally:
                await asyncio.sleep(1)
                raise LookupError("while cleaning up")

        @kv_cached_many(60, store=store, key=lambda id_: id_)
        async def many(ids: list[int]) -> dict[int, int]:
            return dict.fromkeys(ids, await compute())

        one = kv_cached(60, store=store, key=lambda: "one")(compute)
        task: asyncio.Task[Any] = asyncio.create_task(one() if of == "one" else many([1]))
        await settle()
        task.cancel()
        # As the function's own error passes through a plain await, or the caller's own cancellation.
        with pytest.raises((asyncio.CancelledError, LookupError)):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    moved_time.run(scenario())
