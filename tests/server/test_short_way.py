"""Plain gets and sets go a shorter way, whose answers are those of the long way."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aiokv.backends.base import Backend
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.sqlite import SqliteBackend
from aiokv.server.access import AccessFile
from aiokv.server.connection import Connection
from aiokv.server.options import ServerOptions
from aiokv.server.requests import RequestParser
from aiokv.server.serve import Server
from aiokv.server.statistics import GET, SET

HEADERS = ("Host: 127.0.0.1:8787", "Accept: */*", "User-Agent: tests")


def request(line: str, *more: str, body: bytes = b"") -> bytes:
    return "\r\n".join([line, *HEADERS, *more, "", ""]).encode() + body


def get(key: str, *more: str) -> bytes:
    return request(f"GET /get/db/{key} HTTP/1.1", *more)


def put(key: str, value: bytes, *more: str, query: str = "?ttl=60") -> bytes:
    return request(f"PUT /set/db/{key}{query} HTTP/1.1", f"Content-Length: {len(value)}", *more, body=value)


class Wire(asyncio.Transport):
    """A transport that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.sent += bytes(data)

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def can_write_eof(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Client:
    """A connection of a server without a socket.

    Args:
        server: The server.
        is_short: Whether requests may go the short way.
    """

    def __init__(self, server: Server, *, is_short: bool = True) -> None:
        self.listener: Any = server._listener
        if not is_short:
            self.listener.short_way = None
        self.listener.date = b"Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n"
        self.open()

    def open(self) -> None:
        """Connect, anew where the server has closed the connection."""
        self.listener._count += 1
        self.listener._count_by_address["a"] = self.listener._count_by_address.get("a", 0) + 1
        self.wire = Wire()
        self.connection = Connection(self.listener, "a")
        self.connection.connection_made(self.wire)

    def feed(self, data: bytes) -> None:
        if not self.wire.is_closed:
            self.listener.buffer[: len(data)] = data
            self.connection.buffer_updated(len(data))

    async def answered(self) -> bytes:
        """Return what has been answered since, once nothing is under way."""
        async with asyncio.timeout(10):
            while self.connection._has_turns():
                await asyncio.sleep(0.001)
        sent, self.wire.sent = self.wire.sent, b""
        return sent

    async def send(self, data: bytes) -> bytes:
        self.feed(data)
        return await self.answered()

    def close(self) -> None:
        if self.connection in self.listener.connections:
            self.connection.connection_lost(None)


@contextlib.asynccontextmanager
async def client_of(
    backend: Backend, *, is_short: bool = True, access: AccessFile | None = None, options: ServerOptions | None = None
) -> AsyncIterator[Client]:
    server = Server(backend, options or ServerOptions(), access=access)
    client = Client(server, is_short=is_short)
    try:
        yield client
    finally:
        client.close()
        server.abort()


@contextlib.asynccontextmanager
async def opened(kind: str, folder: Path) -> AsyncIterator[Backend]:
    backend: Backend = MemoryBackend() if kind == "memory" else SqliteBackend(folder / "kv.db")
    # A file is opened at the first call.
    await backend.get("db", "none")
    try:
        yield backend
    finally:
        await backend.aclose()


@pytest.fixture(params=["memory", "sqlite"])
def kind(request: pytest.FixtureRequest) -> str:
    return cast("str", request.param)


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What the parsers were fed with."""
    fed: list[bytes] = []
    feed = RequestParser.feed

    def count(parser: RequestParser, data: bytes) -> None:
        fed.append(bytes(data))
        feed(parser, data)

    monkeypatch.setattr(RequestParser, "feed", count)
    return fed


async def test_gets_whose_headers_came_before_are_not_parsed(kind: str, tmp_path: Path, parsed: list[bytes]) -> None:
    async with opened(kind, tmp_path) as backend, client_of(backend) as client:
        await backend.set("db", "a", "one", 60)
        await backend.set("db", "b", "zwei ✓", 60)
        for _ in range(3):
            assert b'{"value":"one"}' in await client.send(get("a"))
        parsed.clear()
        assert (await client.send(get("b"))).endswith('{"value":"zwei ✓"}'.encode())
        assert b" 404 " in await client.send(get("c"))
        assert not parsed


async def test_sets_whose_headers_came_before_are_not_parsed(tmp_path: Path, parsed: list[bytes]) -> None:
    async with opened("sqlite", tmp_path) as backend, client_of(backend) as client:
        for number in range(3):
            assert b" 200 " in await client.send(put(f"k{number}", b"v" * number))
        parsed.clear()
        assert b" 200 " in await client.send(put("long", b"x" * 1234))
        assert b" 200 " in await client.send(put("words", "grün".encode(), query=""))
        assert not parsed
        assert await backend.get("db", "long") == "x" * 1234
        assert await backend.get("db", "words") == "grün"


PLAIN = (
    get("a"),
    get("b"),
    get("a", "Authorization: Bearer t"),
    put("a", b"1"),
    put("b", b"22", query=""),
    put("a", "ü".encode()),
    request("DELETE /delete/db/a HTTP/1.1"),
)
ODD = (
    get("a", "Connection: close"),
    get("a", "Origin: http://evil.example"),
    get("a", "X-Request-Id: 1"),
    get("a", "Expect: 100-continue"),
    get("a", "Content-Length: 1") + b"x",
    get("a", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    get("a", "Upgrade: h2c", "Connection: upgrade"),
    get("a").replace(b"127.0.0.1:8787", b"evil.example"),
    get("a").replace(b"HTTP/1.1", b"HTTP/1.0"),
    get("%61"),
    get("a?x=1"),
    get("a/b"),
    get("a") + get("b"),
    get("a", "X-Ümlaut: ü"),
    put("a", b"\xff"),
    put("a", b"1", query="?ttl=59"),
    put("a", b"1", query="?ttl=2592001"),
    put("a", b"1", query="?ttl=0060"),
    put("a", b"1", query="?ttl=60&ttl=60"),
    put("a", b"12").replace(b"Content-Length: 2", b"Content-Length: 1"),
    put("a", b"1").replace(b"Content-Length: 1", b"Content-Length: +1"),
    put("a", b"1", "Content-Length: 1"),
    put("a", b"1", "Content-Encoding: gzip"),
    put("a", b"1").replace(b"Content-Length: 1", b"Transfer-Encoding: chunked")[:-1] + b"1\r\nx\r\n0\r\n\r\n",
    b"G",
    b"\r\n" + get("a"),
)


async def answers_to(sent: list[tuple[bytes, int]], kind: str, folder: Path, *, is_short: bool) -> list[bytes]:
    async with opened(kind, folder) as backend, client_of(backend, is_short=is_short) as client:
        for whole in PLAIN * 2:
            await client.send(whole)
        got = []
        for whole, cut in sent:
            if client.connection._is_closing:
                client.close()
                client.open()
            # In two pieces where the cut is inside.
            client.feed(whole[:cut] or whole)
            if 0 < cut < len(whole):
                client.feed(whole[cut:])
            got.append(await client.answered())
        got.append(repr([await backend.get("db", key) for key in ("a", "b", "a/b")]).encode())
        totals = client.listener.operation.statistics.total()
        got.append(repr([totals.statuses(verb) for verb in (GET, SET)]).encode())
        return got


def check_both_ways(sent: list[tuple[bytes, int]], kind: str, folders: pytest.TempPathFactory) -> None:
    ways = [asyncio.run(answers_to(sent, kind, folders.mktemp("store"), is_short=is_short)) for is_short in (True, False)]
    assert ways[0] == ways[1]


REQUESTS = st.lists(st.tuples(st.sampled_from(PLAIN + ODD), st.integers(0, 400)), max_size=12)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REQUESTS)
def test_answers_over_memory_are_those_of_the_long_way(tmp_path_factory: pytest.TempPathFactory, sent: Any) -> None:
    check_both_ways(sent, "memory", tmp_path_factory)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(REQUESTS)
def test_answers_over_a_file_are_those_of_the_long_way(tmp_path_factory: pytest.TempPathFactory, sent: Any) -> None:
    check_both_ways(sent, "sqlite", tmp_path_factory)


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_each_odd_request_is_answered_as_by_the_long_way(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    check_both_ways([(odd, 0) for odd in ODD if odd != b"G" for _ in range(3)], kind, tmp_path_factory)


async def test_headers_that_say_more_are_parsed_each_time(tmp_path: Path, parsed: list[bytes]) -> None:
    async with opened("sqlite", tmp_path) as backend:
        for odd in ODD:
            for _ in range(3):
                async with client_of(backend) as client:
                    parsed.clear()
                    await client.send(odd)
                    assert parsed, odd


async def test_what_is_learnt_stays_bounded() -> None:
    async with client_of(MemoryBackend()) as client:
        for number in range(3000):
            for _ in range(2):
                client.feed(get("k", f"X-Number: {number % 1500}"))
        short_way = client.listener.short_way
        assert 0 < len(short_way._learnt_of_gets) <= 512
        assert len(short_way._seen) <= 4096


async def test_requests_of_one_turn_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened("sqlite", tmp_path) as backend:
        await backend.set("db", "a", "one", 60)
        server = Server(backend, ServerOptions())
        clients = [Client(server) for _ in range(70)]
        for _ in range(2):
            await clients[0].send(get("a"))
        reads: list[int] = []
        read = server.service.get_all_now
        assert read is not None

        def counted(names: Any) -> Any:
            reads.append(len(names))
            return read(names)

        assert server._listener.short_way is not None
        monkeypatch.setattr(server._listener.short_way, "_get_all_now", counted)
        for client in clients:
            client.feed(get("a"))
        assert all([b'{"value":"one"}' in await client.answered() for client in clients])
        assert reads == [64, 6]
        for client in clients:
            client.close()
        server.abort()


async def test_pipelined_requests_are_answered_in_their_order(tmp_path: Path) -> None:
    async with opened("sqlite", tmp_path) as backend, client_of(backend) as client:
        for number in range(3):
            await client.send(put("k", b"%d" % number))
            await client.send(get("k"))
        client.feed(put("k", b"new"))
        client.feed(get("k"))
        client.feed(put("k", b"newer"))
        client.feed(get("k"))
        answer = await client.answered()
        assert [piece for piece in (b'{"value":"new"}', b'{"value":"newer"}') if piece in answer] == [
            b'{"value":"new"}',
            b'{"value":"newer"}',
        ]
        assert answer.index(b'"new"') < answer.index(b'"newer"')
        assert answer.count(b"HTTP/1.1 200 OK") == 4


async def test_large_and_damaged_values_are_answered_as_ever(tmp_path: Path) -> None:
    async with opened("sqlite", tmp_path) as backend, client_of(backend) as client:
        await backend.set("db", "large", "x" * 100_000, 60)
        await backend.set("db", "bad", "value", 60)
        for _ in range(2):
            await client.send(get("a"))
        cast("Any", backend)._writer._committer._connection.execute("UPDATE entries_v2 SET checksum = 1 WHERE key = 'bad'")
        assert (await client.send(get("large"))).endswith(b'x"}')
        assert b"HTTP/1.1 503 " in await client.send(get("bad"))
        assert client.listener.operation.statistics.total().statuses(GET)["503"] == 1


async def test_client_that_left_before_its_answer_is_counted_as_one(tmp_path: Path) -> None:
    async with opened("sqlite", tmp_path) as backend, client_of(backend) as client:
        for _ in range(2):
            await client.send(put("k", b"v"))
        client.feed(put("k", b"last"))
        client.wire.is_closed = True
        client.connection._transport = None
        async with asyncio.timeout(10):
            while await backend.get("db", "k") != "last" or client.connection._answering:
                await asyncio.sleep(0.001)
        assert client.listener.operation.statistics.total().statuses(SET) == {"200": 2, "499": 1}


async def test_a_read_that_fails_answers_all_that_were_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened("sqlite", tmp_path) as backend, client_of(backend) as client:
        for _ in range(2):
            await client.send(get("a"))

        def fail(_: Any) -> Any:
            raise OSError("no such thing")

        monkeypatch.setattr(client.listener.short_way, "_get_all_now", fail)
        assert b"HTTP/1.1 500 " in await client.send(get("a"))
        monkeypatch.undo()
        assert b"HTTP/1.1 404 " in await client.send(get("a"))


async def test_a_get_that_cannot_be_answered_cuts_its_own_connection_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    async with opened("sqlite", tmp_path) as backend:
        await backend.set("db", "a", "one", 60)
        server = Server(backend, ServerOptions())
        clients = [Client(server) for _ in range(3)]
        for _ in range(2):
            await clients[0].send(get("a"))

        def fail(_: bytes) -> bool:
            raise ZeroDivisionError

        monkeypatch.setattr(clients[0].connection, "take_answer", fail)
        for client in clients:
            client.feed(get("a"))
        assert all([b'{"value":"one"}' in await client.answered() for client in clients[1:]])
        assert clients[0].wire.is_closed
        assert [type(fault) for fault in faults] == [ZeroDivisionError]
        for client in clients:
            client.close()
        server.abort()


async def test_draining_server_closes_also_what_was_plain() -> None:
    backend = MemoryBackend()
    async with client_of(backend) as client:
        for _ in range(3):
            await client.send(get("a"))
        drained = asyncio.create_task(client.listener.drain())
        await asyncio.sleep(0)
        assert b"Connection: close" in await client.send(get("a"))
        client.close()
        await drained


@pytest.mark.parametrize("size", [60_000, 70_000])
async def test_large_values_count_once_for_a_rate(kind: str, tmp_path: Path, size: int) -> None:
    options = ServerOptions(requests_per_second=8)
    async with opened(kind, tmp_path) as backend, client_of(backend, options=options) as client:
        await backend.set("db", "k", "x" * size, 60)
        statuses = [(await client.send(get("k")))[9:12] for _ in range(10)]
        # A few may come in while the requests are answered.
        assert statuses[:8] == [b"200"] * 8
        assert b"429" in statuses
