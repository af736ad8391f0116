"""A prime or a refresh that stored nothing, or was overtaken, and a call that failed, leave nothing older to be served."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable

import pytest
from caching_under_test import MovedTime, OtherLoop, WatchedBackend, same_target, settle, watched_store

from aiokv import (
    AioKVError,
    AsyncKVStore,
    CachedFunction,
    CachedManyFunction,
    NearCache,
    StorageError,
    kv_cached,
    kv_cached_many,
)


class Source:
    """The truth, which the cached functions return."""

    def __init__(self) -> None:
        self.value = 1.0
        self.gate: asyncio.Event | None = None

    async def read(self) -> float:
        value = self.value
        if self.gate is not None:
            await self.gate.wait()
        return value


@pytest.fixture
def source() -> Source:
    return Source()


class HeldKeys(WatchedBackend):
    """Hold up or fail the writes of single keys."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(clock)
        self.broken: set[str] = set()
        self.held: dict[str, asyncio.Event] = {}

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        if key in self.broken:
            raise StorageError("broken", verb="set", attempts=1)
        if key in self.held:
            await self.held[key].wait()
        await super().set(db_name, key, value, ttl_seconds)


Write = Callable[[CachedFunction[[], float]], Awaitable[object]]


async def _prime(read: CachedFunction[[], float]) -> None:
    await read.prime(2.0)


async def _refresh(read: CachedFunction[[], float]) -> None:
    await read.refresh()


WRITES = pytest.mark.parametrize("write", [_prime, _refresh])
NEAR = pytest.mark.parametrize("near", [None, 30], ids=["far", "near"])


async def _until_well(backend: WatchedBackend) -> None:
    """Let the store recover, and every probe find that out."""
    backend.failing.clear()
    await asyncio.sleep(60)


@WRITES
@NEAR
@pytest.mark.parametrize("failing", [{"set"}, {"set", "delete"}, {"get", "set"}, {"get", "set", "delete"}], ids=sorted)
def test_write_that_the_store_refuses_raises_or_leaves_nothing_older(
    write: Write, near: int | None, failing: set[str], source: Source, moved_time: MovedTime
) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        read = kv_cached(3600, store=store, key=lambda: "one", near=NearCache(near) if near else None, early=0)(source.read)
        assert await read() == 1
        source.value = 2
        backend.failing = set(failing)
        raised = False
        try:
            await write(read)
        except AioKVError:
            raised = True
        # Nothing was stored, though nobody said so.
        if not raised:
            assert await read() == 2
            await _until_well(backend)
            assert await read() == 2
        await read.aclose()

    moved_time.run(scenario())


@WRITES
@NEAR
def test_write_while_the_store_is_gone_around_raises_or_leaves_nothing_older(
    write: Write, near: int | None, source: Source, moved_time: MovedTime
) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        read = kv_cached(3600, store=store, key=lambda: "one", near=NearCache(near) if near else None, early=0)(source.read)
        other = kv_cached(3600, store=store, key=lambda number: number, prefix="other")(_number)
        assert await read() == 1
        backend.failing = {"get", "set", "delete"}
        for number in range(10):
            await other(number)
        source.value = 2
        raised = False
        try:
            await write(read)
        except AioKVError:
            raised = True
        if not raised:
            await _until_well(backend)
            assert await read() == 2
        await read.aclose()
        await other.aclose()

    moved_time.run(scenario())


@WRITES
def test_write_that_hangs_raises_or_leaves_nothing_older(write: Write, source: Source, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        read = kv_cached(3600, store=store, key=lambda: "one", early=0)(source.read)
        assert await read() == 1
        source.value = 2
        gate = backend.hold("set")
        raised = False
        try:
            await write(read)
        except AioKVError:
            raised = True
        if not raised:
            assert await read() == 2
        gate.set()
        backend.gates.clear()
        await _until_well(backend)
        assert await read() == 2
        await read.aclose()

    moved_time.run(scenario())


async def _number(number: int) -> int:
    return number


@pytest.mark.parametrize("way", ["when", "ttl", "ttl 0", "oversize", "nan"])
@NEAR
def test_prime_with_a_value_that_is_not_stored_leaves_nothing_older(
    way: str, near: int | None, source: Source, moved_time: MovedTime
) -> None:
    async def scenario() -> None:
        _, store = watched_store(moved_time.now)
        ttl: object = {"ttl": lambda r: None if r == 2 else 60, "ttl 0": lambda r: 0 if r == 2 else 60}.get(way, 60)
        when = (lambda r: r != 2) if way == "when" else None

        @kv_cached(ttl, store=store, key=lambda: "one", when=when, near=NearCache(near) if near else None)  # type: ignore[arg-type]
        async def read() -> float | str:
            return await source.read()

        assert await read() == 1
        source.value = 3
        value: float | str = {"oversize": "x" * 2_000_000, "nan": math.nan}.get(way, 2.0)
        # One that is refused aloud may leave everything as it is.
        with contextlib.suppress(TypeError, ValueError):
            await read.prime(value)
            assert await read.peek() is None
            assert await read() == 3

    moved_time.run(scenario())


@NEAR
@pytest.mark.parametrize("by", ["invalidate", "prime", "refresh"])
@pytest.mark.parametrize("of", ["one store object", "another"])
async def test_overtaken_prime_is_served_to_nobody(near: int | None, by: str, of: str, source: Source) -> None:
    backend, store = watched_store()
    other = store if of == "one store object" else same_target(store)
    current = store
    read = kv_cached(3600, store=lambda: current, key=lambda: "one", near=NearCache(near) if near else None)(source.read)
    await read()
    gate = backend.hold("set")
    overtaken = asyncio.create_task(read.prime(2.0))
    await settle()
    source.value, current = 3.0, other
    newer = asyncio.create_task(
        {"invalidate": read.invalidate, "prime": lambda: read.prime(3.0), "refresh": read.refresh}[by]()
    )
    await settle()
    gate.set()
    await asyncio.gather(overtaken, newer)
    for again in (other, store):
        current = again
        assert await read() == 3
        assert await read() == 3


async def test_prime_overtaken_by_another_thread_does_not_come_back_into_the_near_cache(
    source: Source, other_loop: OtherLoop
) -> None:
    backend, store = watched_store()
    read = kv_cached(3600, store=store, key=lambda: "one", near=NearCache(30), read_timeout=0.05)(source.read)
    await read()
    gate = backend.hold("set")
    overtaken = asyncio.create_task(read.prime(2.0))
    await settle()
    source.value = 3
    # It may say that a write of this loop is still under way.
    with contextlib.suppress(AioKVError):
        await other_loop.run(read.invalidate())
    gate.set()
    await overtaken
    await settle()
    assert await read() == 3


class Rows:
    """The truth of many ids."""

    def __init__(self) -> None:
        self.value = 1

    def cached(self, store: AsyncKVStore, **options: object) -> CachedManyFunction[int, [], int]:
        @kv_cached_many(60, **{"store": store, "key": lambda id_: id_, "on_store_error": "raise", **options})  # type: ignore[arg-type]
        async def rows(ids: list[int]) -> dict[int, int]:
            return dict.fromkeys(ids, self.value)

        return rows


@pytest.mark.parametrize("count", [2, 200])
@pytest.mark.parametrize("ending", ["failed", "cancelled"])
@NEAR
async def test_call_of_many_that_ended_leaves_no_write_that_an_invalidation_misses(
    count: int, ending: str, near: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caching_under_test.WatchedBackend", HeldKeys)
    backend, store = watched_store()
    assert isinstance(backend, HeldKeys)
    rows = Rows()
    cached = rows.cached(store, near=NearCache(near) if near else None)
    ids = list(range(count))
    gate = asyncio.Event()
    backend.held = {cached.key(id_): gate for id_ in ids[1:]}
    if ending == "failed":
        backend.broken = {cached.key(0)}
    call = asyncio.create_task(cached(ids))
    await settle(100)
    if ending == "cancelled":
        call.cancel()
    else:
        # The other writes may be waited for.
        asyncio.get_running_loop().call_later(0.05, gate.set)
    with contextlib.suppress(AioKVError, asyncio.CancelledError):
        await call
    backend.broken.clear()
    rows.value = 2
    last = ids[-1]
    invalidation = asyncio.create_task(cached.invalidate([last]))
    await settle(100)
    gate.set()
    await invalidation
    await settle(400)
    assert await cached([last]) == {last: 2}
    await cached.aclose()


def test_call_of_many_that_failed_begins_no_write_after_an_invalidation(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        rows = Rows()
        cached = rows.cached(store)
        ids = list(range(200))
        gate = backend.hold("set")
        call = asyncio.create_task(cached(ids))
        await settle(100)
        backend.failing = {"set"}
        gate.set()
        with contextlib.suppress(AioKVError):
            await call
        # What the failed call had left to do.
        backend.failing.clear()
        rows.value = 2
        await cached.invalidate(ids[-1:])
        await settle(400)
        await _until_well(backend)
        assert await cached(ids[-1:]) == {ids[-1]: 2}
        await cached.aclose()

    moved_time.run(scenario())
