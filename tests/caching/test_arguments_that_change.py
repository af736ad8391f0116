"""Arguments that change before, during or after a call: what was computed from them is their caller's alone."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from caching_under_test import MovedTime, settle, watched_store

from aiokv import AsyncKVStore, CachedFunction, NearCache, kv_cached, kv_cached_many


@dataclass
class Request:
    tenant: str
    filters: list[str] = field(default_factory=list)


class Session:
    """Part of a key by what it says of itself, and of another mind later."""

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant

    def __cache_key__(self) -> str:
        return self.tenant


class Stage:
    """What the functions below do beside computing, as each test wants it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gate: asyncio.Event | None = None

    def hold(self) -> asyncio.Event:
        self.gate = asyncio.Event()
        return self.gate

    async def enter(self, what: str) -> None:
        self.seen.append(what)
        if self.gate is not None:
            await self.gate.wait()


stage = Stage()


@pytest.fixture(autouse=True)
def empty_stage() -> None:
    stage.__init__()  # type: ignore[misc]


async def report(request: Request) -> str:
    tenant = request.tenant
    await stage.enter(tenant)
    return f"{tenant} {request.tenant} {request.filters}"


async def report_of_session(session: Session) -> str:
    tenant = session.tenant
    await stage.enter(tenant)
    return f"{tenant} {session.tenant}"


async def report_of_mapping(request: dict[str, Any]) -> str:
    tenant = request["tenant"]
    await stage.enter(tenant)
    return f"{tenant} {request['tenant']} {request.get('filters')}"


async def reports(ids: list[int], request: Request) -> dict[int, str]:
    tenant = request.tenant
    await stage.enter(tenant)
    return {id_: f"{id_} {tenant} {request.tenant}" for id_ in ids}


async def sorted_in_place(words: list[str]) -> list[str]:
    await stage.enter(",".join(words))
    words.sort()
    return words


def _cached(store: AsyncKVStore, near: NearCache | None = None) -> CachedFunction[[Request], str]:
    return kv_cached(60, store=store, near=near, early=0)(report)


@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
async def test_argument_changed_while_the_store_is_read_is_never_served_to_others(near: NearCache | None) -> None:
    backend, store = watched_store()
    cached = _cached(store, near)
    request = Request("a")
    gate = backend.hold("get")
    call = asyncio.create_task(cached(request))
    await settle()
    request.tenant = "b"
    gate.set()
    assert await call == "b b []"
    assert await cached.peek(Request("a")) is None
    assert await cached(Request("a")) == "a a []"
    assert await cached(Request("b")) == "b b []"


@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
async def test_argument_changed_while_the_function_runs_is_never_served_to_others(near: NearCache | None) -> None:
    _, store = watched_store()
    cached = _cached(store, near)
    request = Request("a")
    gate = stage.hold()
    call = asyncio.create_task(cached(request))
    await settle()
    request.tenant = "b"
    gate.set()
    assert await call == "a b []"
    for tenant in ("a", "b"):
        assert await cached.peek(Request(tenant)) is None
        assert await cached(Request(tenant)) == f"{tenant} {tenant} []"


async def test_nested_container_that_changes_counts_as_a_change() -> None:
    _, store = watched_store()
    cached = _cached(store)
    request = Request("a", ["x"])
    gate = stage.hold()
    call = asyncio.create_task(cached(request))
    await settle()
    request.filters.append("y")
    gate.set()
    assert await call == "a a ['x', 'y']"
    assert await cached(Request("a", ["x"])) == "a a ['x']"


async def test_argument_that_changed_and_changed_back_before_the_function_ran_is_stored() -> None:
    backend, store = watched_store()
    cached = _cached(store)
    request = Request("a")
    gate = backend.hold("get")
    call = asyncio.create_task(cached(request))
    await settle()
    request.tenant = "b"
    request.tenant = "a"
    gate.set()
    assert await call == "a a []"
    assert await cached(Request("a")) == "a a []"
    assert stage.seen == ["a"]


async def test_mapping_that_changes_is_never_served_to_others() -> None:
    backend, store = watched_store()
    cached = kv_cached(60, store=store)(report_of_mapping)
    request: dict[str, Any] = {"tenant": "a"}
    gate = backend.hold("get")
    call = asyncio.create_task(cached(request))
    await settle()
    request["tenant"] = "b"
    gate.set()
    assert await call == "b b None"
    assert await cached({"tenant": "a"}) == "a a None"


async def test_object_whose_cache_key_changes_is_never_served_to_others() -> None:
    _, store = watched_store()
    cached = kv_cached(60, store=store)(report_of_session)
    session = Session("a")
    gate = stage.hold()
    call = asyncio.create_task(cached(session))
    await settle()
    session.tenant = "b"
    gate.set()
    assert await call == "a b"
    assert await cached(Session("a")) == "a a"
    assert await cached(Session("b")) == "b b"


async def test_key_function_is_asked_again_before_and_after_the_function() -> None:
    backend, store = watched_store()

    @kv_cached(60, store=store, key=lambda request: request.tenant)
    async def local(request: Request) -> str:
        await stage.enter(request.tenant)
        return request.tenant

    request = Request("a")
    gate = backend.hold("get")
    call = asyncio.create_task(local(request))
    await settle()
    request.tenant = "b"
    gate.set()
    assert await call == "b"
    assert await local(Request("a")) == "a"


async def test_function_that_changes_its_own_argument_stores_nothing_under_either_key() -> None:
    _, store = watched_store()
    cached = kv_cached(60, store=store)(sorted_in_place)
    assert await cached(["b", "a"]) == ["a", "b"]
    assert await cached.peek(["b", "a"]) is None
    assert await cached.peek(["a", "b"]) is None
    # One that has nothing to change is stored.
    assert await cached(["a", "b"]) == ["a", "b"]
    assert await cached.peek(["a", "b"]) is not None


async def test_those_who_waited_for_a_call_whose_argument_changed_compute_their_own() -> None:
    _, store = watched_store()
    cached = _cached(store)
    changing = Request("a")
    gate = stage.hold()
    leader = asyncio.create_task(cached(changing))
    await settle()
    waiters = [asyncio.create_task(cached(Request("a"))) for _ in range(5)]
    await settle()
    changing.tenant = "b"
    gate.set()
    assert await leader == "a b []"
    assert await asyncio.gather(*waiters) == ["a a []"] * 5
    assert await cached(Request("a")) == "a a []"


async def test_those_who_waited_for_the_read_of_a_call_whose_argument_changed_compute_their_own() -> None:
    backend, store = watched_store()
    cached = _cached(store)
    changing = Request("a")
    gate = backend.hold("get")
    leader = asyncio.create_task(cached(changing))
    await settle()
    waiters = [asyncio.create_task(cached(Request("a"))) for _ in range(5)]
    await settle()
    changing.tenant = "b"
    gate.set()
    assert await leader == "b b []"
    assert await asyncio.gather(*waiters) == ["a a []"] * 5


async def test_waiter_whose_own_argument_changed_is_not_served_to_others() -> None:
    _, store = watched_store()
    cached = _cached(store)
    gate = stage.hold()
    leader = asyncio.create_task(cached(Request("a")))
    await settle()
    changing = Request("a")
    waiter = asyncio.create_task(cached(changing))
    await settle()
    changing.tenant = "b"
    gate.set()
    assert await leader == "a a []"
    # What it asked for when it called.
    assert await waiter == "a a []"
    assert await cached(Request("a")) == "a a []"
    assert await cached(Request("b")) == "b b []"


def test_refresh_with_an_argument_that_changes_leaves_nothing_older_behind(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        _, store = watched_store(moved_time.now)
        cached = _cached(store)
        await cached(Request("a"))
        changing = Request("a")
        gate = stage.hold()
        refreshed = asyncio.create_task(cached.refresh(changing))
        await settle()
        changing.tenant = "b"
        gate.set()
        assert await refreshed == "a b []"
        assert await cached.peek(Request("a")) is None
        assert await cached(Request("a")) == "a a []"

    moved_time.run(scenario())


@pytest.mark.parametrize("when", ["before it begins", "while it runs"])
@pytest.mark.parametrize("near", [None, NearCache(30)], ids=["far", "near"])
def test_background_refresh_serves_nothing_of_an_argument_that_changed_since(
    when: str, near: NearCache | None, moved_time: MovedTime
) -> None:
    async def scenario() -> None:
        _, store = watched_store(moved_time.now)
        cached = kv_cached(60, store=store, near=near, early=0, stale_while_revalidate=600)(report)
        await cached(Request("a", ["x"]))
        moved_time.advance(100)
        request = Request("a", ["x"])
        gate = stage.hold()
        assert await cached(request) == "a a ['x']"
        if when == "while it runs":
            await settle()
        request.tenant = "b"
        request.filters.append("y")
        gate.set()
        await settle(100)
        assert await cached(Request("a", ["x"])) == "a a ['x']"
        assert await cached(Request("b", ["x", "y"])) == "b b ['x', 'y']"

    moved_time.run(scenario())


@pytest.mark.parametrize("when", ["before it begins", "while it runs"])
def test_background_refresh_works_on_copies_of_containers_and_is_stored(when: str, moved_time: MovedTime) -> None:
    async def scenario() -> None:
        _, store = watched_store(moved_time.now)
        cached = kv_cached(60, store=store, early=0, stale_while_revalidate=600)(report_of_mapping)
        await cached({"tenant": "a", "filters": ["x"]})
        moved_time.advance(100)
        request: dict[str, Any] = {"tenant": "a", "filters": ["x"]}
        gate = stage.hold()
        assert await cached(request) == "a a ['x']"
        if when == "while it runs":
            await settle()
        request["tenant"] = "b"
        request["filters"].append("y")
        gate.set()
        await settle(100)
        peeked = await cached.peek({"tenant": "a", "filters": ["x"]})
        assert peeked is not None
        assert (peeked.value, peeked.fresh) == ("a a ['x']", True)
        assert stage.seen == ["a", "a"]

    moved_time.run(scenario())


async def test_other_argument_of_many_that_changes_is_never_served_to_others() -> None:
    backend, store = watched_store()
    cached = kv_cached_many(60, store=store)(reports)
    request = Request("a")
    gate = backend.hold("get")
    call = asyncio.create_task(cached([1, 2], request))
    await settle()
    request.tenant = "b"
    gate.set()
    assert await call == {1: "1 b b", 2: "2 b b"}
    assert await cached([1, 2], Request("a")) == {1: "1 a a", 2: "2 a a"}


async def test_other_argument_of_many_that_changes_during_the_function_is_never_served_to_others() -> None:
    _, store = watched_store()
    cached = kv_cached_many(60, store=store, near=NearCache(30))(reports)
    request = Request("a")
    gate = stage.hold()
    call = asyncio.create_task(cached([1, 2], request))
    await settle()
    request.tenant = "b"
    gate.set()
    assert await call == {1: "1 a b", 2: "2 a b"}
    for tenant in ("a", "b"):
        assert await cached([1, 2], Request(tenant)) == {1: f"1 {tenant} {tenant}", 2: f"2 {tenant} {tenant}"}


def test_background_refresh_of_many_serves_nothing_of_an_argument_that_changed_since(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        _, store = watched_store(moved_time.now)
        cached = kv_cached_many(60, store=store, early=0, stale_while_revalidate=600)(reports)
        await cached([1, 2], Request("a"))
        moved_time.advance(100)
        request = Request("a")
        await cached([1, 2], request)
        request.tenant = "b"
        await settle(100)
        assert await cached([1, 2], Request("a")) == {1: "1 a a", 2: "2 a a"}

    moved_time.run(scenario())


async def test_list_of_ids_that_its_caller_goes_on_filling_is_taken_as_it_was() -> None:
    backend, store = watched_store()
    cached = kv_cached_many(60, store=store)(reports)
    ids = [1, 2]
    gate = backend.hold("get")
    call = asyncio.create_task(cached(ids, Request("a")))
    ids.append(3)
    await settle()
    ids.clear()
    gate.set()
    assert set(await call) <= {1, 2, 3}
    assert await cached([1, 2], Request("a")) == {1: "1 a a", 2: "2 a a"}


def test_result_computed_from_a_changed_argument_is_not_written(moved_time: MovedTime) -> None:
    async def scenario() -> None:
        backend, store = watched_store(moved_time.now)
        cached = _cached(store)
        request = Request("a")
        gate = stage.hold()
        call = asyncio.create_task(cached(request))
        await settle()
        request.tenant = "b"
        gate.set()
        await call
        assert backend.asked("set") == 0

    moved_time.run(scenario())
