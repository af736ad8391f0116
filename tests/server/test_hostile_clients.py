"""Clients that want to exhaust the server or to lead it astray: what they get, and what it costs."""

import asyncio
import contextlib
import itertools
import socket
import ssl
import time
from pathlib import Path

import pytest
import trustme
from helpers import served_process
from server_clients import CHUNKED, Connection, chunk, connected, head, put, serving

from aiokv.backends.memory import MemoryBackend
from aiokv.server.options import ServerOptions
from aiokv.server.serve import Server

MIB = 1024 * 1024
LARGE = 1_900_000


def memory_bytes(process_id: int, kind: str) -> int:
    """Return the resident memory, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


def port_of(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


async def until_closed(client: Connection) -> bytes:
    try:
        return await client.rest()
    except ConnectionError:
        return b""


async def open_connections(client: Connection) -> int:
    figures = (await client.ask(head("GET", "/metrics"))).body.decode().splitlines()
    return int(float(next(line for line in figures if line.startswith("aiokv_connections ")).split()[1]))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


@needs_proc
@pytest.mark.slow
async def test_300_unfinished_heads_of_a_megabyte_leave_the_memory_flat(tmp_path: Path) -> None:
    with served_process("--store", "memory://", home=tmp_path) as (process, address):
        async with connected(address) as client:
            assert (await client.ask(head("GET", "/livez"))).status == 200
        before = memory_bytes(process.pid, "VmRSS")

        statuses: set[bytes] = set()

        async def send() -> None:
            async with connected(address) as client:
                with contextlib.suppress(ConnectionError):
                    await client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ", *([b"a" * 65_536] * 16))
                refused = await until_closed(client)
                statuses.add(refused[:12])

        await asyncio.gather(*(send() for _ in range(300)))
        # Cut off where the client sent for so long that it could not read.
        assert b"HTTP/1.1 431" in statuses
        assert statuses <= {b"HTTP/1.1 431", b""}
        assert memory_bytes(process.pid, "VmHWM") - before < 32 * MIB
        async with connected(address) as client:
            assert (await client.ask(head("GET", "/livez"))).status == 200


@pytest.mark.parametrize(
    "endless", [b"0\r\nX: ", b"0\r\nX", b"3;name", b'3;name="'], ids=["trailer value", "trailer name", "extension", "quoted"]
)
async def test_what_stands_around_a_body_in_chunks_ends_after_16_kib(endless: bytes) -> None:
    backend = MemoryBackend()
    async with serving(backend) as address, connected(address) as client:
        await client.send(head("PUT", "/set/db/key", CHUNKED), chunk(b"value"), endless)
        with contextlib.suppress(ConnectionError):
            for _ in range(8):
                await client.send(b"a" * 4_000)
        answer = await client.answer()
        assert (answer.status, answer.headers["connection"]) == (431, "close")
        assert "trailer" in answer.error()
    assert await backend.get("db", "key") is None


async def test_many_chunks_with_extensions_and_a_trailer_are_one_value() -> None:
    backend = MemoryBackend()
    pieces = [b"5;name=value\r\nvalue\r\n"] * 5_000
    async with serving(backend) as address, connected(address) as client:
        assert (await client.ask(head("PUT", "/set/db/key", CHUNKED), *pieces, b"0\r\nX-Sum: 1\r\n\r\n")).status == 200
        assert (await client.ask(head("GET", "/livez"))).status == 200
    assert await backend.get("db", "key") == "value" * 5_000


@needs_proc
@pytest.mark.slow
async def test_60_clients_that_never_read_hold_little_memory_and_not_for_long(tmp_path: Path) -> None:
    arguments = ("--store", "memory://", "--grace", "1", "--min-bytes-per-second", "64K")
    with served_process(*arguments, home=tmp_path) as (process, address), contextlib.ExitStack() as stack:
        async with connected(address) as client:
            assert (await client.ask(put("/set/db/large", b"v" * LARGE))).status == 200
        for one in [stack.enter_context(socket.socket()) for _ in range(60)]:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            one.settimeout(10)
            one.connect(("127.0.0.1", port_of(address)))
            one.sendall(head("GET", "/get/db/large") * 500)
        began = time.monotonic()
        async with connected(address) as client, asyncio.timeout(15):
            assert (await client.ask(head("GET", "/livez"))).status == 200
            while await open_connections(client) > 1:
                await asyncio.sleep(0.1)
        assert time.monotonic() - began < 12
        assert memory_bytes(process.pid, "VmHWM") < 200 * MIB


async def test_small_answers_that_nobody_reads_have_a_bound_over_all_connections() -> None:
    backend = MemoryBackend()
    await backend.set("db", "key", "v" * 60_000, 60)
    options = ServerOptions(port=0, drain_seconds=1, max_bytes_in_flight=500_000, head_timeout_seconds=0.2)
    server = Server(backend, options)
    address = await server.start()
    silent = [socket.socket() for _ in range(12)]
    loop = asyncio.get_running_loop()
    for one in silent:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        one.setblocking(False)
        await loop.sock_connect(one, ("127.0.0.1", port_of(address)))
        await loop.sock_sendall(one, head("GET", "/get/db/key") * 300)
    async with asyncio.timeout(10):
        while len(server._listener.connections) == len(silent):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    held = [connection.unread_bytes() for connection in server._listener.connections]
    assert 0 < sum(held) <= 500_000
    async with connected(address) as client:
        assert (await client.ask(head("GET", "/livez"))).status == 200
    for one in silent:
        one.close()
    await server.drain()


async def test_tls_handshakes_that_never_end_give_up_their_places() -> None:
    authority = trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)
    server = Server(MemoryBackend(), ServerOptions(port=0, drain_seconds=1, head_timeout_seconds=0.5), tls=context)
    address = await server.start()
    port = port_of(address)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(60)]
    for one in silent[:20]:
        one.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    for one in silent[20:40]:
        one.sendall(head("GET", "/livez"))
    async with asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_context)
        assert (await Connection(reader, writer).ask(head("GET", "/livez"))).status == 200
        writer.close()
        await writer.wait_closed()
        while server._listener._count:
            await asyncio.sleep(0.01)
    assert server._listener._count_by_address == {}
    for one in silent:
        one.close()
    await server.drain()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://localhost/livez", 200),
        ("http://localhost/openapi.json?x=1", 200),
        ("http://localhost/get/db/key", 404),
        ("http://localhost", 404),
        ("http://evil.example/livez", 403),
        ("http://evil@localhost/livez", 400),
    ],
)
async def test_absolute_target_leads_to_pages_too_and_its_host_counts(target: str, status: int) -> None:
    async with serving(MemoryBackend()) as address, connected(address) as client:
        assert (await client.ask(head("GET", target))).status == status
        assert (await client.ask(head("GET", "/livez"))).status == 200


async def test_token_by_an_absolute_target_is_for_its_host() -> None:
    async with serving(MemoryBackend()) as address, connected(address) as client:
        target = "http://127.0.0.1:99/storage/auth/token"
        answer = await client.ask(head("POST", target, "Content-Length: 0", host="elsewhere.example"))
        assert answer.status == 200
        assert b'"base_url":"http://127.0.0.1:99"' in answer.body


@pytest.mark.parametrize(
    "host",
    [
        "evil@localhost",
        "localhost/evil",
        "localhost?evil",
        "localhost#evil",
        "local\thost",
        "localhost, evil",
        "localhost:x",
        "[::1",
    ],
)
async def test_host_that_two_readers_could_take_for_two_names_is_refused(host: str) -> None:
    async with serving(MemoryBackend()) as address, connected(address) as client:
        answer = await client.ask(head("GET", "/livez", host=host))
        assert answer.status == 400
        assert "Host" in answer.error()


@pytest.mark.parametrize("origin", ["http://evil\\@localhost", "http://localhost@evil.example", "http://localhost/evil"])
async def test_origin_that_two_readers_could_take_for_two_names_is_foreign(origin: str) -> None:
    async with serving(MemoryBackend()) as address, connected(address) as client:
        assert (await client.ask(head("GET", "/get/db/key", f"Origin: {origin}"))).status == 403


class CountingBackend(MemoryBackend):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def get_now(self, db_name: str, key: str) -> str | None:
        self.reads += 1
        return super().get_now(db_name, key)


@pytest.mark.parametrize(("size_bytes", "most_reads"), [(1, 100), (LARGE, 2)])
async def test_pipeline_gives_the_other_connections_a_turn_after_a_few_requests(size_bytes: int, most_reads: int) -> None:
    backend = CountingBackend()
    await backend.set("db", "key", "v" * size_bytes, 60)
    requests = 50 if size_bytes == LARGE else 1_000
    async with serving(backend) as address, connected(address) as client:

        async def read_all() -> None:
            for _ in range(requests):
                assert (await client.answer()).status == 200

        reading = asyncio.create_task(read_all())
        await client.send(head("GET", "/get/db/key") * requests)
        steps = []
        while not reading.done():
            before = backend.reads
            await asyncio.sleep(0)
            steps.append(backend.reads - before)
        await reading
    assert sum(steps) <= backend.reads == requests
    assert max(steps) <= most_reads


async def test_requests_behind_an_answer_without_room_are_not_served() -> None:
    backend = CountingBackend()
    await backend.set("db", "large", "v" * 400_000, 60)
    server = Server(backend, ServerOptions(port=0, drain_seconds=1, max_bytes_in_flight=1_000_000, grace_seconds=5))
    address = await server.start()
    loop = asyncio.get_running_loop()
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        silent.setblocking(False)
        await loop.sock_connect(silent, ("127.0.0.1", port_of(address)))
        await loop.sock_sendall(silent, head("GET", "/get/db/large") * 100)
        async with asyncio.timeout(5):
            while not server.service.admission.budget.held_bytes:
                await asyncio.sleep(0.01)
        before = backend.reads
        async with connected(address) as client:
            refused = await client.ask(head("GET", "/get/db/large") * 50)
            assert (refused.status, refused.headers["connection"], refused.headers["retry-after"]) == (503, "close", "1")
            assert await until_closed(client) == b""
        assert backend.reads == before + 1
    await server.drain()


async def test_addresses_of_one_ipv6_network_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One machine has 2**64 addresses; the kernel's answer is replaced, since a test has but one."""
    addresses = (f"2001:db8:0:1::{number:x}" for number in itertools.count(1))
    accept = socket.socket.accept
    monkeypatch.setattr(socket.socket, "accept", lambda self: (accept(self)[0], (next(addresses), 1, 0, 0)))
    server = Server(MemoryBackend(), ServerOptions(port=0, drain_seconds=1, max_connections=6, max_connections_per_address=2))
    address = await server.start()
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(address)) for _ in range(4)]
        answers = [await client.ask(head("GET", "/livez")) for client in clients[:2]]
        refused = [await client.answer() for client in clients[2:]]
    assert [answer.status for answer in (*answers, *refused)] == [200, 200, 503, 503]
    async with asyncio.timeout(5):
        while server._listener._count_by_address:
            await asyncio.sleep(0.01)
    await server.drain()
