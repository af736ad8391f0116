"""Which origin a response comes from, and whose failure is whose."""

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import pytest
from aiohttp import ClientTimeout, web
from http_origin import Client, Origin, contents_of

from aiokv import AsyncKVStore
from aiokv.adapters.aiohttp_client import caching, outcome_of
from aiokv.backends.memory import MemoryBackend

FRESH = {"Cache-Control": "max-age=100"}


class Slow:
    """An answer that comes when a test says so."""

    def __init__(self, *parts: str) -> None:
        self.arrived = asyncio.Semaphore(0)
        self.opened = asyncio.Event()
        self.parts = parts or ("hello",)

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.arrived.release()
        await self.opened.wait()
        return web.Response(text="".join(self.parts), headers=FRESH)


async def test_another_host_at_the_same_address_has_responses_of_its_own(client: Client) -> None:
    client.origin.answers["/"] = lambda request: web.Response(text=request.host, headers=FRESH)
    assert await client.get("/", Host="a.example") == ("miss", "a.example")
    assert await client.get("/", Host="b.example") == ("miss", "b.example")
    assert (await client.get("/"))[0] == "miss"
    assert await client.get("/", Host="A.example") == ("hit", "a.example")
    assert (await client.get("/"))[0] == "hit"
    assert (await client.get("/", "POST", Host="a.example"))[0] == "bypass"
    assert (await client.get("/", Host="a.example"))[0] == "miss"
    assert (await client.get("/", Host="b.example"))[0] == "hit"


async def test_each_unix_socket_has_responses_of_its_own(store: AsyncKVStore, tmp_path: Any) -> None:
    async with contextlib.AsyncExitStack() as stack:
        cache = await stack.enter_async_context(caching(store))
        found = []
        for name in ("one", "two", "one"):
            path = str(tmp_path / name)
            async with (
                served(name, path),
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(path), middlewares=[cache]) as session,
                session.get("http://localhost/") as response,
            ):
                found.append((outcome_of(response), await response.text()))
    assert found == [("miss", "one"), ("miss", "two"), ("hit", "one")]


@contextlib.asynccontextmanager
async def served(text: str, path: str) -> AsyncGenerator[None]:
    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(text=text, headers=FRESH)

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    try:
        yield
    finally:
        await runner.cleanup()


async def test_request_with_trust_of_its_own_is_not_cached(store: AsyncKVStore, caplog: pytest.LogCaptureFixture) -> None:
    trustme = pytest.importorskip("trustme", reason="pip install trustme")
    authority = trustme.CA()
    served_by, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(served_by)
    authority.configure_trust(trusting)
    arrived, opened = asyncio.Event(), asyncio.Event()

    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        arrived.set()
        await opened.wait()
        return web.Response(text="hello", headers=FRESH)

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=served_by)
    await site.start()
    url = f"{site.name}/"
    async with caching(store) as cache, aiohttp.ClientSession(middlewares=[cache]) as session:
        careless = asyncio.create_task(session.get(url, ssl=False))
        await arrived.wait()
        # It does not wait for that one, either.
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get(url)
        opened.set()
        assert outcome_of(await careless) == "bypass"
        with caplog.at_level(logging.DEBUG, "aiokv"):
            assert outcome_of(await session.get(url, ssl=trusting)) == "bypass"
        assert "of its own is not cached" in caplog.text
        assert await contents_of(store) == ""
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await session.get(url)
        connector = aiohttp.TCPConnector(ssl=trusting)
        async with aiohttp.ClientSession(middlewares=[cache], connector=connector) as trusted:
            assert [outcome_of(await trusted.get(url)) for _ in range(2)] == ["miss", "hit"]
            # Verified by another name, and perhaps sent to another server.
            assert outcome_of(await trusted.get(url, server_hostname="127.0.0.1")) == "bypass"
            # Changes count, whoever makes them.
            await session.put(url, ssl=trusting)
            assert outcome_of(await trusted.get(url)) == "miss"
    await runner.cleanup()


async def test_own_trust_does_not_matter_without_tls(client: Client) -> None:
    client.origin.says("/", Cache_Control="max-age=100")
    outcomes = [outcome_of(await client.session.get(client.origin.base, ssl=False)) for _ in range(2)]
    assert outcomes == ["miss", "hit"]


async def test_own_timeout_of_the_first_request_does_not_end_the_others(client: Client) -> None:
    client.origin.answers["/"] = slow = Slow()
    leader = asyncio.create_task(client.session.get(client.origin.base, timeout=ClientTimeout(sock_read=0.1)))
    await slow.arrived.acquire()
    others = [asyncio.create_task(client.get("/")) for _ in range(3)]
    with pytest.raises(aiohttp.SocketTimeoutError):
        await leader
    async with asyncio.timeout(10):
        await slow.arrived.acquire()
    slow.opened.set()
    assert sorted(await asyncio.gather(*others)) == [("miss", "hello"), ("shared", "hello"), ("shared", "hello")]


async def test_dead_proxy_or_closed_session_of_the_first_request_does_not_end_the_others(client: Client) -> None:
    slow = Slow()
    client.origin.answers["/"] = slow
    async with aiohttp.ClientSession(middlewares=[client.cache]) as other:
        behind = asyncio.create_task(other.get(client.origin.base + "/p", proxy="http://127.0.0.1:9"))
        client.origin.says("/p", Cache_Control="max-age=100")
        done = await asyncio.gather(behind, client.get("/p"), return_exceptions=True)
        assert isinstance(done[0], aiohttp.ClientProxyConnectionError)
        assert done[1] == ("miss", "hello")
        leader = asyncio.create_task(other.get(client.origin.base + "/"))
        await slow.arrived.acquire()
        waiting = asyncio.create_task(client.get("/"))
        await asyncio.sleep(0)
    with pytest.raises(aiohttp.ClientError):
        await leader
    slow.opened.set()
    assert await waiting == ("miss", "hello")


async def test_request_that_waits_for_another_keeps_its_own_read_timeout(client: Client) -> None:
    client.origin.answers["/"] = slow = Slow()
    leader = asyncio.create_task(client.get("/"))
    await slow.arrived.acquire()
    async with asyncio.timeout(10):
        with pytest.raises(aiohttp.SocketTimeoutError):
            await client.session.get(client.origin.base + "/", timeout=ClientTimeout(total=None, sock_read=0.1))
    slow.opened.set()
    assert await leader == ("miss", "hello")


async def test_request_that_waits_stays_while_the_answer_is_coming(client: Client) -> None:
    arrived = asyncio.Event()

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=FRESH)
        await response.prepare(request)
        arrived.set()
        for _ in range(10):
            await response.write(b"x")
            await asyncio.sleep(0.1)
        return response

    client.origin.answers["/"] = drip
    leader = asyncio.create_task(client.get("/"))
    await arrived.wait()
    timeout = ClientTimeout(total=None, sock_read=0.7)
    async with client.session.get(client.origin.base + "/", timeout=timeout) as response:
        assert (outcome_of(response), await response.text()) == ("shared", "x" * 10)
    await leader
    assert client.origin.hits == 1


class Hanging(MemoryBackend):
    """A memory whose sets do not end."""

    async def set(self, db_name: str, key: str, value: str, ttl_seconds: int) -> None:
        del db_name, key, value, ttl_seconds
        await asyncio.sleep(3600)


async def test_closing_waits_no_longer_than_a_request_for_a_store_that_hangs(origin: Origin) -> None:
    origin.says("/", Cache_Control="max-age=100")
    async with AsyncKVStore("http", backend=Hanging()) as store:
        cache = caching(store, store_timeout=0.1)
        async with aiohttp.ClientSession(middlewares=[cache]) as session:
            await Client(cache, session, origin).get("/")
        tasks = list(cache._responses._tasks)
        assert tasks
        async with asyncio.timeout(5):
            await cache.aclose()
        for task in tasks:
            task.cancel()
