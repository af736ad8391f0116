"""Wrong values that only odd moments bring about: two stores of one place, late writes, results that seem equal."""

import asyncio
import collections
import datetime as dt
import gc
from collections.abc import Generator
from typing import Annotated, Any

import pytest
from caching_under_test import WatchedBackend, same_target, settle
from pydantic import AfterValidator

from aiokv import AioKVError, AsyncKVStore, NearCache, cache_refresh, kv_cached, kv_cached_many, set_default_store
from aiokv.caching.results import NotStorable, ResultCodec
from aiokv.caching.stored import MAX_BEHIND


class Row:
    """What is cached: a value, and a gate for reads of it."""

    def __init__(self) -> None:
        self.value: Any = "old"
        self.gate: asyncio.Event | None = None

    async def read(self) -> Any:
        value, gate = self.value, self.gate
        if gate is not None:
            self.gate = None
            await gate.wait()
        return value


class Service:
    @kv_cached(60, store=lambda self: self.kv, ignore=("self",), prefix="review-hurried", read_timeout=0.05)
    async def hurried(self) -> str:
        return await self.row.read()

    def __init__(self, kv: AsyncKVStore, row: Row) -> None:
        self.kv = kv
        self.row = row

    @kv_cached(60, store=lambda self: self.kv, ignore=("self",), prefix="review-row")
    async def get(self) -> str:
        return await self.row.read()

    @kv_cached(60, store=lambda self: self.kv, ignore=("self",), prefix="review-near", near=NearCache(30))
    async def near(self) -> str:
        return await self.row.read()


@pytest.fixture
def default() -> Generator[None]:
    yield
    set_default_store(None)


async def test_result_of_a_refresh_that_waits_for_other_writes_is_not_stored_after_an_invalidation(
    backend: WatchedBackend, store: AsyncKVStore
) -> None:
    row = Row()
    one, two = Service(store, row), Service(same_target(store), row)
    writes = backend.hold("set")
    writing = asyncio.create_task(two.get())
    await settle()
    # Has computed, and waits for the write of the other store before its own.
    refreshing = asyncio.create_task(one.get.refresh())
    await settle()
    row.value = "new"
    invalidating = asyncio.create_task(one.get.invalidate())
    await settle()
    writes.set()
    await invalidating
    await asyncio.gather(writing, refreshing)
    await settle()
    assert await one.get() == "new"


async def test_invalidation_reaches_the_near_cache_of_another_store_of_the_same_place(store: AsyncKVStore) -> None:
    row = Row()
    one, two = Service(store, row), Service(same_target(store), row)
    assert await two.near() == "old"
    assert await one.near() == "old"
    row.value = "new"
    await one.near.invalidate()
    assert await one.near() == "new"
    assert await two.near() == "new"


async def test_write_that_outlasts_an_invalidation_is_not_served_where_its_removal_fails(
    backend: WatchedBackend, store: AsyncKVStore
) -> None:
    row = Row()
    one, two = Service(store, row), Service(same_target(store), row)
    writes = backend.hold("set")
    assert await two.hurried() == "old"
    row.value = "new"
    invalidating = asyncio.create_task(one.hurried.invalidate())
    await settle()
    backend.failing.add("delete")
    writes.set()
    with pytest.raises(AioKVError):
        await invalidating
    backend.failing.clear()
    # Said to be possible, and mended by asking again.
    await one.hurried.invalidate()
    assert await one.hurried() == "new"


async def test_closing_does_not_cancel_who_waits_for_an_invalidation(backend: WatchedBackend, store: AsyncKVStore) -> None:
    service = Service(store, Row())
    backend.hold("delete")
    invalidating = asyncio.create_task(service.hurried.invalidate())
    await settle()
    await service.hurried.aclose()
    await settle()
    assert not invalidating.cancelled()
    assert isinstance(invalidating.exception(), AioKVError)


async def test_results_of_many_ids_are_written_a_few_at_a_time(backend: WatchedBackend, store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_, prefix="review-burst", read_timeout=0.05)
    async def get(ids: list[int]) -> dict[int, int]:
        return {id_: id_ for id_ in ids}

    writes = backend.hold("set")
    await get(range(1000))
    begun = backend.asked("set")
    writes.set()
    await settle()
    assert begun <= MAX_BEHIND
    assert get.info().store_errors <= MAX_BEHIND


async def test_bound_forms_of_one_instance_are_equal(store: AsyncKVStore) -> None:
    service = Service(store, Row())
    assert service.get == service.get
    assert len({service.get, service.get}) == 1


@pytest.mark.usefixtures("default")
async def test_invalidation_reaches_what_a_former_default_store_of_the_same_place_left_in_the_near_cache(
    store: AsyncKVStore,
) -> None:
    row = Row()

    @kv_cached(60, near=NearCache(30), key=lambda: 1, prefix="review-default")
    async def get() -> str:
        return await row.read()

    set_default_store(store)
    assert await get() == "old"
    set_default_store(same_target(store))
    row.value = "new"
    await get.invalidate()
    set_default_store(store)
    assert await get() == "new"


async def test_refresh_of_several_ids_forgets_one_that_has_no_result_any_more(store: AsyncKVStore) -> None:
    rows = {1: "a", 2: "b"}

    @kv_cached_many(60, store=store, key=lambda id_: id_, prefix="review-gone")
    async def get(ids: list[int]) -> dict[int, str]:
        return {id_: rows[id_] for id_ in ids if id_ in rows}

    assert await get([1, 2]) == {1: "a", 2: "b"}
    del rows[2]
    with cache_refresh():
        assert await get([1, 2]) == {1: "a"}
    assert await get([1, 2]) == {1: "a"}


async def test_several_ids_that_were_read_before_a_refresh_do_not_come_after_it_in_the_near_cache(
    backend: WatchedBackend, store: AsyncKVStore
) -> None:
    row = Row()

    @kv_cached_many(60, store=store, key=lambda id_: id_, prefix="review-late-read", near=(near := NearCache(30)))
    async def get(ids: list[int]) -> dict[int, str]:
        return dict.fromkeys(ids, await row.read())

    assert await get([1]) == {1: "old"}
    near.clear()
    row.value, row.gate = "new", (computes := asyncio.Event())

    async def refresh() -> dict[int, str]:
        with cache_refresh():
            return await get([1])

    refreshing = asyncio.create_task(refresh())
    await settle()
    reads = backend.hold("get")
    reading = asyncio.create_task(get([1]))
    await settle()
    computes.set()
    assert await refreshing == {1: "new"}
    reads.set()
    await reading
    assert await get([1]) == {1: "new"}


async def test_several_ids_that_were_computed_before_a_refresh_ended_are_not_stored_after_it(store: AsyncKVStore) -> None:
    row = Row()

    @kv_cached_many(60, store=store, key=lambda id_: id_, prefix="review-late-write")
    async def get(ids: list[int]) -> dict[int, str]:
        gate, row.gate = row.gate, None
        if gate is None:
            return dict.fromkeys(ids, row.value)
        if row.value == "old":
            # Has read, and is late.
            value = row.value
            await gate.wait()
            return dict.fromkeys(ids, value)
        # Is late, and reads then.
        await gate.wait()
        return dict.fromkeys(ids, row.value)

    async def refresh() -> dict[int, str]:
        with cache_refresh():
            return await get([1])

    row.value, row.gate = "not yet", (first := asyncio.Event())
    refreshing = asyncio.create_task(refresh())
    await settle()
    row.value, row.gate = "old", (second := asyncio.Event())
    reading = asyncio.create_task(get([1]))
    await settle()
    row.value = "new"
    first.set()
    assert await refreshing == {1: "new"}
    second.set()
    await reading
    assert await get([1]) == {1: "new"}


@pytest.mark.parametrize(
    ("returns", "result", "refusal"),
    [
        (collections.deque[int], collections.deque([True]), TypeError),
        (collections.deque[int], collections.deque([1], maxlen=3), NotStorable),
        (dt.datetime, dt.datetime(2026, 10, 25, 2, 30, fold=1), NotStorable),  # noqa: DTZ001 (without a zone, on purpose)
        (dt.time, dt.time(2, 30, fold=1), NotStorable),
        (collections.defaultdict[str, int], collections.defaultdict(lambda: 5, {"a": 1}), NotStorable),
    ],
    ids=["bool in a deque", "bounded deque", "fold", "fold of a time", "default factory"],
)
def test_result_that_would_come_back_changed_is_refused_though_it_compares_equal(
    returns: Any, result: Any, refusal: type[Exception]
) -> None:
    async def function() -> None: ...

    with pytest.raises(refusal, match=r"does not survive|comes back as another value"):
        ResultCodec(function, returns, None).dump(result)


async def test_near_result_that_its_type_no_longer_accepts_is_a_miss_as_it_is_from_the_store(store: AsyncKVStore) -> None:
    limit = 10

    def check(number: int) -> int:
        # As pydantic's FutureDatetime does, which accepts today what it refuses tomorrow.
        if number > limit:
            raise ValueError("too much")
        return number

    returned = [7]

    @kv_cached(
        60,
        store=store,
        key=lambda: 1,
        prefix="review-near-refused",
        near=NearCache(30),
        returns=list[Annotated[int, AfterValidator(check)]],
    )
    async def get() -> list[int]:
        return returned

    assert await get() == [7]
    assert await get() == [7]
    limit = 5
    returned = [3]
    assert await get() == [3]


async def test_store_that_gives_itself_up_does_not_cancel_its_caller(backend: WatchedBackend, store: AsyncKVStore) -> None:
    @kv_cached(60, store=store, key=lambda: 1, prefix="review-gives-up", on_store_error="raise")
    async def get() -> int:
        return 1

    backend.error = asyncio.CancelledError()  # type: ignore[assignment]
    backend.failing.add("get")
    asked = asyncio.create_task(get())
    await asyncio.wait([asked])
    assert not asked.cancelled()
    assert isinstance(asked.exception(), Exception)


async def test_invalidation_waits_for_a_write_elsewhere_behind_which_a_delete_stands(
    backend: WatchedBackend, store: AsyncKVStore
) -> None:
    row = Row()
    one, two = Service(store, row), Service(same_target(store), row)
    writes = backend.hold("set")
    writing = asyncio.create_task(two.get())
    await settle()
    # The delete takes the place of the write that it waits for.
    deleting = asyncio.create_task(two.get.invalidate())
    await settle()
    row.value = "new"
    invalidating = asyncio.create_task(one.get.invalidate())
    await settle()
    returned_first = invalidating.done()
    writes.set()
    await asyncio.gather(writing, deleting, invalidating)
    assert not returned_first


async def test_call_of_many_that_is_cancelled_before_its_writes_begin_leaves_no_warning(store: AsyncKVStore) -> None:
    @kv_cached_many(60, store=store, key=lambda id_: id_, prefix="review-cancelled")
    async def get(ids: list[int]) -> dict[int, int]:
        # An eager task gets here before it has its name.
        await asyncio.sleep(0)
        # Once the writes are begun, and before the first of them has a turn.
        asyncio.get_running_loop().call_soon(calling.cancel)
        return {id_: id_ for id_ in ids}

    calling = asyncio.create_task(get(range(100)))
    await asyncio.wait([calling])
    assert calling.cancelled()
    # A coroutine that nobody awaited says so here, which is an error.
    gc.collect()
