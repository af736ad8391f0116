"""Two store objects of one target are one store to everybody who caches in it, in every loop and thread of the process."""

import asyncio
import copy
import pickle
import threading
from typing import Any

import pytest
from caching_under_test import OtherLoop, WatchedBackend, same_target, settle, watched_store
from helpers import wait_until

from aiokv import AsyncKVStore, NearCache, RetryPolicy, kv_cached, kv_cached_many


def _target(*arguments: Any, **options: Any) -> Any:
    store: Any = AsyncKVStore(*arguments, **options)
    return store.target


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("memory://one", "memory://one"),
        ("http://localhost", "http://localhost:80/"),
        ("https://KV.example.com", "https://kv.example.com:443"),
    ],
)
def test_one_target_has_one_name(url: str, same: str) -> None:
    assert _target("db", url=url) == _target("db", url=same)
    assert len({_target("db", url=url), _target("db", url=same)}) == 1


def test_file_is_one_target_however_its_path_is_written(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _target("db", url="sqlite:///kv.db") == _target("db", url=f"sqlite:///{tmp_path}/kv.db")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"db_name": "a"}, {"db_name": "b"}),
        ({"url": "memory://a"}, {"url": "memory://b"}),
        ({"url": "http://a", "credentials": "id:one"}, {"url": "http://a", "credentials": "id:two"}),
        ({"url": "http://a", "credentials": "id:one"}, {"url": "http://a"}),
    ],
)
def test_other_values_are_another_target(one: dict[str, Any], other: dict[str, Any]) -> None:
    defaults: dict[str, Any] = {"db_name": "db", "url": "memory://a"}
    assert _target(**{**defaults, **one}) != _target(**{**defaults, **other})


def test_target_survives_whatever_a_store_survives() -> None:
    store: Any = AsyncKVStore("db", url="http://a", credentials="id:secret")
    assert store.target == store.with_options(timeout=1, retry=RetryPolicy.none(), hedge=True).target
    assert store.target == copy.copy(store).target
    assert store.target == pickle.loads(pickle.dumps(store)).target


def test_target_shows_no_secret() -> None:
    target = _target("db", url="http://a", credentials="ident:s3cret")
    assert "s3cret" not in f"{target!r} {target}"


async def test_any_backend_makes_a_store_whose_target_is_that_backend() -> None:
    make: Any = AsyncKVStore
    one, other = WatchedBackend(), WatchedBackend()
    store = make("db", backend=one)
    await store.set("key", "value", 60)
    assert await make("db", backend=one).get("key") == "value"
    assert await make("db", backend=other).get("key") is None
    assert store.target == make("db", backend=one).target
    assert store.target != make("db", backend=other).target
    assert store.target != make("db2", backend=one).target
    with pytest.raises((TypeError, ValueError)):
        make("db", backend=one, url="memory://a")


async def test_calls_through_new_store_objects_join() -> None:
    _, store = watched_store()
    runs = 0

    @kv_cached(60, store=lambda: same_target(store), key=lambda: "one")
    async def number() -> int:
        nonlocal runs
        runs += 1
        await asyncio.sleep(0)
        return runs

    assert await asyncio.gather(*(number() for _ in range(20))) == [1] * 20
    assert runs == 1


async def test_calls_of_many_through_new_store_objects_join() -> None:
    _, store = watched_store()
    asked: list[list[int]] = []

    @kv_cached_many(60, store=lambda: same_target(store), key=lambda id_: id_)
    async def numbers(ids: list[int]) -> dict[int, int]:
        asked.append(list(ids))
        await asyncio.sleep(0)
        return {id_: id_ for id_ in ids}

    assert await asyncio.gather(*(numbers([1, 2]) for _ in range(20))) == [{1: 1, 2: 2}] * 20
    assert asked == [[1, 2]]


async def test_new_store_objects_share_near_results() -> None:
    backend, store = watched_store()

    @kv_cached(60, store=lambda: same_target(store), key=lambda: "one", near=NearCache(30))
    async def number() -> int:
        return 1

    for _ in range(10):
        await number()
    assert number.info().near_hits == 9
    assert backend.asked("get") == 1


class Truth:
    """What is computed, and a gate for a computation under way in one thread."""

    def __init__(self) -> None:
        self.value = 1
        self.runs = 0
        self.gate = threading.Event()
        self.held: int | None = None

    async def read(self) -> int:
        self.runs += 1
        value = self.value
        if self.held == threading.get_ident():
            while not self.gate.is_set():
                await asyncio.sleep(0.001)
        return value


async def test_call_joins_the_computation_of_another_loop(other_loop: OtherLoop) -> None:
    _, store = watched_store()
    truth = Truth()
    truth.held = other_loop._thread.ident
    read = kv_cached(60, store=store, key=lambda: "one", read_timeout=30)(truth.read)
    there = other_loop.begin(read())
    await asyncio.to_thread(wait_until, lambda: truth.runs == 1)
    here = [asyncio.create_task(read()) for _ in range(5)]
    await settle()
    truth.value = 2
    truth.gate.set()
    assert await asyncio.gather(*here) == [1] * 5
    assert await asyncio.wrap_future(there) == 1
    assert truth.runs == 1
    assert await read() == 1


async def test_call_that_joined_another_loop_may_leave(other_loop: OtherLoop) -> None:
    _, store = watched_store()
    truth = Truth()
    truth.held = other_loop._thread.ident
    read = kv_cached(60, store=store, key=lambda: "one", read_timeout=30)(truth.read)
    there = other_loop.begin(read())
    await asyncio.to_thread(wait_until, lambda: truth.runs == 1)
    here = asyncio.create_task(read())
    await settle()
    here.cancel()
    with pytest.raises(asyncio.CancelledError):
        await here
    truth.gate.set()
    assert await asyncio.wrap_future(there) == 1


@pytest.mark.parametrize("by", ["invalidate", "prime", "refresh"])
@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
async def test_change_through_one_store_object_reaches_a_computation_through_another(by: str, near: NearCache | None) -> None:
    _, store = watched_store()
    gate: asyncio.Event | None = asyncio.Event()
    value = 1

    @kv_cached(60, store=lambda: same_target(store), key=lambda: "one", near=near)
    async def read() -> int:
        mine = value
        if gate is not None and mine == 1:
            await gate.wait()
        return mine

    computing = asyncio.create_task(read())
    await settle()
    value = 2
    await {"invalidate": read.invalidate, "prime": lambda: read.prime(2), "refresh": read.refresh}[by]()
    assert await read() == 2
    gate.set()
    assert await computing == 1
    for _ in range(3):
        assert await read() == 2


@pytest.mark.parametrize("by", ["invalidate", "prime"])
async def test_change_of_many_in_another_loop_reaches_a_computation(by: str, other_loop: OtherLoop) -> None:
    _, store = watched_store()
    truth = Truth()
    truth.held = threading.get_ident()

    @kv_cached_many(60, store=store, key=lambda id_: id_, near=NearCache(30), read_timeout=0.2)
    async def rows(ids: list[int]) -> dict[int, int]:
        return dict.fromkeys(ids, await truth.read())

    computing = asyncio.create_task(rows([1, 2]))
    await asyncio.to_thread(wait_until, lambda: truth.runs == 1)
    truth.value = 2
    many: Any = rows
    await other_loop.run(many.invalidate([1, 2]) if by == "invalidate" else many.prime({1: 2, 2: 2}))
    truth.gate.set()
    assert await computing == {1: 1, 2: 1}
    assert await rows([1, 2]) == {1: 2, 2: 2}
    assert await other_loop.run(rows([1, 2])) == {1: 2, 2: 2}


async def test_unlike_functions_on_one_target_have_nothing_to_do_with_each_other() -> None:
    _, store = watched_store()
    one = kv_cached(60, store=store, key=lambda: "one", prefix="one")(Truth().read)
    two = kv_cached(60, store=same_target(store), key=lambda: "one", prefix="two")(Truth().read)
    await one()
    await two()
    await one.invalidate()
    assert await one.peek() is None
    assert await two.peek() is not None
