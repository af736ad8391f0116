"""The fault proxy: what each fault does to a raw connection and to a store, what is counted, and that nothing stays behind."""

import asyncio
import contextlib
import errno
import itertools
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from aiokv import (
    AsyncKVStore,
    CallError,
    CallTimeoutError,
    ConnectError,
    HttpOptions,
    ResponseError,
    RetryPolicy,
    TransportError,
)
from aiokv.backends.memory import MemoryBackend
from aiokv.server import running_server
from aiokv.testing import (
    Bandwidth,
    Fault,
    FaultProxy,
    Garbage,
    Latency,
    LatencyAfter,
    RecordedRequest,
    ResetAfter,
    ResetBefore,
    SlowDrip,
    Stall,
    StallAfter,
    Truncate,
    disable_backoff,
    with_probability,
)
from aiokv.testing.background import in_thread

PUT = b"PUT /set/db/k?ttl=60 HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer t0ken\r\nContent-Length: 5\r\n\r\nvalue"
GET = b"GET /get/db/k HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
VALUE_BODY = b'{"value":"value"}'

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Sleeps:
    """Stand in for `asyncio.sleep`: keep what is asked for, and pass at once."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def sleeps() -> Sleeps:
    return Sleeps()


@pytest.fixture
async def proxy(backend: MemoryBackend, sleeps: Sleeps) -> AsyncGenerator[FaultProxy]:
    async with running_server(backend) as address, FaultProxy(address, sleep=sleeps) as proxy:
        yield proxy
    assert not any(task.get_name() == "aiokv fault proxy" for task in asyncio.all_tasks())


@contextlib.asynccontextmanager
async def connected(proxy: FaultProxy) -> AsyncGenerator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def rest_of(reader: asyncio.StreamReader) -> tuple[bytes, str]:
    """Read to the end; return how the connection ended."""
    data = b""
    try:
        while piece := await reader.read(1000):
            data += piece
    except ConnectionResetError:
        return data, "reset"
    return data, "closed"


async def one_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def port_of(server: asyncio.Server) -> int:
    return int(server.sockets[0].getsockname()[1])


@contextlib.asynccontextmanager
async def upstream(answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncGenerator[str]:
    """Run a server that answers as a test writes, in bytes."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        finally:
            writer.close()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{port_of(server)}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def answering(data: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(data)
                if b"Connection: close" in data:
                    return

    return answer


async def test_requests_without_a_fault_pass_and_share_a_connection(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        for request, body in ((PUT, b'{"ok":true}'), (GET, VALUE_BODY), (GET, VALUE_BODY)):
            writer.write(request)
            head, answered = await one_answer(reader)
            assert head.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answered == body
    assert [(seen.number, seen.connection, seen.method, seen.path) for seen in proxy.requests] == [
        (1, 1, "PUT", "/set/db/k?ttl=60"),
        (2, 1, "GET", "/get/db/k"),
        (3, 1, "GET", "/get/db/k"),
    ]
    assert all(seen.reached_upstream and seen.answered and seen.status == 200 for seen in proxy.requests)


async def test_requests_sent_without_waiting_for_answers_are_answered_in_their_order(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PUT + GET + GET.replace(b"/k ", b"/absent "))
        answers = [await one_answer(reader) for _ in range(3)]
    assert [head[9:12] for head, _ in answers] == [b"200", b"200", b"404"]


async def test_record_bears_no_header_and_no_body(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PUT)
        await one_answer(reader)
    assert "t0ken" not in repr(proxy.requests)
    assert "value" not in repr(proxy.requests)


@pytest.mark.parametrize(
    ("fault", "received", "end", "applied"),
    [
        (ResetBefore(), b"", "reset", False),
        (ResetAfter(), b"", "reset", True),
        (Garbage(b"not http"), b"not http", "closed", False),
        ((Latency(1), ResetBefore()), b"", "reset", False),
        ((LatencyAfter(1), ResetAfter()), b"", "reset", True),
    ],
    ids=str,
)
async def test_fault_ends_the_connection_as_it_says(  # noqa: PLR0913 (one case in full)
    proxy: FaultProxy, backend: MemoryBackend, fault: Fault, received: bytes, end: str, *, applied: bool
) -> None:
    proxy.faults = fault
    async with connected(proxy) as (reader, writer):
        writer.write(PUT)
        assert await rest_of(reader) == (received, end)
    (seen,) = proxy.requests
    assert (seen.fault, seen.reached_upstream, seen.answered) == (fault, applied, False)
    assert await backend.get("db", "k") == ("value" if applied else None)
    await until(lambda: proxy.connections == 0)


@pytest.mark.parametrize(("fault", "applied"), [(Stall(), False), (StallAfter(), True)], ids=str)
async def test_stall_holds_the_connection_until_the_client_leaves(
    proxy: FaultProxy, backend: MemoryBackend, fault: Fault, *, applied: bool
) -> None:
    proxy.faults = fault
    async with connected(proxy) as (reader, writer):
        writer.write(PUT)
        await until(lambda: bool(proxy.requests) and proxy.requests[0].reached_upstream == applied)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)
        assert proxy.connections == 1
    await until(lambda: proxy.connections == 0)
    assert await backend.get("db", "k") == ("value" if applied else None)


@pytest.mark.parametrize(
    ("kept_bytes", "body"), [(0, b""), (5, VALUE_BODY[:5]), (len(VALUE_BODY), VALUE_BODY), (999, VALUE_BODY)]
)
async def test_truncated_body_is_announced_whole_and_cut(
    proxy: FaultProxy, backend: MemoryBackend, kept_bytes: int, body: bytes
) -> None:
    await backend.set("db", "k", "value", 60)
    proxy.faults = Truncate(kept_bytes)
    async with connected(proxy) as (reader, writer):
        writer.write(GET)
        data, end = await rest_of(reader)
    head, _, received = data.partition(b"\r\n\r\n")
    assert b"Content-Length: %d" % len(VALUE_BODY) in head
    assert (received, end) == (body, "closed")
    assert proxy.requests[0].answered == (body == VALUE_BODY)


async def test_fault_befalls_a_request_not_its_connection(proxy: FaultProxy) -> None:
    proxy.faults = [None, None, ResetAfter()]
    async with connected(proxy) as (reader, writer):
        writer.write(PUT)
        await one_answer(reader)
        writer.write(GET)
        assert (await one_answer(reader))[1] == VALUE_BODY
        writer.write(GET)
        assert await rest_of(reader) == (b"", "reset")
    assert [(seen.connection, seen.fault) for seen in proxy.requests] == [(1, None), (1, None), (1, ResetAfter())]


async def test_latency_comes_before_the_upstream_and_latency_after_behind_it(backend: MemoryBackend) -> None:
    stored: list[tuple[float, str | None]] = []

    async def sleep(seconds: float) -> None:
        stored.append((seconds, await backend.get("db", "k")))

    async with running_server(backend) as address, FaultProxy(address, sleep=sleep) as proxy:
        proxy.faults = (Latency(2), LatencyAfter(3))
        async with connected(proxy) as (reader, writer):
            writer.write(PUT)
            await one_answer(reader)
    assert stored == [(2, None), (3, "value")]


async def test_jitter_is_drawn_within_its_bounds_from_the_seed(backend: MemoryBackend) -> None:
    async def drawn(seed: int) -> list[float]:
        sleeps = Sleeps()
        async with (
            running_server(backend) as address,
            FaultProxy(address, faults=Latency(1, jitter_seconds=2), seed=seed, sleep=sleeps) as proxy,
            connected(proxy) as (reader, writer),
        ):
            for _ in range(5):
                writer.write(PUT)
                await one_answer(reader)
        return sleeps.seconds

    first = await drawn(1)
    assert all(1 <= seconds <= 3 for seconds in first)
    assert len(set(first)) == 5
    assert await drawn(1) == first
    assert await drawn(2) != first


async def test_bandwidth_takes_its_time_for_both_directions_in_small_pieces(proxy: FaultProxy, sleeps: Sleeps) -> None:
    proxy.faults = Bandwidth(bytes_per_second=200)
    async with connected(proxy) as (reader, writer):
        writer.write(PUT)
        head, body = await one_answer(reader)
    assert sum(sleeps.seconds) == pytest.approx((len(PUT) + len(head) + len(body)) / 200)
    assert max(sleeps.seconds) == pytest.approx(1 / 20)


async def test_slow_drip_sends_an_answer_byte_by_byte(proxy: FaultProxy, sleeps: Sleeps) -> None:
    proxy.faults = SlowDrip(bytes_per_second=4000)
    async with connected(proxy) as (reader, writer):
        writer.write(PUT)
        head, body = await one_answer(reader)
    assert body == b'{"ok":true}'
    assert sleeps.seconds == [1 / 4000] * (len(head) + len(body))


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nfirst\r\n6\r\nsecond\r\n0\r\nTrailer: t\r\n\r\n"


async def test_chunked_answer_passes_byte_for_byte_and_the_connection_lasts() -> None:
    async with upstream(answering(CHUNKED)) as address, FaultProxy(address) as proxy, connected(proxy) as (reader, writer):
        for _ in range(2):
            writer.write(GET)
            assert await reader.readexactly(len(CHUNKED)) == CHUNKED


async def test_cut_of_a_chunked_answer_counts_payload_alone() -> None:
    async with (
        upstream(answering(CHUNKED)) as address,
        FaultProxy(address, faults=Truncate(8)) as proxy,
        connected(proxy) as (reader, writer),
    ):
        writer.write(GET)
        assert await rest_of(reader) == (CHUNKED[: CHUNKED.index(b"ond\r\n0")], "closed")


async def test_chunked_and_large_requests_arrive_whole(proxy: FaultProxy, backend: MemoryBackend) -> None:
    value = b"x" * 1_900_000
    length = b"Content-Length: 5"
    large = PUT.replace(length, b"Content-Length: %d" % len(value)).replace(b"\r\n\r\nvalue", b"\r\n\r\n" + value)
    chunked = PUT.replace(length, b"Transfer-Encoding: chunked").replace(
        b"\r\n\r\nvalue", b"\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    async with connected(proxy) as (reader, writer):
        for request, stored in ((large, value.decode()), (chunked, "abcde")):
            writer.write(request)
            assert (await one_answer(reader))[0].startswith(b"HTTP/1.1 200")
            assert await backend.get("db", "k") == stored
    assert [seen.reached_upstream for seen in proxy.requests] == [True, True]


async def test_answer_without_a_length_ends_with_its_connection() -> None:
    data = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nto the end"
    async with upstream(answering(data)) as address, FaultProxy(address) as proxy, connected(proxy) as (reader, writer):
        writer.write(GET)
        assert await rest_of(reader) == (data, "closed")


@pytest.mark.parametrize(
    ("request_head", "answer"),
    [
        (GET.replace(b"GET", b"HEAD"), b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n"),
        (GET, b"HTTP/1.1 204 No Content\r\n\r\n"),
        (GET, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n"),
        (GET, b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:1\r\n\r\nx"),
    ],
    ids=["head", "204", "304", "interim"],
)
async def test_answer_of_any_form_leaves_the_connection_usable(request_head: bytes, answer: bytes) -> None:
    async with upstream(answering(answer)) as address, FaultProxy(address) as proxy, connected(proxy) as (reader, writer):
        for _ in range(2):
            writer.write(request_head)
            assert await reader.readexactly(len(answer)) == answer


async def test_refusal_arrives_before_the_body_that_it_refuses(proxy: FaultProxy) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(PUT.replace(b"Content-Length: 5", b"Content-Length: 1000000000"))
        data, _ = await rest_of(reader)
    assert data.startswith(b"HTTP/1.1 413")
    assert not proxy.requests[0].reached_upstream


@pytest.mark.parametrize("fault", [None, ResetBefore()], ids=str)
async def test_body_that_waits_to_be_asked_for_is_asked_for(proxy: FaultProxy, fault: Fault | None) -> None:
    proxy.faults = fault
    head, _, body = PUT.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n").partition(b"\r\n\r\n")
    async with connected(proxy) as (reader, writer):
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        if fault is None:
            assert (await one_answer(reader))[1] == b'{"ok":true}'
        else:
            assert await rest_of(reader) == (b"", "reset")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01 not http\r\n\r\n",
        b"\r\n\r\n",
        b"GET /\r\n\r\n",
        GET.replace(b"\r\n\r\n", b"\r\nContent-Length: x\r\n\r\n"),
        PUT.replace(b"Content-Length: 5", b"Content-Length: 5\r\nContent-Length: 6"),
        PUT.replace(b"Content-Length: 5", b"Transfer-Encoding: gzip"),
        b"GET /" + b"x" * 600_000,
    ],
    ids=["tls", "empty", "no version", "no number", "two lengths", "no chunks", "endless"],
)
async def test_what_is_not_http_is_closed_and_not_counted(proxy: FaultProxy, data: bytes) -> None:
    async with connected(proxy) as (reader, writer):
        writer.write(data)
        assert (await rest_of(reader))[0] == b""
    assert proxy.requests == []


async def test_request_in_a_slow_network_arrives_after_its_client_has_left(backend: MemoryBackend) -> None:
    slept, wake = asyncio.Event(), asyncio.Event()

    async def sleep(_seconds: float) -> None:
        slept.set()
        await wake.wait()

    async with running_server(backend) as address, FaultProxy(address, faults=Latency(60), sleep=sleep) as proxy:
        async with connected(proxy) as (_, writer):
            writer.write(PUT)
            await slept.wait()
        assert await backend.get("db", "k") is None
        wake.set()
        await until(lambda: proxy.connections == 0)
        await until(lambda: proxy.requests[0].reached_upstream)
        while await backend.get("db", "k") is None:
            await asyncio.sleep(0.001)


async def test_upstream_is_told_of_a_client_that_leaves() -> None:
    told = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.read() == b""
        told.set()

    async with upstream(answer) as address, FaultProxy(address) as proxy:
        async with connected(proxy) as (_, writer):
            writer.write(GET)
            await until(lambda: bool(proxy.requests) and proxy.requests[0].reached_upstream)
        await told.wait()
        await until(lambda: proxy.connections == 0)


async def test_client_is_told_of_an_upstream_that_closes_an_idle_connection() -> None:
    answered = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answered)

    async with upstream(answer) as address, FaultProxy(address) as proxy, connected(proxy) as (reader, writer):
        writer.write(GET)
        assert await rest_of(reader) == (answered, "closed")


async def test_answer_that_an_upstream_closes_behind_arrives_whole() -> None:
    small = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    large = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for data in (small, large):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(data)

    async with upstream(answer) as address, FaultProxy(address) as proxy, connected(proxy) as (reader, writer):
        writer.write(GET)
        assert await reader.readexactly(len(small)) == small
        writer.write(GET)
        assert await rest_of(reader) == (large, "closed")


@pytest.mark.parametrize(
    ("sent", "received"),
    [(b"", b""), (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")],
    ids=["before", "within"],
)
async def test_what_an_upstream_had_sent_before_it_broke_off_is_handed_on(sent: bytes, received: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)

    async with upstream(answer) as address, FaultProxy(address) as proxy, connected(proxy) as (reader, writer):
        writer.write(GET)
        assert await rest_of(reader) == (received, "closed")
    assert not proxy.requests[0].answered


async def test_upstream_that_refuses_connections_is_a_reset_and_can_come_back(backend: MemoryBackend) -> None:
    async with running_server(backend) as address:
        port = int(address.rpartition(":")[2])
    async with FaultProxy(address) as proxy:
        async with connected(proxy) as (reader, writer):
            writer.write(GET)
            assert await rest_of(reader) == (b"", "reset")
        assert not proxy.requests[0].reached_upstream
        async with running_server(backend, port=port), connected(proxy) as (reader, writer):
            writer.write(GET)
            assert (await one_answer(reader))[0].startswith(b"HTTP/1.1 404")


async def test_outage_refuses_connections_and_resets_open_ones_then_ends_on_the_same_port(proxy: FaultProxy) -> None:
    address = proxy.url
    async with connected(proxy) as (reader, writer):
        writer.write(PUT)
        await one_answer(reader)
        async with proxy.outage():
            assert not proxy.listening
            assert await rest_of(reader) == (b"", "reset")
            for _ in range(3):
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", proxy.port)
            await proxy.stop_listening()
    assert proxy.url == address
    async with connected(proxy) as (reader, writer):
        writer.write(GET)
        assert (await one_answer(reader))[1] == VALUE_BODY
    await proxy.resume()


async def test_nobody_else_can_take_the_port_during_an_outage(proxy: FaultProxy) -> None:
    async with proxy.outage():
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError) as raised:  # noqa: PT011 (the number says which)
                other.bind(("127.0.0.1", proxy.port))
    assert raised.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize("turns", range(5))
async def test_connections_that_come_as_an_outage_begins_are_reset(proxy: FaultProxy, turns: int) -> None:
    # In the kernel's queue after no turn of the event loop, half accepted after some.
    connections = [socket.create_connection(("127.0.0.1", proxy.port)) for _ in range(20)]
    for _ in range(turns):
        await asyncio.sleep(0)
    await proxy.stop_listening()
    # These wait without the event loop: what is not reset by now never will be.
    for connection in connections:
        with contextlib.closing(connection), pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert proxy.connections == 0


async def test_outage_can_be_made_from_another_event_loop(backend: MemoryBackend) -> None:
    async with running_server(backend) as address:
        with in_thread(lambda: FaultProxy(address)) as proxy:
            async with AsyncKVStore("db", url=proxy.url, retry=RetryPolicy.none()) as store:
                async with proxy.outage():
                    with pytest.raises(ConnectError):
                        await store.get("k")
                with disable_backoff():
                    assert await store.get("k") is None


@pytest.mark.parametrize("fault", [Stall(), StallAfter(), Latency(3600), LatencyAfter(3600), SlowDrip(0.001)], ids=str)
async def test_end_comes_at_once_whatever_is_under_way(backend: MemoryBackend, fault: Fault) -> None:
    async with running_server(backend) as address:
        async with FaultProxy(address, faults=fault) as proxy:
            connections = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(5)]
            for _, writer in connections:
                writer.write(PUT)
            await until(lambda: len(proxy.requests) == 5)
        for reader, writer in connections:
            assert (await rest_of(reader))[1] == "reset"
            writer.close()
        assert proxy.connections == 0
        await proxy.aclose()
    assert not any(task.get_name() == "aiokv fault proxy" for task in asyncio.all_tasks())


async def test_end_comes_at_once_while_a_body_is_on_its_way(proxy: FaultProxy) -> None:
    async with connected(proxy) as (_, writer):
        writer.write(PUT.replace(b"Content-Length: 5", b"Content-Length: 1000000"))
        await until(lambda: len(proxy.requests) == 1)
        await asyncio.sleep(0.01)
        await proxy.aclose()


async def test_proxy_that_does_not_run_says_how_to_run_it(proxy: FaultProxy) -> None:
    idle = FaultProxy(proxy.url)
    with pytest.raises(RuntimeError, match="async with"):
        _ = idle.url
    with pytest.raises(RuntimeError, match="async with"):
        await idle.stop_listening()
    with pytest.raises(RuntimeError, match="already"):
        await proxy.__aenter__()
    await idle.aclose()


async def test_prefix_of_the_upstream_is_that_of_the_proxy() -> None:
    async with FaultProxy("http://localhost:1/base/") as proxy:
        assert proxy.url == f"http://127.0.0.1:{proxy.port}/base"


async def gets(proxy: FaultProxy, count: int) -> list[Fault | None]:
    """Send requests one after the other; return the fault that each met."""
    proxy.requests.clear()
    for _ in range(count):
        async with connected(proxy) as (reader, writer):
            writer.write(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            await rest_of(reader)
    return [seen.fault for seen in proxy.requests]  # type: ignore[misc]


async def test_faults_are_none_one_a_list_an_iterator_or_a_function(proxy: FaultProxy) -> None:
    first, second = ResetBefore(), Garbage()
    assert await gets(proxy, 2) == [None, None]
    proxy.faults = first
    assert await gets(proxy, 2) == [first, first]
    proxy.faults = (Latency(1), first)
    assert await gets(proxy, 2) == [(Latency(1), first)] * 2
    proxy.faults = [None, first, (Latency(1), second)]
    assert await gets(proxy, 5) == [None, first, (Latency(1), second), None, None]
    proxy.faults = itertools.cycle([first, second])
    assert await gets(proxy, 5) == [first, second, first, second, first]
    proxy.faults = lambda seen: second if seen.number % 2 else None
    given = await gets(proxy, 4)
    assert given.count(second) == 2
    proxy.faults = None
    assert await gets(proxy, 1) == [None]


async def test_function_sees_method_and_path_before_anything_has_happened(proxy: FaultProxy, backend: MemoryBackend) -> None:
    proxy.faults = lambda seen: ResetAfter() if seen.method == "PUT" and not seen.reached_upstream else None
    async with AsyncKVStore("db", url=proxy.url, retry=RetryPolicy.none()) as store:
        with pytest.raises(TransportError):
            await store.set("k", "v")
        assert await store.get("k") == "v"
    assert await backend.get("db", "k") == "v"


@pytest.mark.parametrize(
    ("faults", "error"),
    [(lambda _: 1 // 0, ZeroDivisionError), (lambda _: "reset", TypeError), (iter([(Stall(), ResetAfter())]), ValueError)],
    ids=["raises", "no fault", "two endings"],
)
async def test_script_that_fails_resets_and_is_raised_at_the_end(
    faults: Callable[[RecordedRequest], Fault | None], error: type[Exception]
) -> None:
    async def use(proxy: FaultProxy) -> None:
        async with proxy, connected(proxy) as (reader, writer):
            writer.write(GET)
            assert await rest_of(reader) == (b"", "reset")

    with pytest.raises(error):
        await use(FaultProxy("http://127.0.0.1:1", faults=faults))


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ((ResetBefore(), ResetAfter()), ValueError),
        ((Bandwidth(1), SlowDrip(1)), ValueError),
        ((Latency(1), Latency(2)), ValueError),
        ((ResetBefore(), None), TypeError),
        ([ResetBefore(), "reset"], TypeError),
        ([[ResetBefore()]], TypeError),
        (ResetBefore, TypeError),
        ("reset", TypeError),
        (3, TypeError),
    ],
    ids=str,
)
def test_faults_that_cannot_be_are_refused_when_they_are_set(faults: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"fault|Fault"):
        FaultProxy("http://127.0.0.1:1", faults=faults)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Latency(-1),
        lambda: Latency(float("nan")),
        lambda: LatencyAfter(1, jitter_seconds=float("inf")),
        lambda: Bandwidth(0),
        lambda: SlowDrip(-1),
        lambda: Truncate(-1),
        lambda: Truncate(True),
        lambda: Garbage(b""),
        lambda: with_probability(1.1, Stall()),
        lambda: with_probability(0.5),
        lambda: FaultProxy("https://127.0.0.1:1"),
        lambda: FaultProxy("http://user:s3cret@127.0.0.1:1"),
        lambda: FaultProxy("http://127.0.0.1:port"),
    ],
)
def test_argument_outside_its_range_is_refused_by_name(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"seconds|bytes|data|probability|with_probability|upstream") as raised:
        make()
    assert "s3cret" not in str(raised.value)


def test_draws_are_repeated_by_their_seed_and_keep_to_their_share() -> None:
    seen = RecordedRequest(1, 1, "GET", "/")

    def drawn(share: float, *faults: Fault, seed: int) -> list[object]:
        draw = with_probability(share, *faults, seed=seed)
        return [draw(seen) for _ in range(10_000)]

    first = drawn(0.3, Stall(), ResetAfter(), seed=7)
    assert drawn(0.3, Stall(), ResetAfter(), seed=7) == first
    assert drawn(0.3, Stall(), ResetAfter(), seed=8) != first
    assert 0.28 < sum(fault is not None for fault in first) / 10_000 < 0.32
    assert 0.14 < first.count(Stall()) / 10_000 < 0.16
    # Another fault to draw from changes which fault a request meets, not whether it meets one; a larger share only adds some.
    assert [fault is None for fault in drawn(0.3, Stall(), seed=7)] == [fault is None for fault in first]
    more = drawn(0.6, Stall(), ResetAfter(), seed=7)
    assert all(fault is None or fault == other for fault, other in zip(first, more, strict=True))
    assert set(drawn(0, Stall(), seed=7)) == {None}
    assert set(drawn(1, Stall(), seed=7)) == {Stall()}


@pytest.mark.parametrize(
    ("fault", "error", "maybe_applied", "applied"),
    [
        (ResetBefore(), TransportError, True, False),
        (ResetAfter(), TransportError, True, True),
        (Stall(), CallTimeoutError, True, False),
        (StallAfter(), CallTimeoutError, True, True),
        (Truncate(3), TransportError, True, True),
        (Garbage(), ResponseError, True, False),
    ],
    ids=str,
)
async def test_set_that_meets_a_fault_fails_as_the_store_says(  # noqa: PLR0913 (one case in full)
    proxy: FaultProxy, backend: MemoryBackend, fault: Fault, error: type[CallError], *, maybe_applied: bool, applied: bool
) -> None:
    async with AsyncKVStore("db", url=proxy.url, retry=RetryPolicy.none()) as store:
        proxy.faults = [fault]
        impatient = store.with_options(timeout=0.3) if error is CallTimeoutError else store
        with pytest.raises(error) as raised:
            await impatient.set("k", "v")
        assert (raised.value.maybe_applied, raised.value.attempts) == (maybe_applied, 1)
        assert await backend.get("db", "k") == ("v" if applied else None)
        assert await store.get("k") == ("v" if applied else None)
    assert [(seen.method, seen.fault) for seen in proxy.requests] == [("PUT", fault), ("GET", None)]


async def test_retries_bring_calls_through_a_flaky_network_and_every_send_is_counted(proxy: FaultProxy) -> None:
    proxy.faults = with_probability(0.2, ResetBefore(), ResetAfter(), Truncate(1), (Latency(1), ResetAfter()), seed=3)
    with disable_backoff():
        # Each get by itself: in batches there would be fewer requests.
        http = HttpOptions(batching=False)
        async with AsyncKVStore("db", url=proxy.url, retry=RetryPolicy(attempts=20), http=http) as store:

            async def use(number: int) -> None:
                await store.set(f"k{number}", str(number))
                assert await store.get(f"k{number}") == str(number)

            for first in range(0, 200, 20):
                await asyncio.gather(*(use(number) for number in range(first, first + 20)))
    faulty = sum(seen.fault is not None for seen in proxy.requests)
    assert faulty > 40
    assert len(proxy.requests) == 400 + faulty
    assert sum(seen.answered for seen in proxy.requests) == 400


async def test_clients_that_are_cancelled_leave_nothing_behind(proxy: FaultProxy) -> None:
    proxy.faults = with_probability(0.5, Stall(), StallAfter())
    async with AsyncKVStore("db", url=proxy.url) as store:
        calls = [asyncio.create_task(store.get(f"k{number}")) for number in range(50)]
        await until(lambda: len(proxy.requests) == 50)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    await until(lambda: proxy.connections == 0)
