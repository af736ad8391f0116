"""A store of py-key-value over an `AsyncKVStore`: its protocol's promises, its wrappers, and FastMCP."""

import itertools
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from helpers import still_clock

from aiokv import MAX_TTL_SECONDS, AsyncKVStore, UnsupportedError, ValueTooLargeError

pytest.importorskip("key_value", reason="py-key-value is not installed: pip install 'aiokv[py-key-value]'")

from key_value.aio.adapters.pydantic import PydanticAdapter
from key_value.aio.errors import InvalidTTLError, SerializationError
from key_value.aio.protocols.key_value import AsyncKeyValue
from key_value.aio.wrappers.prefix_keys import PrefixKeysWrapper
from pydantic import BaseModel

from aiokv.adapters.py_key_value import from_key_value
from aiokv.adapters.py_key_value_store import KVKeyValueStore

NAMES = ["a", "a:b", "a%3Ab", "", "..", "é" * 400, "!@#$%^&*()", "a\0"]


@pytest.fixture
async def kv(tmp_path: Path) -> AsyncGenerator[AsyncKVStore]:
    async with AsyncKVStore("kv", url=f"sqlite:///{tmp_path}/kv.db") as kv:
        yield kv


@pytest.fixture
def store(kv: AsyncKVStore) -> KVKeyValueStore:
    return KVKeyValueStore(kv)


def test_it_has_the_whole_protocol(store: KVKeyValueStore) -> None:
    assert isinstance(store, AsyncKeyValue)


async def test_value_comes_back_as_json_has_it(store: KVKeyValueStore) -> None:
    value = {"text": "é\0\ud800", "list": [1, 2**80, None, 1.5], "nested": {"a": True}}
    await store.put("k", value)
    assert await store.get("k") == value
    assert await store.ttl("k") == (value, None)


async def test_value_that_json_cannot_hold_is_refused(store: KVKeyValueStore) -> None:
    with pytest.raises(SerializationError):
        await store.put("k", {"path": Path()})
    with pytest.raises(SerializationError):
        await store.put_many(["a", "b"], [{}, {"path": Path()}])
    assert await store.get_many(["k", "a"]) == [None, None]
    with pytest.raises(ValueTooLargeError):
        await store.put("k", {"large": "x" * 2_000_000})


async def test_any_collection_and_key_stay_apart(store: KVKeyValueStore) -> None:
    names = list(itertools.product([*NAMES[:3], *NAMES[4:]], NAMES))
    for number, (collection, key) in enumerate(names):
        await store.put(key, {"n": number}, collection=collection)
    assert [await store.get(key, collection=collection) for collection, key in names] == [
        {"n": number} for number in range(len(names))
    ]
    for collection in {collection for collection, _ in names}:
        assert sorted(await store.keys(collection)) == sorted(NAMES)


async def test_entry_ends_exactly_after_its_ttl(store: KVKeyValueStore) -> None:
    with still_clock() as clock:
        await store.put("k", {"a": 1}, ttl=2)
        await store.put_many(["l", "m"], [{}, {}], ttl=90.5)
        for seconds, key in ((2, "k"), (90.5, "l")):
            _, left = await store.ttl(key)
            assert left == pytest.approx(seconds, abs=1)
        clock.advance(2)
        assert await store.get_many(["k", "l"]) == [None, {}]
        clock.advance(88.5)
        assert await store.ttl_many(["k", "l", "m"]) == [(None, None)] * 3
        assert await store.keys() == []


async def test_entry_without_ttl_lives_thirty_days(store: KVKeyValueStore) -> None:
    with still_clock() as clock:
        await store.put("k", {})
        await store.put("l", {}, ttl=10 * MAX_TTL_SECONDS)
        _, left = await store.ttl("l")
        assert left == pytest.approx(MAX_TTL_SECONDS, abs=60)
        clock.advance(MAX_TTL_SECONDS - 60)
        assert await store.get_many(["k", "l"]) == [{}, {}]
        clock.advance(60)
        assert await store.get_many(["k", "l"]) == [None, None]


@pytest.mark.parametrize("ttl", [0, -1, True])
async def test_ttl_that_is_none_is_refused(store: KVKeyValueStore, ttl: Any) -> None:
    with pytest.raises(InvalidTTLError):
        await store.put("k", {}, ttl=ttl)


async def test_deletes_count_what_was_there(store: KVKeyValueStore) -> None:
    await store.put_many(["a", "b", "c"], [{}, {}, {}])
    assert [await store.delete("a"), await store.delete("a")] == [True, False]
    assert await store.delete_many(["a", "b", "b", "c"]) == 2
    assert await store.get_many(["a", "b", "c"]) == [None] * 3


async def test_keys_are_limited_and_collections_destroyed_alone(store: KVKeyValueStore) -> None:
    for collection in ("one", "other"):
        await store.put_many([f"k{number}" for number in range(5)], [{}] * 5, collection=collection)
    assert len(await store.keys("one", limit=3)) == 3
    assert await store.keys("one", limit=0) == []
    assert [await store.destroy_collection("one"), await store.destroy_collection("one")] == [True, False]
    assert [len(await store.keys(name)) for name in ("one", "other")] == [0, 5]
    assert await store.destroy()
    assert await store.keys("other") == []


async def test_batches_travel_as_batches(tmp_path: Path) -> None:
    verbs: list[str] = []
    async with AsyncKVStore(
        "kv", url=f"sqlite:///{tmp_path}/kv.db", observer=lambda event: verbs.append(type(event).__name__)
    ) as kv:
        store = KVKeyValueStore(kv)
        keys = [f"k{number}" for number in range(50)]
        await store.put_many(keys, [{}] * 50)
        await store.get_many(keys)
        assert await store.delete_many(keys) == 50
    assert verbs.count("CallEnded") == 4


async def test_wrappers_and_adapters_of_the_package_work_over_it(store: KVKeyValueStore) -> None:
    class User(BaseModel):
        name: str

    users = PydanticAdapter(key_value=PrefixKeysWrapper(store, prefix="user"), pydantic_model=User)
    await users.put("1", User(name="Ada"), ttl=60)
    assert await users.get("1") == User(name="Ada")


async def test_both_ways_together_are_a_store_again(store: KVKeyValueStore) -> None:
    again = AsyncKVStore("again", backend=from_key_value(store))
    await again.set("k", "3 °C", ttl=60)
    assert await again.get("k") == "3 °C"


async def test_store_is_closed_only_where_that_was_asked_for(tmp_path: Path) -> None:
    closed: list[str] = []

    class Noted(AsyncKVStore):
        async def aclose(self) -> None:
            closed.append(self.db_name)
            await super().aclose()

    for name, closes in (("mine", False), ("its", True)):
        async with KVKeyValueStore(Noted(name, url=f"sqlite:///{tmp_path}/kv.db"), close_store=closes) as store:
            await store.put("k", {})
    assert closed == ["its"]
    await Noted("mine", url=f"sqlite:///{tmp_path}/kv.db").aclose()


async def test_store_that_cannot_list_serves_all_but_listings() -> None:
    class OnlyFour:
        def __init__(self) -> None:
            self.values: dict[str, str] = {}

        async def get(self, db_name: str, key: str) -> str | None:  # noqa: ARG002
            return self.values.get(key)

        async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:  # noqa: ARG002
            self.values[key] = value

        async def delete(self, db_name: str, key: str) -> None:  # noqa: ARG002
            self.values.pop(key, None)

        async def aclose(self) -> None:
            pass

    store = KVKeyValueStore(AsyncKVStore("db", backend=OnlyFour()))
    await store.put("k", {"a": 1}, ttl=1)
    assert await store.get("k") == {"a": 1}
    with pytest.raises(UnsupportedError):
        await store.keys()


async def test_fastmcp_serves_a_tool_from_it(store: KVKeyValueStore, kv: AsyncKVStore) -> None:
    fastmcp = pytest.importorskip("fastmcp", reason="fastmcp is not installed: pip install 'aiokv[suites]'")
    caching = pytest.importorskip("fastmcp.server.middleware.caching")
    calls = 0
    mcp = fastmcp.FastMCP("weather")
    mcp.add_middleware(caching.ResponseCachingMiddleware(cache_storage=store))

    @mcp.tool
    def forecast(city: str) -> str:
        nonlocal calls
        calls += 1
        return f"3 °C in {city}"

    async with fastmcp.Client(mcp) as client:
        results = [(await client.call_tool("forecast", {"city": "Oslo"})).data for _ in range(2)]
    assert (results, calls) == (["3 °C in Oslo"] * 2, 1)
    assert await kv.count() >= 1
