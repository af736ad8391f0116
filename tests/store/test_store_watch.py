"""Changes of a namespace as a program reads them."""

import asyncio
import gc
import pickle
from collections.abc import AsyncIterator
from typing import Any

import pytest

from aiokv import AsyncKVStore, Changed, Changes, Lost, StorageError, UnsupportedError
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.watching import Alive, Watch


class WatchedBackend(MemoryBackend):
    """Hand out watches that a test feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.watches: list[Watch] = []
        self.closed: list[Watch] = []

    def watch(self, db_name: str) -> Watch:  # noqa: ARG002 (a backend's)
        self.watches.append(Watch(on_close=self.closed.append))
        return self.watches[-1]


@pytest.fixture
def backend() -> WatchedBackend:
    return WatchedBackend()


@pytest.fixture
def store(backend: WatchedBackend) -> AsyncKVStore:
    return AsyncKVStore("db", backend=backend)


async def next_of(changes: AsyncIterator[Changed | Lost]) -> Changed | Lost:
    async with asyncio.timeout(10):
        return await anext(changes)


async def until_told(changes: Changes, expected: set[Changed]) -> list[Changed]:
    """Read until all that is expected has come; return it in order."""
    told: list[Changed] = []
    while not expected <= set(told):
        change = await next_of(changes)
        if isinstance(change, Changed):
            told.append(change)
    return told


async def test_changes_of_every_store_are_told_in_their_order(url: str, able: AsyncKVStore) -> None:
    async with AsyncKVStore("db2", url=url) as other, able.watch() as changes:
        assert await next_of(changes) == Lost()
        await other.set("k", "v")
        for i in range(5):
            await able.set("k", str(i))
        await able.delete("k")
        await able.set_many({"a": "1", "b": "2"})
        await able.delete_many(["a", "b"])
        await able.set("end", "v")
        told = await until_told(changes, {Changed("end")})
    of = {key: [change.is_delete for change in told if change.key == key] for key in ("k", "a", "b")}
    # Sets of one key that come one upon the other may be told of once.
    assert of["k"][-1] is True
    assert 1 <= of["k"].count(False) <= 5
    assert (of["a"], of["b"]) == ([False, True], [False, True])


async def test_clearing_tells_of_each_key(able: AsyncKVStore) -> None:
    await able.set_many({"a": "1", "b": "2", "c": "3"})
    async with able.watch() as changes:
        assert await next_of(changes) == Lost()
        assert await able.clear() == 3
        await until_told(changes, {Changed(key, is_delete=True) for key in "abc"})


async def test_heartbeats_are_left_out(store: AsyncKVStore, backend: WatchedBackend) -> None:
    async with store.watch() as changes:
        (watch,) = backend.watches
        for event in (Lost(), Alive(), Changed("k"), Alive(), Changed("k", is_delete=True)):
            watch.notify(event)
        assert [await next_of(changes) for _ in range(3)] == [Lost(), Changed("k"), Changed("k", is_delete=True)]


async def test_watch_begins_with_its_block_or_with_its_first_change(store: AsyncKVStore, backend: WatchedBackend) -> None:
    changes = store.watch()
    assert backend.watches == []
    reading = asyncio.ensure_future(next_of(changes))
    await asyncio.sleep(0)
    assert len(backend.watches) == 1
    backend.watches[0].notify(Lost())
    assert await reading == Lost()
    async with store.watch():
        assert len(backend.watches) == 2
    assert backend.closed == [backend.watches[1]]
    await changes.aclose()


async def read_all(changes: Changes) -> list[Changed | Lost]:
    return [change async for change in changes]


@pytest.mark.parametrize("way", ["watch", "store", "parent"])
async def test_loop_over_changes_ends_where_the_watch_or_its_store_is_closed(
    store: AsyncKVStore, backend: WatchedBackend, way: str
) -> None:
    changes = store.with_options(observer=print).watch() if way == "parent" else store.watch()
    reading = asyncio.create_task(read_all(changes))
    await asyncio.sleep(0)
    backend.watches[0].notify(Lost())
    await asyncio.sleep(0)
    await (changes.aclose() if way == "watch" else store.aclose())
    async with asyncio.timeout(10):
        assert await reading == [Lost()]
    assert backend.closed == backend.watches
    await changes.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(changes)
    async with changes as again:
        assert await read_all(again) == []
    assert len(backend.watches) == 1


async def test_closing_a_store_of_any_kind_ends_its_watches(able: AsyncKVStore) -> None:
    changes = able.watch()
    assert await next_of(changes) == Lost()
    reading = asyncio.create_task(read_all(changes))
    await asyncio.sleep(0)
    await able.aclose()
    async with asyncio.timeout(10):
        await reading


async def test_closing_a_store_leaves_the_watches_of_others(store: AsyncKVStore, backend: WatchedBackend) -> None:
    other = AsyncKVStore("db", backend=backend)
    async with other.watch() as changes:
        await store.get("k")
        await store.aclose()
        await store.with_options(observer=print).aclose()
        backend.watches[0].notify(Changed("k"))
        assert await next_of(changes) == Changed("k")


async def test_watch_that_is_dropped_ends(store: AsyncKVStore, backend: WatchedBackend) -> None:
    async def leave_early() -> None:
        async for _ in store.watch():
            return

    leaving = asyncio.create_task(leave_early())
    await asyncio.sleep(0)
    backend.watches[0].notify(Lost())
    await leaving
    gc.collect()
    await asyncio.sleep(0)
    assert backend.closed == backend.watches


async def test_watch_that_is_closed_while_it_begins_leaves_none_behind(store: AsyncKVStore, backend: WatchedBackend) -> None:
    changes = store.watch()
    begin, gate = changes._begin, asyncio.Event()

    async def begin_late() -> Watch:
        watch = await begin()
        await gate.wait()
        return watch

    changes._begin = begin_late
    reading = asyncio.create_task(read_all(changes))
    await asyncio.sleep(0)
    await changes.aclose()
    gate.set()
    assert await reading == []
    assert backend.closed == backend.watches


async def test_watch_that_cannot_go_on_raises_why_and_ends(store: AsyncKVStore, backend: WatchedBackend) -> None:
    changes = store.watch()
    reading = asyncio.create_task(read_all(changes))
    await asyncio.sleep(0)
    backend.watches[0].notify(Changed("k"))
    backend.watches[0].fail(StorageError("the file is gone"))
    with pytest.raises(StorageError, match="the file is gone"):
        await reading
    assert await read_all(changes) == []


async def test_reader_that_is_cancelled_can_go_on(store: AsyncKVStore, backend: WatchedBackend) -> None:
    async with store.watch() as changes:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(changes), 0.001)
        backend.watches[0].notify(Changed("k"))
        assert await next_of(changes) == Changed("k")


async def test_store_that_cannot_watch_says_so(unable: AsyncKVStore) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot tell of changes; .*memory://"):
        async with unable.watch():
            pass
    with pytest.raises(UnsupportedError, match=r"cannot tell of changes; .*memory://"):
        await anext(unable.watch())


def test_one_store_watches_in_several_loops_and_each_ends_its_own(tmp_path: Any) -> None:
    store = AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db")

    async def use() -> set[Changed | Lost]:
        async with store.watch() as changes:
            seen = {await next_of(changes)}
            await store.set("k", "v")
            while Changed("k") not in seen:
                seen.add(await next_of(changes))
            return seen

    for _ in range(3):
        assert asyncio.run(use()) == {Lost(), Changed("k")}


async def test_store_that_watches_can_be_pickled(tmp_path: Any) -> None:
    async with AsyncKVStore("db", url=f"sqlite:///{tmp_path}/kv.db") as store, store.watch():
        copied = pickle.loads(pickle.dumps(store))
        async with copied, copied.watch() as changes:
            assert await next_of(changes) == Lost()
            await store.set("k", "v")
            await until_told(changes, {Changed("k")})


def test_lost_and_alive_are_not_each_other() -> None:
    assert Lost() == Lost()
    assert Lost() != Alive()
    assert Lost() != ()
