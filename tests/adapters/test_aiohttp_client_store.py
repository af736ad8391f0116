"""Requests that share one fetch, and stores that fail, hang or hold what nobody can read."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from http_origin import Client, Origin, client_of, http_date, running_origin

from aiokv import AsyncKVStore, clock
from aiokv.adapters.aiohttp_client import caching
from aiokv.backends.memory import MemoryBackend
from aiokv.errors import UnavailableError
from aiokv.testing import MovableClock

FRESH = {"Cache-Control": "max-age=100"}


class Gate:
    """An answer of the origin that waits until a test lets it go on."""

    def __init__(self, make: Callable[[web.Request], web.StreamResponse] | None = None, **headers: str) -> None:
        self.arrived = asyncio.Semaphore(0)
        self.opened = asyncio.Event()
        self._make = make
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()} or FRESH

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.arrived.release()
        await self.opened.wait()
        if self._make is not None:
            return self._make(request)
        text = request.headers.get("Accept-Language", "hello")
        return web.Response(text=text, headers={**self._headers, "Date": http_date()})


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def begin(client: Client, count: int, **headers: str) -> "list[asyncio.Task[tuple[Any, str]]]":
    return [asyncio.create_task(client.get("/", **headers)) for _ in range(count)]


async def test_equal_requests_of_one_moment_share_one(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate()
    tasks = begin(client, 20)
    await gate.arrived.acquire()
    await settle()
    gate.opened.set()
    assert sorted(await asyncio.gather(*tasks)) == [("miss", "hello")] + [("shared", "hello")] * 19
    assert client.origin.hits == 1
    assert (client.cache.info().shared, client.cache.info().misses) == (19, 1)


async def test_each_that_shares_reads_its_own_body(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate()
    tasks = [asyncio.create_task(client.session.get(client.origin.base)) for _ in range(3)]
    await gate.arrived.acquire()
    await settle()
    gate.opened.set()
    responses = await asyncio.gather(*tasks)
    responses[0].close()
    assert [await response.read() for response in responses[1:]] == [b"hello"] * 2


async def test_requests_that_vary_do_not_share(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate(Cache_Control="max-age=100", Vary="Accept-Language")
    tasks = begin(client, 3, Accept_Language="en") + begin(client, 3, Accept_Language="de")
    await gate.arrived.acquire()
    await settle()
    gate.opened.set()
    outcomes = await asyncio.gather(*tasks)
    assert [text for _, text in outcomes] == ["en"] * 3 + ["de"] * 3
    assert [outcome for outcome, _ in outcomes[:3]].count("shared") == 2


async def test_requests_that_wait_are_let_go_where_the_response_cannot_be_shared(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate(Cache_Control="no-store")
    tasks = begin(client, 5)
    await gate.arrived.acquire()
    await settle()
    assert client.origin.hits == 1
    gate.opened.set()
    assert await asyncio.gather(*tasks) == [("miss", "hello")] * 5
    assert client.origin.hits == 5
    # The next ones do not wait for each other.
    client.origin.answers["/"] = second = Gate(Cache_Control="no-store")
    tasks = begin(client, 3)
    async with asyncio.timeout(10):
        for _ in range(3):
            await second.arrived.acquire()
    second.opened.set()
    await asyncio.gather(*tasks)
    # Until one could be stored.
    client.origin.says("/", Cache_Control="max-age=0", ETag='"1"')
    await client.get("/")
    client.origin.answers["/"] = third = Gate()
    tasks = begin(client, 3)
    await third.arrived.acquire()
    await settle()
    third.opened.set()
    assert sorted(outcome for outcome, _ in await asyncio.gather(*tasks)) == ["miss", "shared", "shared"]


async def test_response_that_must_be_validated_is_not_shared(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate(Cache_Control="no-cache", ETag='"1"')
    tasks = begin(client, 3)
    await gate.arrived.acquire()
    await settle()
    gate.opened.set()
    assert [outcome for outcome, _ in await asyncio.gather(*tasks)] == ["miss"] * 3
    assert client.origin.hits == 3


async def test_cancelled_leader_lets_another_lead(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate()
    tasks = begin(client, 4)
    await gate.arrived.acquire()
    await settle()
    tasks[0].cancel()
    await gate.arrived.acquire()
    await settle()
    assert client.origin.hits == 2
    gate.opened.set()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert sorted(await asyncio.gather(*tasks[1:])) == [("miss", "hello"), ("shared", "hello"), ("shared", "hello")]


async def test_cancelled_follower_disturbs_nobody(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate()
    tasks = begin(client, 4)
    await gate.arrived.acquire()
    await settle()
    tasks[2].cancel()
    gate.opened.set()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(done[2], asyncio.CancelledError)
    assert [done[0], done[1], done[3]] == [("miss", "hello"), ("shared", "hello"), ("shared", "hello")]


async def test_leader_that_runs_out_of_time_does_not_end_the_others(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate()

    async def impatient() -> None:
        await client.session.get(client.origin.base, timeout=aiohttp.ClientTimeout(total=0.05))

    leader = asyncio.create_task(impatient())
    await gate.arrived.acquire()
    tasks = begin(client, 3)
    with pytest.raises(TimeoutError):
        await leader
    await gate.arrived.acquire()
    gate.opened.set()
    assert sorted(await asyncio.gather(*tasks)) == [("miss", "hello"), ("shared", "hello"), ("shared", "hello")]


async def test_origin_that_does_not_answer_is_waited_for_once_by_all(store: AsyncKVStore, origin: Origin) -> None:
    origin.answers["/"] = Gate()
    late = aiohttp.ClientTimeout(sock_read=0.3)
    async with caching(store) as cache, aiohttp.ClientSession(middlewares=[cache], timeout=late) as session:
        client = Client(cache, session, origin)
        done = await asyncio.gather(*begin(client, 10), return_exceptions=True)
    assert {type(error) for error in done} == {aiohttp.SocketTimeoutError}
    assert origin.hits == 1


async def test_failure_is_everybodys_once_and_nobodys_after(client: Client) -> None:
    def drop(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    client.origin.answers["/"] = gate = Gate(drop)
    tasks = begin(client, 5)
    await gate.arrived.acquire()
    await settle()
    gate.opened.set()
    errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(error) for error in errors} == {aiohttp.ServerDisconnectedError}
    assert len({id(error) for error in errors}) == 5
    # aiohttp sends a GET again, once.
    assert client.origin.hits <= 3
    client.origin.says("/", "well", Cache_Control="max-age=100")
    assert await client.get("/") == ("miss", "well")


async def test_change_keeps_an_older_answer_out_of_the_store(client: Client) -> None:
    client.origin.answers["/"] = gate = Gate()
    tasks = begin(client, 2)
    await gate.arrived.acquire()
    await settle()
    client.origin.says("/", "changed", Cache_Control="max-age=100")
    await client.get("/", "PUT")
    # A request that begins now must not get what began before.
    assert await client.get("/") == ("miss", "changed")
    gate.opened.set()
    assert [text for _, text in await asyncio.gather(*tasks)] == ["hello", "hello"]
    assert await client.get("/") == ("hit", "changed")


async def test_background_refresh_is_one_for_all(client: Client, moved: MovableClock) -> None:
    client.origin.says("/", "old", Cache_Control="max-age=10, stale-while-revalidate=100")
    await client.get("/")
    moved.advance(20)
    client.origin.answers["/"] = gate = Gate()
    assert await asyncio.gather(*begin(client, 10)) == [("stale", "old")] * 10
    await gate.arrived.acquire()
    await settle()
    assert client.origin.hits == 2
    gate.opened.set()


async def test_closing_gives_a_refresh_up(store: AsyncKVStore, origin: Origin, moved: MovableClock) -> None:
    origin.says("/", "old", Cache_Control="max-age=10, stale-while-revalidate=100")
    async with client_of(store, origin) as client:
        await client.get("/")
        moved.advance(20)
        origin.answers["/"] = gate = Gate()
        await client.get("/")
        await gate.arrived.acquire()
        async with asyncio.timeout(10):
            await client.cache.aclose()
        gate.opened.set()
    assert len(asyncio.all_tasks()) <= 3


class Failing(MemoryBackend):
    """A memory that fails, or hangs, while a test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: set[str] = set()
        self.hangs: set[str] = set()
        self.calls: Counter[str] = Counter()

    async def _pass(self, verb: str) -> None:
        self.calls[verb] += 1
        if verb in self.hangs:
            await asyncio.sleep(3600)
        if verb in self.fails:
            raise UnavailableError("down", verb=verb, db_name="http", key="key")

    async def get(self, db_name: str, key: str) -> str | None:
        await self._pass("get")
        return await super().get(db_name, key)

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        await self._pass("set")
        await super().set(db_name, key, value, ttl_seconds)

    async def delete(self, db_name: str, key: str) -> None:
        await self._pass("delete")
        await super().delete(db_name, key)

    async def set_many(self, db_name: str, entries: Any) -> Any:
        await self._pass("set")
        return await super().set_many(db_name, entries)

    async def delete_many(self, db_name: str, keys: Any) -> Any:
        await self._pass("delete")
        return await super().delete_many(db_name, keys)


@pytest.mark.parametrize("verbs", [{"get"}, {"set"}, {"get", "set", "delete"}])
async def test_store_that_fails_fails_no_request(origin: Origin, verbs: set[str], caplog: pytest.LogCaptureFixture) -> None:
    backend = Failing()
    origin.says("/", Cache_Control="max-age=100", Vary="A")
    async with AsyncKVStore("http", backend=backend) as store, client_of(store, origin) as client:
        backend.fails = verbs
        with caplog.at_level(logging.WARNING, "aiokv"):
            for _ in range(20):
                assert (await client.get("/?token=secret"))[1] == "hello"
        assert client.cache.info().store_errors >= 3
        assert (await client.get("/", "POST"))[0] == "bypass"
        for verb in verbs & {"get", "set"}:
            # Most were not asked: the store had failed before.
            assert backend.calls[verb] < 10
    assert len(caplog.records) <= 2
    assert "secret" not in caplog.text


@pytest.mark.parametrize("verbs", [{"get"}, {"set"}, {"delete"}])
async def test_store_that_hangs_holds_no_request_up_for_long(origin: Origin, verbs: set[str]) -> None:
    backend = Failing()
    origin.says("/", Cache_Control="max-age=100")
    async with (
        AsyncKVStore("http", backend=backend) as store,
        caching(store, store_timeout=0.05) as cache,
        aiohttp.ClientSession(middlewares=[cache]) as session,
    ):
        client = Client(cache, session, origin)
        backend.hangs = verbs
        async with asyncio.timeout(10):
            for _ in range(5):
                assert (await client.get("/"))[1] == "hello"
            await client.get("/", "POST")
            assert (await client.get("/"))[1] == "hello"
        for task in list(cache._responses._tasks):
            task.cancel()


async def test_delete_that_fails_does_not_bring_the_old_back(origin: Origin) -> None:
    backend = Failing()
    origin.says("/", "old", Cache_Control="max-age=100")
    async with AsyncKVStore("http", backend=backend) as store, client_of(store, origin) as client:
        await client.get("/")
        backend.fails = {"delete"}
        origin.says("/", "new", Cache_Control="max-age=100")
        await client.get("/", "POST")
        assert await client.get("/") == ("miss", "new")


def damage_head(text: str) -> str:
    return "r1[1, 2]" + text[text.index("\n") :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda _: "not ours",
        lambda _: 'r1{"a": 1}\n',
        lambda _: "v1[1]",
        lambda text: text[: len(text) // 4],
        damage_head,
        lambda text: text.replace("200", '"200"', 1),
        lambda text: text.replace("true]", "false]"),
    ],
)
async def test_text_that_is_no_response_is_a_miss_and_is_replaced(
    client: Client, store: AsyncKVStore, damage: Callable[[str], str]
) -> None:
    client.origin.says("/", "hello, é", Cache_Control="max-age=100")
    await client.get("/")
    (key,) = [info.key async for info in store.keys("")]
    text = await store.get(key)
    assert text is not None
    await store.set(key, damage(text))
    assert await client.get("/") == ("miss", "hello, é")
    assert await client.get("/") == ("hit", "hello, é")
    assert client.cache.info().undecodable == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Cache_Control": "max-age=5"}, 60),
        ({"Cache_Control": "max-age=600"}, 600),
        ({"Cache_Control": "max-age=600", "Age": "100"}, 500),
        ({"Cache_Control": "max-age=600, stale-while-revalidate=100, stale-if-error=400"}, 1_000),
        ({"Cache_Control": "max-age=600", "ETag": '"1"'}, 600 + 86_400),
        ({"Cache_Control": "max-age=600", "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, 600 + 86_400),
        ({"Cache_Control": "no-cache", "ETag": '"1"'}, 86_400),
        ({"Cache_Control": "max-age=99999999"}, 2_592_000),
    ],
)
async def test_response_is_kept_as_long_as_it_is_of_use(
    client: Client, store: AsyncKVStore, headers: dict[str, str], seconds: int
) -> None:
    client.origin.says("/", **headers)
    await client.get("/")
    (info,) = [info async for info in store.keys("")]
    assert info.expires_at is not None
    assert info.expires_at - clock.now() == pytest.approx(seconds, abs=10)


async def test_two_sessions_and_two_caches_share_what_is_stored(store: AsyncKVStore, origin: Origin) -> None:
    origin.says("/", Cache_Control="max-age=100")
    async with client_of(store, origin) as one, client_of(store, origin) as other:
        assert (await one.get("/"))[0] == "miss"
        assert (await other.get("/"))[0] == "hit"
        await other.get("/", "POST")
        assert (await one.get("/"))[0] == "miss"


def test_one_cache_serves_several_loops(tmp_path: Any) -> None:
    store = AsyncKVStore("http", url=f"sqlite:///{tmp_path}/kv.db")
    cache = caching(store)

    async def use() -> Any:
        async with running_origin() as origin, store, cache, aiohttp.ClientSession(middlewares=[cache]) as session:
            client = Client(cache, session, origin)
            origin.says("/", Cache_Control="max-age=100")
            return [(await client.get("/"))[0] for _ in range(2)]

    assert [asyncio.run(use()) for _ in range(2)] == [["miss", "hit"]] * 2
