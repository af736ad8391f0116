"""`AsyncKVStore(backend=...)`: a store over any object with the four methods."""

import asyncio
import os
import pickle
from typing import Any
from unittest.mock import AsyncMock

import pytest

from aiokv import AsyncKVStore, Backend, Event, HttpOptions, RetryPolicy, kv_cached
from aiokv.backends.memory import MemoryBackend


class DictBackend:
    """The smallest backend: no expiry, no lock; can be pickled."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], str] = {}
        self.closed = False

    async def get(self, db_name: str, key: str) -> str | None:
        return self.values.get((db_name, key))

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:  # noqa: ARG002
        self.values[db_name, key] = value

    async def delete(self, db_name: str, key: str) -> None:
        self.values.pop((db_name, key), None)

    async def aclose(self) -> None:
        self.closed = True


async def test_values_go_to_the_backend_that_was_passed_in() -> None:
    backend: Backend = DictBackend()
    store = AsyncKVStore("db", backend=backend)
    await store.set_many({"a": "1", "b": "2"})
    await store.delete("b")
    assert await store.get_many(["a", "b"]) == {"a": "1", "b": None}
    assert backend.values == {("db", "a"): "1"}  # type: ignore[attr-defined]


async def test_closing_the_store_leaves_the_backend_to_whoever_made_it() -> None:
    backend = DictBackend()
    async with AsyncKVStore("db", backend=backend) as store:
        await store.set("k", "v")
    assert not backend.closed
    assert await store.get("k") == "v"


def test_end_of_the_loop_leaves_the_backend_open_and_the_next_loop_goes_on_with_it() -> None:
    backend = DictBackend()
    store = AsyncKVStore("db", backend=backend)
    asyncio.run(store.set("k", "v"))
    assert asyncio.run(store.get("k")) == "v"
    assert not backend.closed


def test_backend_is_used_in_a_forked_child() -> None:
    store = AsyncKVStore("db", backend=DictBackend())
    asyncio.run(store.set("k", "v"))
    child = os.fork()
    if child == 0:
        os._exit(0 if asyncio.run(store.get("k")) == "v" else 1)
    assert os.waitpid(child, 0)[1] == 0


async def test_observer_sees_the_calls() -> None:
    events: list[Event] = []
    store = AsyncKVStore("db", backend=DictBackend(), observer=events.append)
    await store.get("k")
    assert [type(event).__name__ for event in events] == ["CallStarted", "CallEnded"]
    assert events[0].url == "backend://DictBackend"  # type: ignore[union-attr]


async def test_observer_of_a_derived_store_sees_its_calls_alone() -> None:
    events: list[Event] = []
    store = AsyncKVStore("db", backend=DictBackend())
    await store.with_options(observer=events.append).set("k", "v")
    await store.get("k")
    assert [type(event).__name__ for event in events] == ["CallStarted", "CallEnded"]


async def test_cached_functions_share_their_results_through_it() -> None:
    store = AsyncKVStore("db", backend=DictBackend())
    calls = 0

    @kv_cached(ttl=60, store=store, key=str)
    async def double(number: int) -> int:
        nonlocal calls
        calls += 1
        return 2 * number

    assert [await double(2), await double(2)] == [4, 4]
    assert calls == 1


@pytest.mark.parametrize(
    "options",
    [
        {"url": "memory://"},
        {"credentials": "id:secret"},
        {"retry": RetryPolicy()},
        {"http": HttpOptions()},
        {"hedge": True},
    ],
)
def test_arguments_for_urls_alone_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(options))} cannot be combined with backend=.*pass url= instead"):
        AsyncKVStore("db", backend=DictBackend(), **options)


@pytest.mark.parametrize("options", [{"timeout": 1}, {"retry": RetryPolicy()}, {"hedge": False}])
def test_derived_store_refuses_them_too(options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"^{next(iter(options))} cannot be combined with backend="):
        AsyncKVStore("db", backend=DictBackend()).with_options(**options)


class Synchronous(DictBackend):
    def get(self, db_name: str, key: str) -> str | None:  # type: ignore[override]
        return self.values.get((db_name, key))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ({}, "backend of type dict is no Backend: `async def set`, `async def delete`, `async def aclose`"),
        (Synchronous(), "backend of type Synchronous is no Backend: `async def get` must be there"),
        (DictBackend, r"not the class DictBackend; write backend=DictBackend\(...\)"),
        ("memory://", "backend of type str is no Backend"),
    ],
)
def test_object_that_is_no_backend_is_refused_and_its_faults_are_named(backend: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        AsyncKVStore("db", backend=backend)


async def test_mock_of_a_backend_is_taken() -> None:
    mock = AsyncMock(spec=DictBackend())
    mock.get.return_value = "v"
    assert await AsyncKVStore("db", backend=mock).get("k") == "v"


def test_store_can_be_pickled_where_its_backend_can() -> None:
    store = AsyncKVStore("db", backend=DictBackend())
    asyncio.run(store.set("k", "v"))
    assert asyncio.run(pickle.loads(pickle.dumps(store)).get("k")) == "v"
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(AsyncKVStore("db", backend=MemoryBackend()))


async def test_replaced_clock_of_the_package_moves_the_memory_store(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    store = AsyncKVStore("db", backend=MemoryBackend())
    monkeypatch.setattr("aiokv.clock.now", lambda: now)
    await store.set("k", "v", ttl=60)
    now = 1059.0
    assert await store.get("k") == "v"
    now = 1060.0
    assert await store.get("k") is None


async def test_replaced_clock_of_the_package_moves_the_sqlite_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    now = 1000.0
    monkeypatch.setattr("aiokv.clock.now", lambda: now)
    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as store:
        await store.set("k", "v", ttl=60)
        now = 1059.0
        assert await store.get("k") == "v"
        now = 1060.0
        assert await store.get("k") is None
