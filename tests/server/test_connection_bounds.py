"""What one client can take of a server, whatever it sends, holds back or does not read."""

import asyncio
import contextlib
import io
import logging
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

import aiohttp
import pytest
from helpers import clean_environment
from server_clients import CHUNKED, Connection, SlowBackend, chunk, connected, head, put, serving

from aiokv import AsyncKVStore
from aiokv.backends.memory import MemoryBackend
from aiokv.server.answers import Answer
from aiokv.server.budget import SMALL_BYTES, Budget
from aiokv.server.options import ServerOptions
from aiokv.server.serve import Server

LARGE = 1_900_000


@contextlib.asynccontextmanager
async def server_of(backend: MemoryBackend, **bounds: float) -> AsyncGenerator[tuple[Server, str]]:
    """Run a server of which a test looks at the inside."""
    server = Server(backend, ServerOptions(port=0, drain_seconds=1, **bounds))
    try:
        yield server, await server.start()
    finally:
        await server.drain()


async def until(condition: object, timeout_seconds: float = 5.0) -> None:
    async with asyncio.timeout(timeout_seconds):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


async def closed(client: Connection) -> bytes:
    """Return what came until the server closed, or cut, the connection."""
    try:
        return await client.rest()
    except ConnectionError:
        return b""


def peak_memory_kib(process_id: int) -> int:
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


class CountingBackend(MemoryBackend):
    """A backend that counts reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def get_now(self, db_name: str, key: str) -> str | None:
        self.reads += 1
        return super().get_now(db_name, key)


async def test_connection_over_the_bound_is_told_so_and_closed_and_the_next_one_served_when_one_leaves() -> None:
    async with serving(MemoryBackend(), max_connections=3, max_connections_per_address=3) as address:
        async with contextlib.AsyncExitStack() as stack:
            held = [await stack.enter_async_context(connected(address)) for _ in range(3)]
            for client in held:
                assert (await client.ask(head("GET", "/livez"))).status == 200
            async with connected(address) as surplus:
                answer = await surplus.answer()
                assert (answer.status, answer.headers["connection"], answer.headers["retry-after"]) == (503, "close", "1")
                assert answer.error()
                assert await closed(surplus) == b""
        async with asyncio.timeout(5):
            while True:
                async with connected(address) as client:
                    if (await client.ask(head("GET", "/livez"))).status == 200:
                        break


async def test_one_address_leaves_room_for_others() -> None:
    async with (
        serving(MemoryBackend(), max_connections=6, max_connections_per_address=4) as address,
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(10):
            await stack.enter_async_context(connected(address))
        port = int(address.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.2", 0))
        assert (await Connection(reader, writer).ask(head("GET", "/livez"))).status == 200
        writer.close()


@pytest.mark.slow
async def test_silent_connections_shut_nobody_out_and_are_a_line_of_log(tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); from aiokv.cli import main;"
        "sys.exit(main(['serve', '--store', 'memory://', '--port', '0']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=clean_environment(tmp_path)
    )
    silent: list[socket.socket] = []
    try:
        assert process.stderr is not None
        port = int(process.stderr.readline().split(" at http://127.0.0.1:", 1)[1].split(",")[0].split()[0])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(300)]
        async with AsyncKVStore("db", url=f"http://127.0.0.1:{port}") as store:
            reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=("127.0.0.9", 0))
            assert (await Connection(reader, writer).ask(head("GET", "/livez"))).status == 200
            writer.close()
            for one in silent:
                one.close()
            await store.set("k", "v")
    finally:
        for one in silent:
            one.close()
        process.terminate()
        _, errors = process.communicate(timeout=15)
    assert [line for line in errors.splitlines() if "refused" in line][1:] == []
    assert "Traceback" not in errors


async def test_unfinished_heads_of_a_megabyte_are_refused_after_16_kib() -> None:
    async with serving(MemoryBackend()) as address:
        for _ in range(20):
            async with connected(address) as client:
                with contextlib.suppress(ConnectionError):
                    await client.send(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ", *([b"a" * 4_000] * 10))
                answer = await client.answer()
                assert answer.status == 431
                assert answer.error()


async def test_answers_that_are_not_read_stop_the_reading_and_end_the_connection() -> None:
    backend = CountingBackend()
    await backend.set("db", "large", "v" * LARGE, 60)
    async with server_of(backend, grace_seconds=0.4, min_bytes_per_second=1_000_000) as (server, address):
        async with connected(address) as client:
            with contextlib.suppress(ConnectionError):
                await client.send(head("GET", "/get/db/large") * 2_000)
                await asyncio.sleep(0)
            await until(lambda: backend.reads)
            assert server.service.admission.budget.held_bytes > 0
            await until(lambda: not server.service.admission.budget.held_bytes)
        assert backend.reads < 5


async def test_client_that_reads_at_the_least_rate_gets_everything() -> None:
    backend = MemoryBackend()
    await backend.set("db", "large", "v" * LARGE, 60)
    async with serving(backend, grace_seconds=0.2, min_bytes_per_second=100_000) as address:
        port = int(address.rpartition(":")[2])
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 1024)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, head("GET", "/get/db/large"))
        received = 0
        async with asyncio.timeout(15):
            while received < LARGE:
                piece = await loop.sock_recv(sock, 64 * 1024)
                assert piece, "the server gave up on a client that reads"
                received += len(piece)
                await asyncio.sleep(0.01)
        sock.close()


async def test_body_at_the_least_rate_may_take_longer_than_the_grace() -> None:
    backend = MemoryBackend()
    async with serving(backend, grace_seconds=0.2, min_bytes_per_second=10_000) as address, connected(address) as client:
        await client.send(head("PUT", "/set/db/key", "Content-Length: 20000"))
        for _ in range(10):
            await client.send(b"v" * 2_000)
            await asyncio.sleep(0.06)
        assert (await client.answer()).status == 200


@pytest.mark.parametrize("target", ["/livez", "/get/db/key", "/nope", "/storage/auth/token"])
async def test_body_of_what_is_no_set_is_thrown_away_and_bounded(target: str) -> None:
    async with server_of(MemoryBackend()) as (server, address):
        method = "POST" if "token" in target else "GET"
        async with connected(address) as client:
            answer = await client.ask(head(method, target, "Content-Length: 60000"), b"v" * 60_000)
            assert answer.status in {200, 404}
            assert (await client.ask(head("GET", "/livez"))).status == 200
        async with connected(address) as client:
            assert (await client.ask(head(method, target, "Content-Length: 500000000"))).status in {404, 413}
        async with connected(address) as client:
            refused = await client.ask(head(method, target, CHUNKED), chunk(b"v" * 70_000))
            assert refused.status in {404, 413}
        for connection in server._listener.connections:
            assert connection._body is None or not connection._body.body
        assert server.service.admission.budget.held_bytes == 0


async def test_token_requests_that_stand_still_take_no_room_from_others() -> None:
    async with (
        server_of(MemoryBackend(), max_bytes_in_flight=200_000) as (server, address),
        contextlib.AsyncExitStack() as stack,
    ):
        for _ in range(10):
            client = await stack.enter_async_context(connected(address))
            await client.send(head("POST", "/storage/auth/token", "Content-Length: 65536"), b"v" * 65_000)
        other = await stack.enter_async_context(connected(address))
        assert (await other.ask(head("POST", "/storage/auth/token", "Content-Length: 0"))).status == 200
        assert server.service.admission.budget.held_bytes == 0


async def test_body_that_stood_still_after_much_had_come_is_given_up_after_the_grace() -> None:
    async with serving(MemoryBackend(), grace_seconds=0.3, min_bytes_per_second=4_096) as address, connected(address) as client:
        await client.send(head("PUT", "/set/db/key", f"Content-Length: {LARGE}"), b"v" * (LARGE - 1))
        async with asyncio.timeout(5):
            assert (await client.answer()).status == 408


@pytest.mark.slow
async def test_client_that_drips_on_behind_its_refusal_is_cut_off() -> None:
    async with serving(MemoryBackend()) as address, connected(address) as client:
        answer = await client.ask(head("GET", "/nope", "Expect: 100-continue"))
        assert (answer.status, answer.headers["connection"]) == (404, "close")
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionError):
                while True:
                    await client.send(b"\r\n")
                    await asyncio.sleep(0.05)


async def test_head_has_its_whole_time_after_the_connection_stood_idle() -> None:
    bounds = {"head_timeout_seconds": 0.6, "idle_timeout_seconds": 5.0, "grace_seconds": 5.0}
    async with serving(MemoryBackend(), **bounds) as address, connected(address) as client:
        await asyncio.sleep(0.8)
        await client.send(b"GET /livez HTTP/1.1\r\n")
        await asyncio.sleep(0.2)
        assert (await client.ask(b"Host: localhost\r\n\r\n")).status == 200


async def test_quota_without_accounts_is_for_namespaces_with_a_colon_too() -> None:
    async with serving(MemoryBackend(), max_stored_entries=2) as address, connected(address) as client:
        for name in ("a:b", "c:d"):
            assert (await client.ask(put(f"/set/{name}/key", b"x"))).status == 200
        for name in ("a:b", "plain"):
            assert (await client.ask(put(f"/set/{name}/other", b"x"))).status == 507
        assert (await client.ask(put("/set/a:b/key", b"y"))).status == 200


async def test_large_bodies_wait_for_room_and_small_ones_do_not() -> None:
    backend = MemoryBackend()
    async with server_of(backend, max_bytes_in_flight=800_000) as (server, address), contextlib.AsyncExitStack() as stack:
        first, second, small = [await stack.enter_async_context(connected(address)) for _ in range(3)]
        await first.send(head("PUT", "/set/db/first", "Content-Length: 500000"))
        await until(lambda: server.service.admission.budget.held_bytes == 500_000)
        answer = await second.ask(head("PUT", "/set/db/second", "Content-Length: 500000"))
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.error()
        assert (await small.ask(put("/set/db/small", b"v" * 1_000))).status == 200
        await first.send(b"v" * 500_000)
        assert (await first.answer()).status == 200
        assert server.service.admission.budget.held_bytes == 0
        assert (await first.ask(put("/set/db/second", b"v" * 500_000))).status == 200


async def test_body_in_chunks_takes_its_room_as_it_comes_and_gives_it_back_when_its_client_leaves() -> None:
    async with server_of(MemoryBackend(), max_bytes_in_flight=800_000) as (server, address):
        async with connected(address) as client, connected(address) as other:
            await client.send(head("PUT", "/set/db/key", CHUNKED), chunk(b"v" * 590_000))
            await until(lambda: server.service.admission.budget.held_bytes == 590_000)
            refused = await other.ask(head("PUT", "/set/db/key", CHUNKED), chunk(b"v" * 100_000))
            assert refused.status == 503
        await until(lambda: server.service.admission.budget.held_bytes == 0)


def test_one_account_holds_at_most_half_and_the_others_find_room() -> None:
    budget = Budget(1_000_000, is_shared=True)
    assert budget.take("a", 400_000, is_large=True)
    assert not budget.take("a", 200_000, is_large=True)
    assert budget.take("b", 300_000, is_large=True)
    assert not budget.take("c", 100_000, is_large=True)
    assert budget.take("c", SMALL_BYTES, is_large=False)
    budget.give_back("a", 400_000)
    assert budget.take("c", 100_000, is_large=True)
    assert (budget.held_bytes, budget.held_by("a"), budget.held_by("c")) == (464_000 + 1_536, 0, 165_536)


def test_empty_bodies_take_and_give_back_nothing() -> None:
    budget = Budget(1_000_000, is_shared=True)
    for size_bytes in (0, 10, 0):
        assert budget.take("a", size_bytes, is_large=False)
    for size_bytes, left_bytes in ((0, 10), (10, 0), (0, 0)):
        budget.give_back("a", size_bytes)
        assert (budget.held_bytes, budget.held_by("a")) == (left_bytes, left_bytes)


async def test_client_whose_answer_cannot_be_given_is_cut_off_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The fault is logged by the loop, once its task is collected.
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    async with server_of(MemoryBackend()) as (server, address), connected(address) as client:

        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Answer, "write", fail)
        await client.send(head("PUT", "/set/db/key", "Content-Length: 1"), b"v")
        async with asyncio.timeout(10):
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await client.answer()
        assert server.service.admission.budget.held_bytes == 0


async def test_many_requests_in_one_piece_wait_in_little_room_and_are_all_answered() -> None:
    backend = SlowBackend()
    async with server_of(backend) as (server, address), connected(address) as client:
        sending = asyncio.create_task(client.send(head("GET", "/get/db/key") * 5_000))
        await backend.begun.wait()
        await asyncio.sleep(0.1)
        (connection,) = server._listener.connections
        assert len(connection._queue or ()) < 200
        assert len(connection._waiting or b"") <= 128 * 1024
        backend.let_go.set()
        for _ in range(5_000):
            assert (await client.answer()).status == 404
        await sending


async def test_client_that_sends_nothing_more_is_answered_all_that_it_asked_for() -> None:
    backend = SlowBackend()
    await backend.set("db", "key", "x", 60)
    async with serving(backend) as address:
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        client = Connection(reader, writer)
        await client.send(head("GET", "/get/db/key"), head("GET", "/livez"), head("GET", "/get/db/none"))
        writer.write_eof()
        await backend.begun.wait()
        await asyncio.sleep(0.02)
        backend.let_go.set()
        assert (await client.answer()).value() == "x"
        assert (await client.answer()).status == 200
        assert (await client.answer()).status == 404
        assert await client.rest() == b""
        writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /liv", head("PUT", "/set/db/key", "Content-Length: 9") + b"cut"])
async def test_client_that_leaves_in_the_middle_leaves_nothing(sent: bytes) -> None:
    backend = MemoryBackend()
    async with server_of(backend) as (server, address):
        async with connected(address) as client:
            await client.send(sent)
        await until(lambda: not server._listener.connections)
        assert server.service.admission.budget.held_bytes == 0
        assert server._listener._count_by_address == {}
    assert await backend.get("db", "key") is None


@pytest.mark.parametrize(
    "headers",
    [("Origin: https://evil.example",), ("Origin: null",), ("Sec-Fetch-Site: cross-site",), ("Origin: http://10.0.0.1",)],
)
async def test_web_page_of_elsewhere_is_refused_without_an_access_file(headers: tuple[str, ...]) -> None:
    backend = MemoryBackend()
    async with serving(backend) as address, connected(address) as client:
        for request in (head("GET", "/get/db/key", *headers), put("/set/db/key", b"x", *headers)):
            answer = await client.ask(request)
            assert answer.status == 403
            assert answer.error()
        for kind in ("http://localhost:3000", "http://127.0.0.1", "http://[::1]:8"):
            assert (await client.ask(head("GET", "/livez", f"Origin: {kind}", "Sec-Fetch-Site: same-origin"))).status == 200
    assert await backend.get("db", "key") is None


async def test_no_answer_may_be_taken_for_another_type_or_kept() -> None:
    async with serving(MemoryBackend()) as address, connected(address) as client:
        for request in (head("GET", "/livez"), head("GET", "/get/db/none"), head("GET", "/none"), put("/set/db/k", b"x")):
            headers = (await client.ask(request)).headers
            assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
            assert headers["date"].endswith(" GMT")


async def test_aiohttp_client_reads_a_refusal_of_a_body_that_it_is_still_sending() -> None:
    async with (
        serving(MemoryBackend(), max_bytes_in_flight=1_000_000) as address,
        aiohttp.ClientSession() as session,
        session.put(f"{address}/set/db/key?ttl=1", data=io.BytesIO(b"v" * LARGE)) as answer,
    ):
        assert answer.status == 400
        assert (await answer.json())["error"]


@pytest.mark.slow
async def test_256_large_sets_at_once_stay_under_400_mb(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "aiokv", "serve", "--port", "0", "--store", f"sqlite:///{tmp_path}/kv.db"],
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(tmp_path),
    )
    value = ("v" * (LARGE - 4) + "😀").encode()
    try:
        assert process.stderr is not None
        address = process.stderr.readline().split(" at ", 1)[1].split(",")[0].split()[0]

        async def send(number: int) -> int:
            async with connected(address) as client:
                try:
                    return (await client.ask(put(f"/set/db/key{number}", value))).status
                except (ConnectionError, asyncio.IncompleteReadError):
                    return 0

        statuses = await asyncio.gather(*(send(number) for number in range(256)))
        peak_kib = peak_memory_kib(process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=15)
    assert statuses.count(200) >= 10
    assert set(statuses) <= {200, 503, 0}
    assert peak_kib * 1024 < 400_000_000


def test_bound_of_connections_stays_below_the_files_that_may_be_open() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > 64

    async def bound() -> int:
        return Server(MemoryBackend())._listener.max_connections

    assert asyncio.run(bound()) <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64


async def test_log_of_refused_connections_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(MemoryBackend(), max_connections=1) as address, connected(address) as held:
        await held.ask(head("GET", "/livez"))
        for _ in range(20):
            async with connected(address) as client:
                await closed(client)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
