"""Watches over a socket: what comes, in which order, after which break, and how they end."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest
from extension_clients import ALIVE, EXTENSIONS, LOST, Seen, Stream, ask, post, watching
from helpers import served_process
from server_clients import connected, head, put, serving

from aiokv.backends.memory import MemoryBackend
from aiokv.backends.watching import Changed, Lost, Watch
from aiokv.errors import UnavailableError, UnsupportedError
from aiokv.server import running_server
from aiokv.server.options import ServerOptions
from aiokv.server.serve import Server


class CountingBackend(MemoryBackend):
    """A backend that knows its watches."""

    def __init__(self) -> None:
        super().__init__()
        self.watches: list[Watch] = []

    def watch(self, db_name: str) -> Watch:
        watch = super().watch(db_name)
        self.watches.append(watch)
        return watch

    def open_watches(self) -> int:
        return sum(not watch.is_closed for watch in self.watches)


@pytest.fixture
def backend() -> CountingBackend:
    return CountingBackend()


@pytest.fixture
async def address(backend: CountingBackend) -> AsyncGenerator[str]:
    async with serving(backend) as address:
        yield address


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_stream_begins_with_lost_and_tells_of_each_change_in_its_order(address: str) -> None:
    async with watching(address, "db") as stream, connected(address) as client:
        assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream")
        assert stream.headers["cache-control"] == "no-store"
        assert stream.headers["aiokv-extensions"] == EXTENSIONS
        assert await stream.next() == LOST
        assert stream.parser.retry_seconds == 1.0
        await client.ask(put("/set/db/a%2F%C3%A4%0A", b"v"))
        await client.ask(put("/set/other/b", b"v"))
        await client.ask(post("db", {"set": [{"key": "c", "value": "v"}, {"key": "d", "value": "v"}]}))
        await client.ask(head("DELETE", "/delete/db/c"))
        assert await stream.take(4) == [Changed("a/ä\n"), Changed("c"), Changed("d"), Changed("c", is_delete=True)]


async def test_a_silent_stream_is_alive_beyond_the_idle_timeout() -> None:
    bounds = {"idle_timeout_seconds": 0.2, "grace_seconds": 0.2}
    async with serving(MemoryBackend(), **bounds) as address, watching(address, "db") as stream:
        assert [await stream.next_of_all() for _ in range(3)] == [LOST, ALIVE, ALIVE]


async def test_many_watchers_share_one_watch_of_the_backend(address: str, backend: CountingBackend) -> None:
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(watching(address, "db")) for _ in range(50)]
        assert await asyncio.gather(*(stream.next() for stream in streams)) == [LOST] * 50
        await backend.set("db", "k", "v", 60)
        assert await asyncio.gather(*(stream.next() for stream in streams)) == [Changed("k")] * 50
        assert (len(backend.watches), backend.open_watches()) == (1, 1)


async def test_a_client_that_comes_back_goes_on_where_it_was(address: str, backend: CountingBackend) -> None:
    async with watching(address, "db") as stream:
        await backend.set("db", "a", "v", 60)
        assert await stream.take(2) == [LOST, Changed("a")]
        event_id = stream.parser.last_event_id
    await backend.set("db", "b", "v", 60)
    await backend.delete("db", "b")
    async with watching(address, "db", f"Last-Event-ID: {event_id}") as stream:
        assert await stream.take(2) == [Changed("b"), Changed("b", is_delete=True)]
        await backend.set("db", "c", "v", 60)
        assert await stream.next() == Changed("c")
    assert len(backend.watches) == 1


async def test_the_id_of_a_loss_can_be_gone_on_after(address: str, backend: CountingBackend) -> None:
    async with watching(address, "db") as stream:
        assert await stream.next() == LOST
        event_id = stream.parser.last_event_id
    await backend.set("db", "a", "v", 60)
    async with watching(address, "db", f"Last-Event-ID: {event_id}") as stream:
        assert await stream.next() == Changed("a")


@pytest.mark.parametrize("event_id", ["x", "-5", "0123456789abcdef-5", "{id}-99", "{id}--1", "{id}-" + "9" * 100, "{id}-x"])
async def test_an_id_that_is_not_known_begins_with_lost(address: str, backend: CountingBackend, event_id: str) -> None:
    async with watching(address, "db") as first:
        await backend.set("db", "a", "v", 60)
        assert await first.take(2) == [LOST, Changed("a")]
        known = first.parser.last_event_id.rpartition("-")[0]
        async with watching(address, "db", f"Last-Event-ID: {event_id.replace('{id}', known)}") as stream:
            assert await stream.next() == LOST
            await backend.set("db", "b", "v", 60)
            assert await stream.next() == Changed("b")


async def test_an_id_of_another_namespace_begins_with_lost(address: str, backend: CountingBackend) -> None:
    async with watching(address, "db") as first, watching(address, "other") as other:
        assert (await first.next(), await other.next()) == (LOST, LOST)
        await backend.set("other", "a", "v", 60)
        async with watching(address, "other", f"Last-Event-ID: {first.parser.last_event_id}") as stream:
            assert await stream.next() == LOST


async def test_a_loss_of_the_backend_reaches_every_watcher(address: str, backend: CountingBackend) -> None:
    async with watching(address, "db") as first, watching(address, "db") as second:
        assert (await first.next(), await second.next()) == (LOST, LOST)
        event_id = first.parser.last_event_id
        backend.watches[0].notify(Lost())
        assert (await first.next(), await second.next()) == (LOST, LOST)
        async with watching(address, "db", f"Last-Event-ID: {event_id}") as third:
            assert await third.next() == LOST


async def flood(backend: MemoryBackend, count: int, reader: Stream | None = None, size: int = 1_000) -> None:
    """Change many keys, not faster than a reader reads."""
    for index in range(count):
        key = f"{index:06}-" + "k" * size
        await backend.set("db", key, "", 60)
        if index % 100 == 99:
            await asyncio.sleep(0)
            while reader is not None and await reader.next() != Changed(key):
                pass


@pytest.mark.slow
async def test_a_watcher_that_falls_behind_loses_and_goes_on(backend: CountingBackend) -> None:
    async with serving(backend) as address, watching(address, "db", limit=1_024) as slow, watching(address, "db") as quick:
        await flood(backend, 10_000, quick)
        assert await slow.next() == LOST
        seen: list[Seen] = [await slow.next()]
        while seen[-1] != LOST:
            seen.append(await slow.next())
        assert 0 < len(seen) < 10_000
        keys = [event.key for event in seen if isinstance(event, Changed)]
        assert keys == [f"{index:06}-" + "k" * 1_000 for index in range(len(keys))]
        await backend.set("db", "last", "v", 60)
        assert await slow.next() == Changed("last")


@pytest.mark.slow
async def test_a_watcher_that_reads_nothing_is_cut_and_others_stay(backend: CountingBackend) -> None:
    async with serving(backend, grace_seconds=0.5, min_bytes_per_second=4_096) as address:
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        host, _, port = address.removeprefix("http://").partition(":")
        deaf.connect((host, int(port)))
        deaf.sendall(head("GET", "/watch/db"))
        async with watching(address, "db") as stream, connected(address) as client:
            # More than the system takes from a sender whose other end reads nothing.
            await flood(backend, 8_000, stream)
            async with asyncio.timeout(15):
                while b'slow_reader"} 1.0' not in (await client.ask(head("GET", "/metrics"))).body:
                    await asyncio.sleep(0.1)
            assert b"aiokv_watches 1.0" in (await client.ask(head("GET", "/metrics"))).body
            await backend.set("db", "end", "v", 60)
            assert await stream.next() == Changed("end")
        deaf.close()


async def test_the_watch_of_a_client_that_is_gone_is_released() -> None:
    backend = CountingBackend()
    server = Server(backend, ServerOptions(port=0, drain_seconds=1))
    address = await server.start()
    watches = server.service.extensions.watches
    async with watching(address, "db") as stream, watching(address, "other"):
        await stream.next()
        assert watches.count == 2
    await until(lambda: watches.count == 0)
    # For a while the namespaces are listened to for clients that come back.
    assert backend.open_watches() == 2
    for namespace in list(watches.namespaces.values()):
        namespace.expire_after(0)
    await until(lambda: backend.open_watches() == 0)
    assert (watches.namespaces, watches.kept_bytes) == ({}, 0)
    await server.drain()


async def test_a_stopping_server_ends_watches_at_once_and_cleanly() -> None:
    backend = CountingBackend()
    server = Server(backend, ServerOptions(port=0, drain_seconds=10))
    address = await server.start()
    async with watching(address, "db") as first, watching(address, "db") as second:
        assert (await first.next(), await second.next()) == (LOST, LOST)
        await backend.set("db", "a", "v", 60)
        stopping = asyncio.create_task(server.drain())
        for stream in (first, second):
            events = [await stream.next()]
            while events[-1] is not None:
                events.append(await stream.next())
            assert stream.is_ended
            assert await stream.reader.read() == b""
        async with asyncio.timeout(5):
            await stopping
    assert backend.open_watches() == 0
    assert server.service.extensions.watches.count == 0


async def test_a_watch_during_the_drain_is_refused_so_that_the_client_goes_elsewhere() -> None:
    server = Server(MemoryBackend(), ServerOptions(port=0, drain_seconds=5))
    address = await server.start()
    async with connected(address) as client:
        assert (await client.ask(head("GET", "/livez"))).status == 200
        stopping = asyncio.create_task(server.drain())
        await asyncio.sleep(0.02)
        answer = await client.ask(head("GET", "/watch/db"))
        assert (answer.status, answer.headers["connection"], answer.headers["retry-after"]) == (503, "close", "1")
        await stopping


async def test_a_server_that_is_cut_off_releases_the_watches_of_its_backend() -> None:
    backend = CountingBackend()
    server = Server(backend, ServerOptions(port=0))
    address = await server.start()
    async with watching(address, "db") as stream:
        await stream.next()
        server.abort()
        await until(lambda: backend.open_watches() == 0)


class FailingBackend(CountingBackend):
    """A backend whose watches can be made to fail."""

    error: Exception | None = None

    def watch(self, db_name: str) -> Watch:
        if self.error is not None:
            raise self.error
        return super().watch(db_name)


async def test_streams_end_where_the_backends_watch_does_and_new_ones_wait_a_moment() -> None:
    backend = FailingBackend()
    async with serving(backend) as address:
        async with watching(address, "db") as stream:
            assert await stream.next() == LOST
            backend.watches[0].fail(UnavailableError("SECRET"))
            assert await stream.next() is None
        answer = await ask(address, head("GET", "/watch/db"))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert "SECRET" not in answer.error()
        async with asyncio.timeout(10):
            while True:
                async with watching(address, "db") as stream:
                    if stream.status == 200:
                        break
                await asyncio.sleep(0.1)
        assert len(backend.watches) == 2


@pytest.mark.parametrize(("error", "status"), [(UnsupportedError("SECRET"), 501), (UnavailableError("SECRET"), 503)])
async def test_a_backend_that_cannot_watch_now_is_answered_as_everywhere(error: Exception, status: int) -> None:
    backend = FailingBackend()
    backend.error = error
    async with serving(backend) as address:
        answer = await ask(address, head("GET", "/watch/db"))
        assert answer.status == status
        assert "SECRET" not in answer.error()
        backend.error = None
        async with watching(address, "db") as stream:
            assert await stream.next() == LOST


async def test_what_is_kept_of_the_past_is_bounded(backend: CountingBackend) -> None:
    server = Server(backend, ServerOptions(port=0, drain_seconds=1))
    address = await server.start()
    watches = server.service.extensions.watches
    async with watching(address, "db") as stream:
        await stream.next()
        event_id = stream.parser.last_event_id
    await flood(backend, 12_000, size=4)
    await until(lambda: watches.namespaces["db"].number >= 12_000)
    assert 0 < watches.kept_bytes <= 1024 * 1024
    async with watching(address, "db", f"Last-Event-ID: {event_id}") as stream:
        assert await stream.next() == LOST
    await server.drain()
    assert watches.kept_bytes == 0


async def test_a_server_without_watches_names_none() -> None:
    async with serving(MemoryBackend(), max_watches=0) as address:
        answer = await ask(address, head("GET", "/watch/db"))
        assert (answer.status, answer.headers["aiokv-extensions"]) == (501, "batch, scan, claims, renew")


async def test_a_watch_needs_a_client_that_knows_chunks(address: str) -> None:
    answer = await ask(address, b"GET /watch/db HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert answer.status == 505


async def test_a_client_that_sends_nothing_more_is_taken_for_gone(address: str) -> None:
    async with watching(address, "db") as stream:
        assert await stream.next() == LOST
        stream.writer.write_eof()
        async with asyncio.timeout(10):
            assert await stream.reader.read() == b""


async def test_a_watch_goes_over_tls() -> None:
    trustme = pytest.importorskip("trustme", reason="pip install trustme")
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    backend = CountingBackend()
    async with running_server(backend, tls=context, drain_seconds=1) as address:
        port = int(address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting, server_hostname="localhost")
        stream = Stream(reader, writer)
        writer.write(head("GET", "/watch/db"))
        await stream.begin()
        assert await stream.next() == LOST
        await backend.set("db", "k", "v", 60)
        assert await stream.next() == Changed("k")
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


@pytest.mark.slow
async def test_every_worker_tells_of_what_any_worker_changes(tmp_path: Path) -> None:
    arguments = ("--store", f"sqlite:///{tmp_path}/kv.db", "--workers", "2")
    with served_process(*arguments, home=tmp_path) as (process, address):
        async with contextlib.AsyncExitStack() as stack:
            # Connections are spread over the workers.
            streams = [await stack.enter_async_context(watching(address, "db")) for _ in range(16)]
            assert [await stream.next() for stream in streams] == [LOST] * 16
            for number in range(4):
                assert (await ask(address, put(f"/set/db/key-{number}", b"v"))).status == 200
            expected = [Changed(f"key-{number}") for number in range(4)]
            for stream in streams:
                seen = [await stream.next()]
                while len(set(seen) & set(expected)) < 4:
                    seen.append(await stream.next())
                assert [event for event in seen if event != LOST] == expected
            ids = {stream.parser.last_event_id.partition("-")[0] for stream in streams}
            assert len(ids) == 2
            process.terminate()
            for stream in streams:
                assert await stream.next() is None
        assert process.wait() == 0


@pytest.mark.parametrize("request_head", [head("GET", "/watch/db?x=1"), head("POST", "/batch/db?x=1", "Content-Length: 0")])
async def test_a_parameter_of_a_path_that_takes_none_is_refused(address: str, request_head: bytes) -> None:
    answer = await ask(address, request_head)
    assert answer.status == 400
    assert b"no query parameters" in answer.body
