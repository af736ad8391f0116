"""A server that stops cuts nobody off: what has begun may end, and what comes in time is answered."""

import asyncio
import contextlib
import socket

import pytest
from server_clients import Connection, SlowBackend, connected, head, put

from aiokv.backends.memory import MemoryBackend
from aiokv.errors import ConfigurationError
from aiokv.server.listening import bind
from aiokv.server.options import ServerOptions
from aiokv.server.serve import Server


async def started(backend: MemoryBackend, **options: float) -> tuple[Server, str]:
    server = Server(backend, ServerOptions(port=0, **{"drain_seconds": 5, **options}))
    return server, await server.start()


async def test_body_that_has_begun_arrives_and_is_stored_while_the_server_stops() -> None:
    backend = MemoryBackend()
    server, address = await started(backend)
    async with connected(address) as client:
        await client.send(head("PUT", "/set/db/key", "Content-Length: 10"), b"first")
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(server.drain())
        await asyncio.sleep(0.6)
        assert not stopping.done()
        await client.send(b"later")
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await client.rest() == b""
        await stopping
    assert await backend.get("db", "key") == "firstlater"


async def test_every_answer_of_a_stopping_server_closes_its_connection_once_all_that_came_is_answered() -> None:
    backend = SlowBackend()
    server, address = await started(backend)
    async with connected(address) as client:
        await client.send(head("GET", "/get/db/key") * 3)
        await backend.begun.wait()
        stopping = asyncio.create_task(server.drain())
        await asyncio.sleep(0.01)
        backend.let_go.set()
        answers = [await client.answer() for _ in range(3)]
        assert [answer.headers.get("connection") for answer in answers] == [None, None, "close"]
        await stopping


async def test_idle_connection_has_a_moment_for_a_last_request() -> None:
    server, address = await started(MemoryBackend())
    async with connected(address) as client, connected(address) as idle:
        assert (await client.ask(head("GET", "/livez"))).status == 200
        assert (await idle.ask(head("GET", "/livez"))).status == 200
        stopping = asyncio.create_task(server.drain())
        await asyncio.sleep(0.05)
        assert (await client.ask(head("GET", "/livez"))).headers["connection"] == "close"
        assert await idle.rest() == b""
        async with asyncio.timeout(3):
            await stopping


async def test_stopping_server_is_not_ready_yet_serves_during_the_delay_and_takes_no_connection_after_it() -> None:
    server, address = await started(MemoryBackend(), drain_delay_seconds=0.3)
    stopping = asyncio.create_task(server.drain())
    await asyncio.sleep(0)
    async with connected(address) as client:
        answer = await client.ask(head("GET", "/readyz"))
        assert answer.status == 503
        assert "stopping" in answer.error()
        stored = await client.ask(put("/set/db/key", b"x"))
        assert (stored.status, stored.headers.get("connection")) == (200, None)
    await stopping
    with pytest.raises(OSError, match=r"refused|Connect"):
        await connected(address).__aenter__()


async def test_one_bound_holds_for_all_of_the_end() -> None:
    backend = SlowBackend()
    server, address = await started(backend, drain_seconds=0.3)
    async with connected(address) as stuck, connected(address) as dripping:
        await stuck.send(head("GET", "/get/db/key"))
        await dripping.send(head("PUT", "/set/db/key", "Content-Length: 10"))
        await backend.begun.wait()
        async with asyncio.timeout(3):
            await server.drain()
        for client in (stuck, dripping):
            with contextlib.suppress(ConnectionError):
                assert await client.rest() == b""


async def test_aborted_server_ends_at_once() -> None:
    backend = SlowBackend()
    server, address = await started(backend, drain_seconds=60)
    async with connected(address) as client:
        await client.send(head("GET", "/get/db/key"))
        await backend.begun.wait()
        stopping = asyncio.create_task(server.drain())
        await asyncio.sleep(0.01)
        server.abort()
        with contextlib.suppress(ConnectionError):
            assert await client.rest() == b""
        async with asyncio.timeout(3):
            await stopping


@pytest.mark.slow
async def test_clients_without_retries_lose_no_call_when_one_server_takes_over_the_sockets_of_another() -> None:
    backend = MemoryBackend()
    (listening,) = bind("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    failures: list[str] = []
    calls = 0
    is_over = False

    async def use(number: int) -> None:
        nonlocal calls
        while not is_over:
            async with connected(address) as client:
                while not is_over:
                    answer = await client.ask(put(f"/set/db/{number}", b"v" * 1_000))
                    calls += 1
                    if answer.status != 200:
                        failures.append(answer.error())
                    if answer.headers.get("connection") == "close":
                        break

    def new_server() -> Server:
        return Server(backend, ServerOptions(port=0, drain_seconds=5))

    server = new_server()
    await server.start([listening.dup()])
    clients = [asyncio.create_task(use(number)) for number in range(32)]
    for _ in range(5):
        await asyncio.sleep(0.2)
        old, server = server, new_server()
        await server.start([listening.dup()])
        await old.drain()
    is_over = True
    await asyncio.gather(*clients)
    await server.drain()
    listening.close()
    assert failures == []
    assert calls > 100


@pytest.mark.parametrize("host", ["localhost", "::1"])
async def test_every_address_of_a_name_is_served_at_one_port(host: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        sockets = bind(host, 0)
    except ConfigurationError:
        pytest.skip("this machine has no IPv6 loopback address")
    server = Server(MemoryBackend(), ServerOptions(port=0, drain_seconds=1))
    await server.start(sockets)
    for one in sockets:
        name, port = one.getsockname()[:2]
        reader, writer = await asyncio.open_connection(name, port)
        assert (await Connection(reader, writer).ask(head("GET", "/livez"))).status == 200
        writer.close()
    assert len({one.getsockname()[1] for one in sockets}) == 1
    await server.drain()
