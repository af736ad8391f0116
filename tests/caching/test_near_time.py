"""The near cache and the wall clock, and what the near cache holds on to."""

import gc
import weakref
from datetime import timedelta
from typing import Any

import pytest
from caching_under_test import MovedTime, watched_store

from aiokv import AsyncKVStore, NearCache, kv_cached, kv_cached_many


async def _one() -> int:
    return 1


async def _ones(ids: list[int]) -> dict[int, int]:
    return dict.fromkeys(ids, 1)


def _caller(of: str, store: AsyncKVStore, near: NearCache, ttl: int = 86_400) -> Any:
    if of == "one":
        cached = kv_cached(ttl, store=store, near=near, early=0)(_one)
        return cached, cached
    many = kv_cached_many(ttl, store=store, near=near, early=0)(_ones)
    return many, lambda: many([1])


OF = pytest.mark.parametrize("of", ["one", "many"])


@OF
@pytest.mark.parametrize("back", [1, 60, 3_600, 86_400 * 30])
def test_clock_set_back_keeps_no_near_result_past_its_time(of: str, back: float, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached, call = _caller(of, watched_store(moved_time.now)[1], NearCache(1))
        await call()
        await call()
        assert cached.info().near_hits == 1
        moved_time.wall_shift -= back
        moved_time.advance(1.5)
        await call()
        assert cached.info().near_hits == 1

    moved_time.run(scenario())


@OF
def test_clock_set_forward_ends_no_near_result_before_its_time(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached, call = _caller(of, watched_store(moved_time.now)[1], NearCache(10), ttl=60)
        await call()
        moved_time.wall_shift += 3_600
        moved_time.advance(5)
        await call()
        assert cached.info().near_hits == 1

    moved_time.run(scenario())


@OF
def test_near_result_read_from_the_store_is_kept_no_longer_than_it_is_fresh(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        store = watched_store(moved_time.now)[1]
        _, first = _caller(of, store, NearCache(1), ttl=60)
        await first()
        moved_time.advance(55)
        # Another process, whose near cache would keep it for a minute.
        cached, call = _caller(of, store, NearCache(60), ttl=60)
        await call()
        await call()
        assert cached.info().near_hits == 1
        moved_time.advance(6)
        await call()
        assert (cached.info().near_hits, cached.info().computations) == (1, 1)

    moved_time.run(scenario())


@OF
def test_result_read_after_the_clock_was_set_back_is_kept_for_the_near_time_at_most(of: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        store = watched_store(moved_time.now)[1]
        _, first = _caller(of, store, NearCache(1), ttl=60)
        await first()
        # By this clock the entry is fresh for more than an hour.
        moved_time.wall_shift -= 3_600
        cached, call = _caller(of, store, NearCache(timedelta(seconds=10)), ttl=60)
        await call()
        near_hits = cached.info().near_hits
        moved_time.advance(10.5)
        await call()
        assert cached.info().near_hits == near_hits

    moved_time.run(scenario())


def test_near_result_of_a_prime_lasts_by_the_steady_clock(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        cached, call = _caller("one", watched_store(moved_time.now)[1], NearCache(1))
        await cached.prime(7)
        assert await call() == 7
        assert cached.info().near_hits == 1
        moved_time.wall_shift -= 3_600
        moved_time.advance(2)
        await call()
        assert cached.info().near_hits == 1

    moved_time.run(scenario())


class Tenant:
    """One of many users, each with a store of its own."""

    near = NearCache(600)

    def __init__(self, name: str) -> None:
        self.kv = AsyncKVStore(name, url="memory://near-time")

    @kv_cached(600, store=lambda self: self.kv, ignore=["self"], near=near)
    async def one(self) -> int:
        return 1

    @kv_cached_many(600, store=lambda self: self.kv, ignore=["self"], near=near)
    async def ones(self, ids: list[int]) -> dict[int, int]:
        return dict.fromkeys(ids, 1)


@OF
async def test_near_results_hold_no_store(of: str) -> None:
    references = []
    for number in range(100):
        tenant = Tenant(f"{of}-{number}")
        for _ in range(2):
            if of == "one":
                assert await tenant.one() == 1
            else:
                assert await tenant.ones([1]) == {1: 1}
        references.append((weakref.ref(tenant), weakref.ref(tenant.kv)))
        del tenant
    gc.collect()
    # What belongs to the last call may be remembered for the next.
    assert sum(tenant() is not None for tenant, _ in references) <= 1
    assert sum(store() is not None for _, store in references) <= 1


async def test_store_of_a_function_that_is_dropped_is_held_by_no_near_cache() -> None:
    near = NearCache(600)
    references = []
    for number in range(20):
        store = AsyncKVStore(f"dropped-{number}", url="memory://near-time")
        cached = kv_cached(600, store=store, near=near, key=lambda: "one")(_one)
        await cached()
        references.append(weakref.ref(store))
        await cached.aclose()
        del cached, store
    gc.collect()
    assert sum(store() is not None for store in references) <= 1


async def test_near_results_of_two_tenants_are_never_mixed_up() -> None:
    tenants = [AsyncKVStore(f"mixed-{number}", url="memory://near-time") for number in range(5)]
    current = 0

    @kv_cached(600, store=lambda: tenants[current], key=lambda: "one", near=NearCache(600))
    async def number() -> int:
        return current

    for _ in range(3):
        for current in range(5):
            assert await number() == current
