"""`kv_cached_many` joins, looks, primes, refreshes, counts and tells as `kv_cached` does, id for id."""

import asyncio
import time
from typing import Any, NamedTuple

import pytest
from caching_under_test import Events, MovedTime, settle, watched_store

from aiokv import AsyncKVStore, CachedFunction, CachedManyFunction, NearCache, kv_cached, kv_cached_many


class Function:
    """What is called with ids, and what a test does to it."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.value = 1
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.cancelled = 0

    def hold(self) -> asyncio.Event:
        self.gate = asyncio.Event()
        return self.gate

    async def many(self, ids: list[int]) -> dict[int, int]:
        self.asked.append(list(ids))
        value = self.value
        try:
            await (self.gate.wait() if self.gate is not None else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return {id_: id_ * 100 + value for id_ in ids}

    async def one(self, id_: int) -> int:
        return (await self.many([id_]))[id_]

    def cached(self, store: AsyncKVStore, **options: Any) -> CachedManyFunction[int, [], int]:
        # The name of one function for both, so that keys are the same.
        @kv_cached_many(60, **{"store": store, "key": lambda id_: id_, "early": 0, **options})
        async def rows(ids: list[int]) -> dict[int, int]:
            return await self.many(ids)

        return rows

    def cached_one(self, store: AsyncKVStore, **options: Any) -> CachedFunction[[int], int]:
        @kv_cached(60, **{"store": store, "key": lambda id_: id_, "early": 0, **options})
        async def row(id_: int) -> int:
            return await self.one(id_)

        return row


@pytest.fixture
def function() -> Function:
    return Function()


async def test_fifty_callers_of_one_id_compute_it_once(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store)
    assert await asyncio.gather(*(rows([1]) for _ in range(50))) == [{1: 101}] * 50
    assert function.asked == [[1]]
    assert (rows.info().computations, rows.info().joined) == (1, 49)


async def test_ids_of_one_key_are_computed_once_and_each_gets_the_result(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store, key=lambda id_: id_ % 2)
    assert await rows([1, 3, 5, 2]) == {1: 101, 3: 101, 5: 101, 2: 201}
    assert await rows([5, 3]) == {5: 101, 3: 101}
    assert function.asked == [[1, 2]]
    assert (rows.info().computations, rows.info().joined) == (2, 3)


async def test_callers_that_overlap_compute_each_id_once(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store)
    gate = function.hold()
    first = asyncio.create_task(rows([1, 2]))
    await settle()
    second = asyncio.create_task(rows([2, 3]))
    third = asyncio.create_task(rows([3, 1]))
    await settle()
    gate.set()
    assert await first == {1: 101, 2: 201}
    assert await second == {2: 201, 3: 301}
    assert await third == {3: 301, 1: 101}
    assert function.asked == [[1, 2], [3]]


async def test_joined_callers_have_results_of_their_own(store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_)
    async def lists(ids: list[int]) -> dict[int, list[int]]:
        await asyncio.sleep(0)
        return {id_: [id_] for id_ in ids}

    results = await asyncio.gather(*(lists([1]) for _ in range(10)))
    results[0][1].append(99)
    assert all(result == {1: [1]} for result in results[1:])


async def test_error_is_every_waiters_and_the_next_call_asks_again(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store)
    function.error = LookupError("upstream")
    results = await asyncio.gather(*(rows([1, 2]) for _ in range(5)), return_exceptions=True)
    assert [type(result) for result in results] == [LookupError] * 5
    assert function.asked == [[1, 2]]
    function.error = None
    assert await rows([1, 2]) == {1: 101, 2: 201}


async def test_joiners_of_a_failed_part_still_get_their_error_alone(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store)
    gate = function.hold()
    function.error = LookupError("upstream")
    failing = asyncio.create_task(rows([1]))
    await settle()
    joined = asyncio.create_task(rows([1, 2]))
    await settle()
    gate.set()
    with pytest.raises(LookupError):
        await failing
    with pytest.raises(LookupError):
        await joined
    function.error = None
    assert await rows([2]) == {2: 201}


async def test_caller_that_leaves_disturbs_nobody_and_the_last_cancels(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store)
    gate = function.hold()
    callers = [asyncio.create_task(rows([1, 2])) for _ in range(3)]
    await settle()
    callers[0].cancel()
    await settle()
    assert function.cancelled == 0
    gate.set()
    assert await asyncio.gather(*callers[1:]) == [{1: 101, 2: 201}] * 2
    function.hold()
    leaving = [asyncio.create_task(rows([3])) for _ in range(3)]
    await settle()
    for caller in leaving:
        caller.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    assert function.cancelled == 1


async def test_id_invalidated_during_a_joined_computation_is_computed_anew(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store)
    gate = function.hold()
    first = asyncio.create_task(rows([1, 2]))
    await settle()
    function.value = 2
    await rows.invalidate([1])
    second = asyncio.create_task(rows([1, 2]))
    await settle()
    gate.set()
    assert await first == {1: 101, 2: 201}
    assert await second == {1: 102, 2: 201}
    assert await rows([1, 2]) == {1: 102, 2: 201}
    assert function.asked == [[1, 2], [1]]


def test_peek_gives_what_is_stored_with_its_age_and_computes_nothing(moved_time: MovedTime, function: Function) -> None:
    async def scenario() -> None:
        rows = function.cached(watched_store(moved_time.now)[1], stale_while_revalidate=100)
        await rows([1, 2])
        moved_time.advance(30)
        await rows([3])
        moved_time.advance(40)
        peeked = await rows.peek([3, 1, 9])
        assert list(peeked) == [3, 1]
        assert (peeked[3].value, peeked[3].age, peeked[3].fresh) == (301, pytest.approx(40), True)
        assert (peeked[1].value, peeked[1].age, peeked[1].fresh) == (101, pytest.approx(70), False)
        assert function.asked == [[1, 2], [3]]
        assert await rows.peek([]) == {}

    moved_time.run(scenario())


@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
async def test_primed_results_are_served_and_outlive_what_was_under_way(
    near: NearCache | None, function: Function, store: AsyncKVStore
) -> None:
    rows = function.cached(store, near=near)
    gate = function.hold()
    call = asyncio.create_task(rows([1, 2]))
    await settle()
    await rows.prime({1: 7, 3: 9})
    gate.set()
    assert await call == {1: 101, 2: 201}
    assert await rows([1, 2, 3]) == {1: 7, 2: 201, 3: 9}
    assert function.asked == [[1, 2]]
    await rows.prime({})


@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
async def test_refreshed_ids_are_computed_anew_and_stored(
    near: NearCache | None, function: Function, store: AsyncKVStore
) -> None:
    rows = function.cached(store, near=near)
    await rows([1, 2])
    function.value = 2
    assert list((await rows.refresh([2, 1])).items()) == [(2, 202), (1, 102)]
    function.value = 3
    assert await rows([1, 2]) == {1: 102, 2: 202}
    assert function.asked == [[1, 2], [2, 1]]
    assert await rows.refresh([]) == {}


async def test_several_refreshes_at_once_compute_once(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store)
    assert await asyncio.gather(*(rows.refresh([1, 2]) for _ in range(5))) == [{1: 101, 2: 201}] * 5
    assert function.asked == [[1, 2]]


async def test_refresh_that_brings_no_result_of_an_id_leaves_nothing_older(store: AsyncKVStore) -> None:
    gone: set[int] = set()

    @kv_cached_many(60, store=store, key=lambda id_: id_)
    async def rows(ids: list[int]) -> dict[int, int]:
        return {id_: id_ for id_ in ids if id_ not in gone}

    await rows([1, 2])
    gone.add(1)
    assert await rows.refresh([1, 2]) == {2: 2}
    assert set(await rows.peek([1, 2])) == {2}


@pytest.mark.parametrize(
    ("size", "count", "sizes"), [(10, 25, [5, 10, 10]), (10, 10, [10]), (1, 3, [1, 1, 1]), (None, 500, [500]), (100, 3, [3])]
)
async def test_function_is_called_with_no_more_ids_than_batch_size(
    size: int | None, count: int, sizes: list[int], function: Function, store: AsyncKVStore
) -> None:
    rows = function.cached(store, batch_size=size)
    ids = list(range(count))
    result = await rows(ids)
    assert list(result.items()) == [(id_, id_ * 100 + 1) for id_ in ids]
    assert sorted(map(len, function.asked)) == sizes
    assert sorted(id_ for batch in function.asked for id_ in batch) == ids
    assert await rows(ids) == result
    assert sorted(map(len, function.asked)) == sizes


async def test_refresh_and_waiters_are_cut_into_batches_too(function: Function, store: AsyncKVStore) -> None:
    rows = function.cached(store, batch_size=2)
    results = await asyncio.gather(*(rows([1, 2, 3]) for _ in range(5)))
    assert results == [{1: 101, 2: 201, 3: 301}] * 5
    assert sorted(map(len, function.asked)) == [1, 2]
    function.asked.clear()
    await rows.refresh([1, 2, 3, 4, 5])
    assert sorted(map(len, function.asked)) == [1, 2, 2]


@pytest.mark.parametrize(
    ("size", "error"), [(0, ValueError), (-1, ValueError), (True, (TypeError, ValueError)), ("2", TypeError)]
)
def test_batch_size_that_makes_no_sense_is_refused(size: Any, error: Any, function: Function, store: AsyncKVStore) -> None:
    with pytest.raises(error, match="batch_size"):
        function.cached(store, batch_size=size)


class Of(NamedTuple):
    """One id's calls, by way of either decorator."""

    call: Any
    peek: Any
    invalidate: Any
    prime: Any
    refresh: Any
    info: Any


def _by_one(function: Function, store: AsyncKVStore, **options: Any) -> Of:
    row = function.cached_one(store, **options)
    return Of(row, row.peek, row.invalidate, lambda id_: row.prime(7, id_), row.refresh, row.info)


def _by_many(function: Function, store: AsyncKVStore, **options: Any) -> Of:
    rows = function.cached(store, **options)
    return Of(
        call=lambda id_: rows([id_]),
        peek=lambda id_: rows.peek([id_]),
        invalidate=lambda id_: rows.invalidate([id_]),
        prime=lambda id_: rows.prime({id_: 7}),
        refresh=lambda id_: rows.refresh([id_]),
        info=rows.info,
    )


async def _live_through_everything(of: Of, function: Function, moved: MovedTime) -> None:
    for _ in range(3):
        await of.call(1)
    moved.advance(40)
    await of.call(1)
    moved.advance(30)
    # Stale, and computed anew in the background.
    await of.call(1)
    await settle(100)
    await of.call(1)
    await of.invalidate(1)
    await asyncio.gather(*(of.call(1) for _ in range(5)))
    await of.prime(1)
    await of.call(1)
    await of.refresh(1)
    await of.peek(1)
    moved.advance(200)
    function.error = LookupError("upstream")
    await of.call(1)
    await of.call(1)
    moved.advance(5_000)
    with pytest.raises(LookupError):
        await of.call(1)
    function.error = None
    await of.call(1)


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
def test_one_id_counts_and_tells_what_one_call_does(near: bool, moved_time: MovedTime) -> None:  # noqa: FBT001
    def told_by(make: Any) -> Any:
        function, events = Function(), Events()
        of = make(
            function,
            watched_store(moved_time.now)[1],
            observer=events,
            stale_while_revalidate=60,
            stale_if_error=1_000,
            near=NearCache(10) if near else None,
        )
        moved_time.run(_live_through_everything(of, function, moved_time))
        return of.info()._replace(seconds_saved=0), events.kinds(), len(function.asked)

    assert told_by(_by_one) == told_by(_by_many)


async def test_hit_of_a_whole_batch_saves_the_time_of_the_batch_once(store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_, early=0)
    async def rows(ids: list[int]) -> dict[int, int]:
        await asyncio.sleep(0.02)
        return dict.fromkeys(ids, 1)

    ids = list(range(100))
    started = time.perf_counter()
    await rows(ids)
    took = time.perf_counter() - started
    await rows(ids)
    assert 0 < rows.info().seconds_saved <= took
    await rows(ids[:50])
    assert rows.info().seconds_saved <= 1.5 * took
