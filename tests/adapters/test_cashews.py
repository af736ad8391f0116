"""A backend for cashews: each of its commands, its decorators and its locks."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from helpers import still_clock

from aiokv import AsyncKVStore, ConnectError, UnsupportedError

pytest.importorskip("cashews", reason="cashews is not installed: pip install 'aiokv[cashews]'")

from cashews import Cache, CacheBackendInteractionError, LockedError

from aiokv.adapters.cashews import KVBackend


@pytest.fixture
async def store(tmp_path: Path) -> AsyncGenerator[AsyncKVStore]:
    async with AsyncKVStore("cache", url=f"sqlite:///{tmp_path}/kv.db") as store:
        yield store


def cache_over(store: AsyncKVStore, **options: Any) -> Cache:
    cache = Cache()
    cache.setup("aiokv://", store=store, **options)
    return cache


@pytest.fixture
def cache(store: AsyncKVStore) -> Cache:
    return cache_over(store)


VALUES: list[Any] = [Decimal("1.5"), "text", "10", b"10", b"\xff", 0, -5, 2**80, True, None, [1, (2,)], {"a": {1}}]


@pytest.mark.parametrize("options", [{}, {"secret": "x", "digestmod": "sha256"}, {"compress_type": "zlib"}], ids=repr)
async def test_value_comes_back_with_its_type(store: AsyncKVStore, options: dict[str, Any]) -> None:
    cache = cache_over(store, **options)
    await cache.set_many({f"many:{number}": value for number, value in enumerate(VALUES)})
    for number, value in enumerate(VALUES):
        await cache.set("k", value)
        read = [await cache.get("k", default="absent"), *await cache.get_many(f"many:{number}", default="absent")]
        assert [(type(one), one) for one in read] == [(type(value), value)] * 2


async def test_url_alone_makes_a_store(tmp_path: Path) -> None:
    cache = Cache()
    cache.setup(f"aiokv://?db_name=cache&url=sqlite:///{tmp_path}/kv.db")
    await cache.set("k", "v")
    assert await cache.get("k") == "v"
    await cache.close()
    async with AsyncKVStore("cache", url=f"sqlite:///{tmp_path}/kv.db") as store:
        assert await store.count() == 1


def test_backend_without_a_store_is_refused() -> None:
    with pytest.raises(TypeError, match="pass store="):
        Cache().setup("aiokv://")


async def test_value_ends_exactly_after_its_time(cache: Cache) -> None:
    with still_clock() as clock:
        await cache.set("k", "v", expire=1.5)
        await cache.set_many({"a": 1}, expire="2s")
        assert await cache.get_expire("k") == 2
        assert await cache.get_expire("absent") == -2
        clock.advance(1.5)
        assert [await cache.get("k"), await cache.get("a"), await cache.exists("k")] == [None, 1, False]
        clock.advance(0.5)
        assert await cache.get("a") is None
        assert [key async for key in cache.scan("*")] == []


async def test_expire_changes_the_time_that_is_left(cache: Cache) -> None:
    with still_clock() as clock:
        await cache.set("k", "v")
        assert await cache.get_expire("k") == -1
        await cache.expire("k", 5)
        await cache.expire("absent", 5)
        assert [await cache.get_expire("k"), await cache.exists("absent")] == [5, False]
        clock.advance(5)
        assert await cache.get("k") is None


async def test_set_heeds_whether_the_key_exists(cache: Cache) -> None:
    assert not await cache.set("k", 1, exist=True)
    assert await cache.set("k", 1, exist=False)
    assert not await cache.set("k", 2, exist=False)
    assert await cache.set("k", 3, exist=True)
    assert await cache.get("k") == 3


async def test_increments_at_once_all_count_within_one_window(store: AsyncKVStore) -> None:
    of_processes = [cache_over(store), cache_over(store)]
    with still_clock() as clock:
        await asyncio.gather(*(of_processes[number % 2].incr("k", expire=10) for number in range(10)))
        assert await of_processes[0].get("k") == 10
        clock.advance(9)
        assert await of_processes[0].incr("k", 5, expire=10) == 15
        clock.advance(1)
        assert await of_processes[0].incr("k", -1) == -1
        assert await of_processes[0].get("k") == -1


async def test_value_of_another_kind_is_not_incremented(cache: Cache) -> None:
    await cache.set("k", "v")
    for change in (cache.incr("k"), cache.incr_bits("k", 1), cache.set_add("k", "a"), cache.slice_incr("k", 0, 1, 5)):
        with pytest.raises(TypeError, match="a value of another kind"):
            await change
    assert await cache.get("k") == "v"


async def test_patterns_match_by_their_stars_alone(cache: Cache) -> None:
    keys = ["a:b", "a:[b]:c", "a:x:c", "b:x:c", "a:\n:c"]
    await cache.set_many(dict.fromkeys(keys, 1))
    await cache.incr_bits("a:bits:c", 1)
    assert {key async for key in cache.scan("a:*:c")} == {"a:[b]:c", "a:x:c", "a:\n:c", "a:bits:c"}
    assert {key async for key, _ in cache.get_match("a:*:c", batch_size=1)} == {"a:[b]:c", "a:x:c", "a:\n:c"}
    assert {key async for key in cache.scan("a:[b]:c")} == {"a:[b]:c"}
    await cache.delete_match("a:[b]*")
    await cache.delete_match("a:b")
    assert {key async for key in cache.scan("*")} == {"a:x:c", "b:x:c", "a:\n:c", "a:bits:c"}
    assert await cache.get_keys_count() == 4
    await cache.clear()
    assert await cache.get_keys_count() == 0


async def test_deletes_notify_and_tell_what_was_there(store: AsyncKVStore) -> None:
    backend = KVBackend(store)
    removed: list[str] = []

    async def note(keys: Any, backend: object) -> None:
        assert isinstance(backend, KVBackend)
        removed.extend(keys)

    backend.on_remove_callback(note)
    await backend.set("k", 1)
    assert [await backend.delete("k"), await backend.delete("k")] == [True, False]
    await backend.delete_many("a", "b")
    assert removed == ["k", "k", "a", "b"]


async def test_bits_are_counted_between_none_and_the_most(cache: Cache) -> None:
    assert await cache.incr_bits("k", 0, 2, 300, size=2) == (1, 1, 1)
    assert await cache.incr_bits("k", 2, size=2, by=9) == (3,)
    assert await cache.incr_bits("k", 0, size=2, by=-9) == (0,)
    assert await cache.get_bits("k", 0, 1, 2, 300, 999, size=2) == (0, 0, 3, 1, 0)
    assert await cache.get("k") is None


async def test_window_counts_what_is_inside_it(cache: Cache) -> None:
    counts = [await cache.slice_incr("k", moment, moment + 5, maxvalue=3) for moment in (0, 1, 2, 3, 6.5, 20)]
    assert counts == [1, 2, 3, 3, 2, 1]


async def test_sets_gain_lose_and_give_texts(store: AsyncKVStore) -> None:
    backend = KVBackend(store)
    with still_clock() as clock:
        await backend.set_add("k", "a", "b", expire=100)
        await backend.set_add("k", "b", "c")
        await backend.set_remove("k", "b", "absent")
        assert [*await backend.set_pop("k", 1), *await backend.set_pop("k"), *await backend.set_pop("k")] == ["a", "c"]
        await backend.set_add("k", "d", expire=100)
        clock.advance(100)
        assert list(await backend.set_pop("k")) == []


async def test_raw_bytes_pass_the_serializer_by(store: AsyncKVStore) -> None:
    backend = KVBackend(store)
    await backend.set("k", "v")
    raw = await backend.get_raw("k")
    await backend.set_raw("other", raw)
    assert [await backend.get("other"), await backend.get_raw("absent")] == ["v", None]
    assert [await backend.get_size("k"), await backend.get_size("absent")] == [len(raw) + 1, 0]
    assert [await backend.ping(), await backend.ping(b"hello")] == [b"PONG", b"hello"]


async def test_lock_lets_one_in_at_a_time(store: AsyncKVStore) -> None:
    inside = most = 0

    async def work(cache: Cache) -> None:
        nonlocal inside, most
        async with cache.lock("k", expire=10):
            inside += 1
            most = max(most, inside)
            assert await cache.is_locked("k")
            await asyncio.sleep(0.01)
            inside -= 1

    await asyncio.gather(work(cache_over(store)), work(cache_over(store)), work(cache_over(store)))
    cache = cache_over(store)
    assert (most, await cache.is_locked("k")) == (1, False)
    async with cache.lock("k", expire=10):
        assert await cache.is_locked("k", wait=0.02, step=0.01)
        assert not await cache.unlock("k", "another's")
        with pytest.raises(LockedError):
            async with cache.lock("k", expire=10, wait=False):
                pass


async def test_decorators_and_tags_share_results_through_it(store: AsyncKVStore) -> None:
    cache = cache_over(store)
    calls: list[str] = []

    @cache(ttl="1m", key="city:{city}", tags=["cities"])
    async def forecast(city: str) -> list[str]:
        calls.append(city)
        return [city]

    @cache.early(ttl="1m", key="early:{city}")
    async def early(city: str) -> list[str]:
        calls.append(city)
        return [city]

    assert [await forecast(city="Oslo"), await forecast(city="Oslo")] == [["Oslo"]] * 2
    assert [await early(city="Rom"), await early(city="Rom")] == [["Rom"]] * 2
    await cache.delete_tags("cities")
    await forecast(city="Oslo")
    assert calls == ["Oslo", "Rom", "Oslo"]


class Down:
    """A backend that always fails."""

    async def get(self, db_name: str, key: str) -> str | None:
        raise ConnectError("down", verb="get", db_name=db_name, key=key)

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:  # noqa: ARG002
        raise ConnectError("down", verb="set", db_name=db_name, key=key)

    async def delete(self, db_name: str, key: str) -> None:
        raise ConnectError("down", verb="delete", db_name=db_name, key=key)

    async def aclose(self) -> None:
        pass


async def test_failing_store_is_passed_by_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_over(AsyncKVStore("db", backend=Down()))
    calls: list[str] = []

    @cache(ttl="1m", key="city:{city}", lock=True)
    async def forecast(city: str) -> str:
        calls.append(city)
        return city

    @cache.rate_limit(limit=1, period="1m", key="rate")
    async def limited() -> str:
        return "served"

    with caplog.at_level(logging.WARNING, "aiokv"):
        assert [await forecast(city="Oslo"), await forecast(city="Oslo")] == ["Oslo"] * 2
        assert [await limited(), await limited()] == ["served"] * 2
        assert [await cache.get("k", default=1), await cache.get_many("a", "b", default=2)] == [1, (2, 2)]
        assert [await cache.set("k", 1), await cache.incr("k"), await cache.delete("k"), await cache.get_expire("k")] == [
            False,
            0,
            False,
            -2,
        ]
        assert [await cache.get_bits("k", 1, 2), await cache.slice_incr("k", 0, 1, 2)] == [(0, 0), 0]
    assert calls == ["Oslo", "Oslo"]
    messages = [record.getMessage() for record in caplog.records if record.name == "aiokv"]
    assert messages == ["the store of cashews failed, and is passed by: ConnectError"]


class Failing:
    """A backend in memory of which some calls fail as a driver's would."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.values: dict[str, str] = {}
        self.calls = 0

    def _begin(self, call: str) -> None:
        self.calls += 1
        if call in self.failing:
            raise ConnectionError("secret")

    async def get(self, db_name: str, key: str) -> str | None:
        self._begin("get")
        return self.values.get(f"{db_name}/{key}")

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:  # noqa: ARG002
        self._begin("set")
        self.values[f"{db_name}/{key}"] = value

    async def delete(self, db_name: str, key: str) -> None:
        self._begin("delete")
        self.values.pop(f"{db_name}/{key}", None)

    async def aclose(self) -> None:
        pass


@pytest.mark.parametrize("failing", [["get"], ["set"], ["get", "set", "delete"]], ids=str)
@pytest.mark.parametrize("wait", [True, False])
async def test_lock_lets_everybody_in_where_a_call_of_the_store_fails(failing: list[str], *, wait: bool) -> None:
    cache = cache_over(AsyncKVStore("db", backend=Failing(*failing)))
    entered = 0
    async with asyncio.timeout(5):
        for _ in range(2):
            async with cache.lock("k", expire=10, wait=wait):
                entered += 1

        @cache.locked(ttl=10, key="k:{x}")
        async def locked(x: int) -> int:
            return x

        assert (await locked(1), entered) == (1, 2)


async def test_lock_that_somebody_has_is_tried_again_at_intervals() -> None:
    backend = Failing()
    cache = cache_over(AsyncKVStore("db", backend=backend))
    async with cache.lock("k", expire=10):
        before = backend.calls
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2), cache.lock("k", expire=10):
                pass
        assert 1 <= backend.calls - before <= 11


async def test_failure_that_is_no_error_of_aiokv_is_passed_by_too(caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_over(AsyncKVStore("db", backend=Failing("get", "set", "delete")))
    assert [await cache.get("k", default=1), await cache.get_many("a", "b", default=2)] == [1, (2, 2)]
    assert [await cache.set("k", 1), await cache.incr("k"), await cache.delete("k"), await cache.exists("k")] == [
        *[False, 0],
        *[False, False],
    ]
    assert [record.getMessage() for record in caplog.records if record.name == "aiokv"] == [
        "the store of cashews failed, and is passed by: ConnectionError"
    ]
    raising = cache_over(AsyncKVStore("db", backend=Failing("get", "set")), suppress=False)
    with pytest.raises(ConnectionError):
        await raising.get("k")
    with pytest.raises(ConnectionError):
        async with raising.lock("k", expire=10):
            pass
    with pytest.raises(CacheBackendInteractionError, match="ConnectionError"):
        await raising.ping()


async def test_failing_store_raises_where_that_was_asked_for() -> None:
    cache = cache_over(AsyncKVStore("db", backend=Down()), suppress=False)
    with pytest.raises(ConnectError):
        await cache.get("k")
    with pytest.raises(CacheBackendInteractionError, match="ConnectError"):
        await cache.ping()


async def test_store_that_cannot_list_serves_all_but_patterns() -> None:
    class OnlyFour:
        def __init__(self) -> None:
            self.values: dict[str, str] = {}

        async def get(self, db_name: str, key: str) -> str | None:
            return self.values.get(f"{db_name}/{key}")

        async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
            assert ttl_seconds >= 60
            self.values[f"{db_name}/{key}"] = value

        async def delete(self, db_name: str, key: str) -> None:
            self.values.pop(f"{db_name}/{key}", None)

        async def aclose(self) -> None:
            pass

    cache = cache_over(AsyncKVStore("db", backend=OnlyFour()))
    await asyncio.gather(*(cache.incr("k", expire=5) for _ in range(5)))
    assert await cache.get("k") == 5
    with pytest.raises(UnsupportedError, match="cannot list its keys"):
        await cache.clear()
