"""A cache for aiocache: what its interface promises, its decorators and its locks."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from helpers import stable_id, still_clock
from slow_backend import SlowBackend

from aiokv import AsyncKVStore

pytest.importorskip("aiocache", reason="aiocache is not installed: pip install 'aiokv[aiocache]'")

from aiocache import cached, cached_stampede, caches, multi_cached
from aiocache.lock import OptimisticLock, OptimisticLockError, RedLock
from aiocache.plugins import HitMissRatioPlugin
from aiocache.serializers import JsonSerializer, NullSerializer, PickleSerializer, StringSerializer

from aiokv.adapters.aiocache import KVCache


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[AsyncKVStore]:
    async with AsyncKVStore("cache", url=f"sqlite:///{tmp_path}/kv.db") as store:
        yield store


@pytest.fixture
def cache(store: AsyncKVStore) -> KVCache:
    return KVCache(store)


@pytest.mark.parametrize(
    ("serializer", "value"),
    [
        (JsonSerializer(), {"a": [1, None, "é"]}),
        (PickleSerializer(), {(1, 2): b"\xff"}),
        (StringSerializer(), "3 °C"),
        (NullSerializer(encoding=None), b"\xff\0"),
        (PickleSerializer(protocol=0), "text"),
        (NullSerializer(), "text"),
        (NullSerializer(), "5"),
        (NullSerializer(), ""),
        (NullSerializer(), b""),
        (NullSerializer(), b"text"),
        (NullSerializer(), b"\xff"),
        (NullSerializer(), 5),
        (NullSerializer(), -(2**70)),
        (NullSerializer(), 2.5),
        (NullSerializer(), "\x01bx"),
        (NullSerializer(), "\ud800"),
    ],
    ids=stable_id,
)
async def test_value_comes_back_as_the_serializer_made_it(store: AsyncKVStore, serializer: Any, value: Any) -> None:
    cache = KVCache(store, serializer=serializer)
    assert await cache.set("k", value)
    assert await cache.multi_set([("a", value), ["b", value]])
    first, *others = [await cache.get("k"), *await cache.multi_get(["a", "absent", "b"])]
    assert (type(first), first, others) == (type(value), value, [value, None, value])


async def test_object_without_a_serializer_is_refused(store: AsyncKVStore) -> None:
    cache = KVCache(store, serializer=NullSerializer())
    with pytest.raises(TypeError, match="the serializer returned dict"):
        await cache.set("k", {})
    with pytest.raises(TypeError, match="the serializer returned bool"):
        await cache.set("k", True)


@pytest.mark.parametrize("ttl", [0.25, 2, 90])
async def test_value_ends_exactly_after_its_ttl(cache: KVCache, ttl: float) -> None:
    with still_clock() as clock:
        await cache.set("k", "v", ttl=ttl)
        await cache.multi_set([("a", 1)], ttl=ttl)
        await cache.add("b", 2, ttl=ttl)
        clock.advance(ttl - 0.2)
        assert await cache.multi_get(["k", "a", "b"]) == ["v", 1, 2]
        clock.advance(0.2)
        assert await cache.multi_get(["k", "a", "b"]) == [None] * 3
        assert not await cache.exists("k")


async def test_ttl_of_the_cache_holds_where_a_call_says_none(store: AsyncKVStore) -> None:
    cache = KVCache(store, ttl=5)
    with still_clock() as clock:
        await cache.set("k", "v")
        await cache.set("for long", "v", ttl=None)
        clock.advance(5)
        assert [await cache.get("k"), await cache.get("for long")] == [None, "v"]


async def test_add_refuses_what_is_there(cache: KVCache) -> None:
    assert await cache.add("k", 1)
    with pytest.raises(ValueError, match="already exists"):
        await cache.add("k", 2)
    assert await cache.get("k") == 1


async def test_one_of_many_adds_at_once_wins(store: AsyncKVStore) -> None:
    # Each cache has locks of its own, as each process has.
    outcomes = await asyncio.gather(*(KVCache(store).add("k", number) for number in range(8)), return_exceptions=True)
    assert sorted(map(repr, outcomes)).count("True") == 1


async def test_increments_at_once_all_count_and_leave_the_expiry(store: AsyncKVStore) -> None:
    caches_of_processes = [KVCache(store), KVCache(store)]
    with still_clock() as clock:
        await caches_of_processes[0].set("k", 40, ttl=100)
        await asyncio.gather(*(caches_of_processes[number % 2].increment("k", 2) for number in range(10)))
        assert await caches_of_processes[0].get("k") == 60
        assert await caches_of_processes[0].increment("k", -61) == -1
        assert await caches_of_processes[0].increment("new", 5) == 5
        clock.advance(100)
        assert await caches_of_processes[0].get("k") is None


async def test_text_cannot_be_incremented(cache: KVCache) -> None:
    await cache.set("k", "v")
    with pytest.raises(TypeError, match="Value is not an integer"):
        await cache.increment("k")


async def test_number_without_a_serializer_stays_one(store: AsyncKVStore) -> None:
    cache = KVCache(store, serializer=NullSerializer())
    assert [await cache.increment("k", 2), await cache.get("k")] == [2, 2]
    await cache.set("text", "2")
    assert [await cache.increment("text"), await cache.get("text")] == [3, "3"]
    await cache.set("float", 2.5)
    with pytest.raises(TypeError, match="Value is not an integer"):
        await cache.increment("float")


async def test_expire_sets_a_time_and_takes_it_away(cache: KVCache) -> None:
    with still_clock() as clock:
        await cache.set("short", "v")
        await cache.set("long", "v", ttl=5)
        assert [await cache.expire("short", 5), await cache.expire("long", 0), await cache.expire("absent", 5)] == [
            True,
            True,
            False,
        ]
        clock.advance(5)
        assert await cache.multi_get(["short", "long"]) == [None, "v"]


async def test_expire_of_another_cache_of_the_store_undoes_no_write() -> None:
    backend = SlowBackend()
    one, other = (KVCache(AsyncKVStore("cache", backend=backend)) for _ in range(2))
    await one.set("k", "old")
    expiring = asyncio.create_task(one.expire("k", 100))
    await backend.reading.wait()
    await other.set("k", "new")
    await expiring
    assert await one.get("k") == "new"


async def test_delete_counts_what_was_there(cache: KVCache) -> None:
    await cache.set("k", "v")
    assert [await cache.delete("k"), await cache.delete("k")] == [1, 0]


async def test_clear_takes_a_namespace_or_all(store: AsyncKVStore) -> None:
    one, other = KVCache(store, namespace="one:"), KVCache(store, namespace="other:")
    await one.set("k", 1)
    await other.set("k", 2)
    await one.clear(namespace="one:")
    assert [await one.get("k"), await other.get("k")] == [None, 2]
    await one.clear()
    assert await other.get("k") is None


async def test_raw_says_what_to_call_instead(cache: KVCache) -> None:
    with pytest.raises(NotImplementedError, match="call the AsyncKVStore itself"):
        await cache.raw("get", "k")


async def test_red_lock_lets_one_in_until_it_is_released(cache: KVCache) -> None:
    inside = most = 0

    async def work() -> None:
        nonlocal inside, most
        async with RedLock(cache, "k", lease=10):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.01)
            inside -= 1

    await asyncio.gather(work(), work())
    assert (most, await cache.get("k-lock")) == (1, None)


async def test_optimistic_lock_refuses_what_was_changed_meanwhile(cache: KVCache) -> None:
    await cache.set("k", "one")
    async with OptimisticLock(cache, "k") as lock:
        assert await lock.cas("two")
    async with OptimisticLock(cache, "k") as lock:
        await cache.set("k", "three")
        with pytest.raises(OptimisticLockError):
            await lock.cas("four")
    assert await cache.get("k") == "three"


async def test_decorators_share_results_through_it(store: AsyncKVStore) -> None:
    calls: list[Any] = []

    @cached(ttl=60, cache=KVCache, store=store)
    async def forecast(city: str) -> list[str]:
        calls.append(city)
        return [city]

    @cached_stampede(ttl=60, lease=5, cache=KVCache, store=store, namespace="s:")
    async def slow(city: str) -> list[str]:
        calls.append(city)
        return [city]

    @multi_cached("ids", cache=KVCache, store=store, namespace="m:")
    async def many(ids: list[str]) -> dict[str, str]:
        calls.append(ids)
        return {one: one for one in ids}

    assert [await forecast("Oslo"), await forecast("Oslo")] == [["Oslo"]] * 2
    assert await asyncio.gather(slow("Rom"), slow("Rom")) == [["Rom"]] * 2
    assert [await many(ids=["a", "b"]), await many(ids=["a", "c"])] == [{"a": "a", "b": "b"}, {"a": "a", "c": "c"}]
    assert calls == ["Oslo", "Rom", ["a", "b"], ["c"]]


async def test_configuration_by_name_and_plugins_work(store: AsyncKVStore) -> None:
    caches.set_config({"default": {"cache": "aiokv.adapters.aiocache.KVCache", "store": store}})
    cache = caches.get("default")
    assert isinstance(cache, KVCache)
    cache.plugins = [HitMissRatioPlugin()]
    await cache.set("k", 1)
    await cache.get("k")
    await cache.get("absent")
    assert cache.hit_miss_ratio == {"total": 2, "hits": 1, "hit_ratio": 0.5}


async def test_cache_opens_again_after_it_was_closed(cache: KVCache) -> None:
    await cache.set("k", "v")
    await cache.close()
    assert await cache.get("k") == "v"
