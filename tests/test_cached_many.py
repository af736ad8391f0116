"""kv_cached_many: stored ids are fetched together, the function is called once with the rest."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from helpers import FakeClock

from aiokv import AsyncKVStore, NearCache, RetryPolicy, cache_bypass, cache_refresh, kv_cached_many

store = AsyncKVStore("many", url="memory://cached-many")
asked: list[list[int]] = []


@dataclass(frozen=True)
class User:
    id_: int
    name: str


@pytest.fixture(autouse=True)
async def empty() -> None:
    asked.clear()
    await users.invalidate(range(10))
    await lists.invalidate(range(10))


@kv_cached_many(ttl=60, store=store, stale_while_revalidate=30, stale_if_error=100)
async def users(ids: list[int], locale: str = "en") -> dict[int, User]:
    asked.append(ids)
    if 9 in ids:
        raise LookupError("no such user")
    return {id_: User(id_, f"{locale}-{id_}") for id_ in ids if id_ != 7}


@kv_cached_many(ttl=60, store=store, near=NearCache(30), when=lambda result: result != [3])
async def lists(ids: list[int]) -> Mapping[int, list[int]]:
    asked.append(ids)
    return {id_: [id_] for id_ in ids}


async def test_function_is_called_once_with_the_ids_that_are_not_stored() -> None:
    assert await users([1, 2]) == {1: User(1, "en-1"), 2: User(2, "en-2")}
    assert list(await users([3, 2, 1, 4, 3])) == [3, 2, 1, 4]
    assert asked == [[1, 2], [3, 4]]


async def test_no_ids_call_nothing() -> None:
    assert await users([]) == {}
    assert asked == []


async def test_each_id_has_a_key_of_its_own_that_other_arguments_count_in() -> None:
    assert users.key(1) == users.key(1, "en") == users.key(1, locale="en")
    assert len({users.key(1), users.key(2), users.key(1, "no")}) == 3
    await users([1])
    assert await users([1], locale="no") == {1: User(1, "no-1")}


async def test_id_without_a_result_is_left_out_and_asked_again() -> None:
    assert await users([6, 7]) == {6: User(6, "en-6")}
    assert await users([6, 7]) == {6: User(6, "en-6")}
    assert asked == [[6, 7], [7]]


async def test_invalidated_ids_are_computed_anew() -> None:
    await users([1, 2, 3])
    await users.invalidate([2])
    await users([1, 2, 3])
    assert asked == [[1, 2, 3], [2]]


async def test_nobody_can_change_what_others_get() -> None:
    first = await lists([1])
    first[1].append(99)
    assert await lists([1]) == {1: [1]}
    (await lists([1]))[1].append(99)
    assert await lists([1]) == {1: [1]}
    assert lists.info().near_hits >= 2


async def test_result_that_is_not_to_be_stored_is_computed_each_time() -> None:
    assert await lists([3, 4]) == {3: [3], 4: [4]}
    assert await lists([3, 4]) == {3: [3], 4: [4]}
    assert asked == [[3, 4], [3]]


async def test_stale_ids_are_served_and_computed_once_behind(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users._cache, "clock", clock)
    await users([1, 2])
    clock.advance(70)
    assert await users([1, 2]) == {1: User(1, "en-1"), 2: User(2, "en-2")}
    await users.aclose()
    await users([1, 2])
    assert asked == [[1, 2], [1, 2]]


async def test_failing_function_is_answered_with_the_last_good_results(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users._cache, "clock", clock)
    await users([1])
    with pytest.raises(LookupError):
        await users([1, 9])
    clock.advance(100)
    failing = asyncio.create_task(users([1, 9]))
    with pytest.raises(LookupError):
        await failing


async def test_bypass_and_refresh_call_the_function() -> None:
    await users([1])
    with cache_bypass():
        await users([1])
    with cache_refresh():
        await users([1])
    await users([1])
    assert asked == [[1], [1], [1]]


async def test_store_that_is_dead_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = AsyncKVStore("many", url="http://127.0.0.1:1", retry=RetryPolicy.none())
    cache = users._cache
    options = {name: getattr(cache.options, name) for name in cache.options.__slots__}
    monkeypatch.setattr(cache, "options", type(cache.options)(**{**options, "store": dead}))
    for _ in range(5):
        assert await users([1, 2]) == {1: User(1, "en-1"), 2: User(2, "en-2")}
    assert users.info().store_errors >= 3
    await users.aclose()
    monkeypatch.undo()


async def test_method_is_bound_to_its_instance() -> None:
    class App:
        def __init__(self, name: str) -> None:
            self.name = name

        def __cache_key__(self) -> str:
            return self.name

        @kv_cached_many(ttl=60, store=store, key=lambda self, id_: (self.name, id_))
        async def titles(self, ids: list[int]) -> dict[int, str]:
            asked.append(ids)
            return {id_: f"{self.name} {id_}" for id_ in ids}

    one, other = App("one"), App("other")
    assert await one.titles([1, 2]) == {1: "one 1", 2: "one 2"}
    assert await other.titles([1]) == {1: "other 1"}
    assert await one.titles([2, 1]) == {2: "one 2", 1: "one 1"}
    await one.titles.invalidate([1, 2])
    await other.titles.invalidate([1])
    assert asked == [[1, 2], [1]]
