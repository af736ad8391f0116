"""What an invalidation, a refresh and a prime reach in other event loops of the process, and what a fork leaves behind."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from caching_under_test import OtherLoop, WatchedBackend, in_child, settle
from helpers import wait_until

from aiokv import AsyncKVStore, CachedFunction, CallTimeoutError, NearCache, kv_cached, kv_cached_many


class Source:
    """What a cached function reads, and a gate for those of one thread."""

    def __init__(self) -> None:
        self.value = 1
        self.gate = threading.Event()
        self.held_thread: int | None = None
        self.reading = 0

    async def read(self) -> int:
        value = self.value
        self.reading += 1
        if threading.get_ident() == self.held_thread:
            while not self.gate.is_set():
                await asyncio.sleep(0.001)
        return value

    def hold(self, other_loop: OtherLoop) -> None:
        self.held_thread = other_loop._thread.ident


@pytest.fixture
def source() -> Source:
    return Source()


async def _value(cached: CachedFunction[[], int]) -> int | None:
    peeked = await cached.peek()
    return None if peeked is None else peeked.value


Newer = Callable[[CachedFunction[[], int]], Awaitable[Any]]

NEWER: dict[str, tuple[Newer, int | None]] = {
    "invalidate": (lambda cached: cached.invalidate(), None),
    "refresh": (lambda cached: cached.refresh(), 2),
    "prime": (lambda cached: cached.prime(2), 2),
}


@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
@pytest.mark.parametrize("newer", NEWER)
async def test_computation_in_another_loop_is_not_stored_after_something_newer(
    newer: str, near: NearCache | None, source: Source, other_loop: OtherLoop, store: AsyncKVStore
) -> None:
    read = kv_cached(60, store=store, key=lambda: "one", near=near)(source.read)
    source.hold(other_loop)
    computing = other_loop.begin(read())
    await asyncio.to_thread(wait_until, lambda: source.reading == 1)
    source.value = 2
    act, expected = NEWER[newer]
    await act(read)
    source.gate.set()
    assert await asyncio.wrap_future(computing) == 1
    assert await _value(read) == expected
    assert [await read(), await other_loop.run(read())] == [2, 2]
    await other_loop.run(read.aclose())


async def test_call_in_another_loop_does_not_join_what_was_invalidated(
    source: Source, other_loop: OtherLoop, store: AsyncKVStore
) -> None:
    read = kv_cached(60, store=store, key=lambda: "one")(source.read)
    source.hold(other_loop)
    computing = other_loop.begin(read())
    await asyncio.to_thread(wait_until, lambda: source.reading == 1)
    source.value = 2
    await read.invalidate()
    source.held_thread = None
    assert await other_loop.run(read()) == 2
    source.gate.set()
    assert await asyncio.wrap_future(computing) == 1


@pytest.mark.parametrize("write", ["await", "background"])
@pytest.mark.parametrize("newer", NEWER)
async def test_write_under_way_in_another_loop_does_not_outlive_something_newer(  # noqa: PLR0913, PLR0917 (fixtures)
    newer: str, write: str, source: Source, other_loop: OtherLoop, backend: WatchedBackend, store: AsyncKVStore
) -> None:
    read = kv_cached(60, store=store, key=lambda: "one", write=write)(source.read)  # type: ignore[call-overload]
    source.hold(other_loop)
    source.gate.set()
    gate = backend.hold("set")
    computing = other_loop.begin(read())
    await asyncio.to_thread(wait_until, lambda: backend.asked("set") == 1)
    del backend.gates["set"]
    source.value = 2
    act, expected = NEWER[newer]
    acting = asyncio.create_task(act(read))  # type: ignore[arg-type]
    await settle()
    other_loop.loop.call_soon_threadsafe(gate.set)
    await acting
    assert await asyncio.wrap_future(computing) == 1
    await other_loop.run(read.aclose())
    assert await _value(read) in {expected, None}
    assert await read() == 2


async def test_write_that_lands_late_in_another_loop_is_removed_again(
    source: Source, other_loop: OtherLoop, backend: WatchedBackend, store: AsyncKVStore
) -> None:
    read = kv_cached(60, store=store, key=lambda: "one", read_timeout=0.05)(source.read)
    gate = backend.hold("set")
    assert await other_loop.run(read()) == 1
    source.value = 2
    with pytest.raises(CallTimeoutError, match="still storing"):
        await read.invalidate()
    other_loop.loop.call_soon_threadsafe(gate.set)
    await other_loop.run(read.aclose())
    assert await _value(read) is None
    await read.aclose()


async def test_invalidation_reaches_another_store_object_of_the_same_place(source: Source) -> None:
    one, same, elsewhere = (AsyncKVStore(db, url="memory://cached-threads-place") for db in ("db", "db", "other"))
    stores = [one, elsewhere, same]
    gate = asyncio.Event()
    asked = asyncio.Event()

    async def held() -> int:
        value = source.value
        asked.set()
        await gate.wait()
        return value

    held_read = kv_cached(60, store=lambda: stores[0], key=lambda: "one")(held)
    computing = asyncio.create_task(held_read())
    await asked.wait()
    asked.clear()
    stores[0] = elsewhere
    computing_elsewhere = asyncio.create_task(held_read())
    await asked.wait()
    stores[0] = same
    await held_read.invalidate()
    gate.set()
    await asyncio.gather(computing, computing_elsewhere)
    assert await same.get(held_read.key()) is None
    assert await elsewhere.get(held_read.key()) is not None


async def test_many_that_are_computed_in_another_loop_are_not_stored_after_an_invalidation(
    source: Source, other_loop: OtherLoop, store: AsyncKVStore
) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_)
    async def many(ids: list[int]) -> dict[int, int]:
        value = await source.read()
        return dict.fromkeys(ids, value)

    source.hold(other_loop)
    computing = other_loop.begin(many([1, 2]))
    await asyncio.to_thread(wait_until, lambda: source.reading == 1)
    source.value = 2
    await many.invalidate([1])
    source.gate.set()
    assert await asyncio.wrap_future(computing) == {1: 1, 2: 1}
    assert await many([1, 2]) == {1: 2, 2: 1}


async def test_loop_that_has_stopped_holds_no_invalidation_up_for_long(
    source: Source, backend: WatchedBackend, store: AsyncKVStore
) -> None:
    read = kv_cached(60, store=store, key=lambda: "one", write="background", read_timeout=0.05)(source.read)
    stopped = asyncio.new_event_loop()
    gate = backend.hold("set")
    await asyncio.to_thread(stopped.run_until_complete, read())
    source.value = 2
    with pytest.raises(CallTimeoutError, match="still storing"):
        async with asyncio.timeout(10):
            await read.invalidate()
    gate.set()
    await asyncio.to_thread(stopped.run_until_complete, read.aclose())
    stopped.close()
    assert await _value(read) is None
    async with asyncio.timeout(10):
        await read.invalidate()


async def test_loops_that_invalidate_each_others_writes_do_not_wait_for_each_other(
    source: Source, other_loop: OtherLoop, store: AsyncKVStore
) -> None:
    read = kv_cached(60, store=store, key=lambda: "one", write="background", read_timeout=30.0)(source.read)

    async def turns() -> None:
        for _ in range(50):
            await asyncio.gather(read.refresh(), read.invalidate(), read())

    async with asyncio.timeout(15):
        await asyncio.gather(turns(), other_loop.run(turns()))
    source.value = 2
    await read.invalidate()
    assert [await read(), await other_loop.run(read())] == [2, 2]
    await other_loop.run(read.aclose())
    await read.aclose()


@pytest.mark.usefixtures("hurried_threads")
async def test_results_are_never_older_than_the_last_invalidation(store: AsyncKVStore, other_loop: OtherLoop) -> None:
    near = NearCache(30)
    versions = [0]

    @kv_cached(60, store=store, key=lambda: "one", near=near)
    async def version() -> int:
        value = versions[0]
        await asyncio.sleep(0)
        return value

    async def reader(place: int) -> None:
        while not stop.is_set():
            least = versions[1]
            assert await version() >= least
            turns[place] += 1
            # A near hit gives nobody else a turn.
            await asyncio.sleep(0)

    stop = threading.Event()
    versions.append(0)
    turns = [0, 0, 0]
    reading = [other_loop.begin(reader(place)) for place in range(3)]
    await asyncio.to_thread(wait_until, lambda: all(turns))
    for number in range(1, 150):
        versions[0] = number
        await version.invalidate()
        # What is asked for from here on is of this version or a newer one.
        versions[1] = number
        assert await version() >= number
    stop.set()
    for one in reading:
        await asyncio.wrap_future(one)
    await other_loop.run(version.aclose())


@pytest.mark.usefixtures("hurried_threads")
def test_counts_are_exact_in_several_threads() -> None:
    near = NearCache(300)
    store = AsyncKVStore("db", url="memory://cached-threads-counts")

    @kv_cached(600, store=store, key=lambda: "one", near=near, early=0.0)
    async def one() -> int:
        return 1

    async def hits() -> None:
        for _ in range(2_000):
            await one()

    asyncio.run(one())
    threads = [threading.Thread(target=lambda: asyncio.run(hits(), debug=False)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert one.info().near_hits == 12_000


async def test_child_waits_for_no_flight_of_its_parent(source: Source, other_loop: OtherLoop) -> None:
    store = AsyncKVStore("db", url="memory://cached-threads-fork")
    read = kv_cached(60, store=store, key=lambda: "one", write="background")(source.read)
    source.hold(other_loop)
    computing = other_loop.begin(read())
    await asyncio.to_thread(wait_until, lambda: source.reading == 1)

    def child() -> None:
        async def main() -> None:
            async with asyncio.timeout(10):
                assert await read() == 1
                source.value = 2
                await read.invalidate()
                assert await read() == 2
                assert await read.refresh() == 2

        asyncio.run(main())

    assert await asyncio.to_thread(in_child, child) == 0
    source.gate.set()
    assert await asyncio.wrap_future(computing) == 1
    await other_loop.run(read.aclose())


async def test_child_waits_for_no_write_of_its_parent(
    source: Source, other_loop: OtherLoop, backend: WatchedBackend, store: AsyncKVStore
) -> None:
    read = kv_cached(60, store=store, key=lambda: "one", write="background", read_timeout=30.0)(source.read)
    gate = backend.hold("set")
    assert await other_loop.run(read()) == 1

    def child() -> None:
        del backend.gates["set"]
        source.value = 2

        async def main() -> None:
            async with asyncio.timeout(5):
                await read.invalidate()
                assert await read() == 2

        asyncio.run(main())

    assert await asyncio.to_thread(in_child, child) == 0
    other_loop.loop.call_soon_threadsafe(gate.set)
    await other_loop.run(read.aclose())


def test_child_of_a_thread_that_holds_a_near_cache_can_use_it() -> None:
    near = NearCache(30)
    store = AsyncKVStore("db", url="memory://cached-threads-near")

    @kv_cached(60, store=store, key=lambda name: name, near=near)
    async def name_of(name: str) -> str:
        return name

    asyncio.run(name_of("a"))

    def child() -> None:
        async def main() -> None:
            async with asyncio.timeout(10):
                assert [await name_of("a"), await name_of("b"), await name_of("b")] == ["a", "b", "b"]

        asyncio.run(main())
        assert near.size_bytes == sum(slot.size_bytes for slot in near.slots.values())

    with near._lock:
        near.size_bytes += 1_000
        status: list[int] = []
        thread = threading.Thread(target=lambda: status.append(in_child(child)))
        thread.start()
        thread.join()
        near.size_bytes -= 1_000
    assert status == [0]
