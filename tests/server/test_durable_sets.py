"""Sets over a file: answered once they are on the disk, in their turn, whoever has left meanwhile."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

from server_clients import connected, head, put, serving

from aiokv import StorageError, StorageFullError
from aiokv.backends.base import WouldWaitError
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.sqlite import SqliteBackend
from aiokv.server.options import ServerOptions
from aiokv.server.requests import Request
from aiokv.server.service import Service


@contextlib.asynccontextmanager
async def opened(path: Path) -> AsyncGenerator[SqliteBackend]:
    backend = SqliteBackend(path)
    await backend.get("db", "opens the file")
    try:
        yield backend
    finally:
        await backend.aclose()


class QueueBackend(MemoryBackend):
    """A backend whose sets are queued until the test ends them; its `set` is for those that must wait."""

    def __init__(self) -> None:
        super().__init__()
        self.queued: list[tuple[str, object]] = []
        self.refuses: Exception | None = None

    def set_soon(self, db_name: str, key: str, value: str, ttl_seconds: int, done: object) -> None:  # noqa: ARG002
        if self.refuses is not None:
            raise self.refuses
        self.queued.append((key, done))


async def wait_for_queued(backend: QueueBackend, count: int) -> None:
    async with asyncio.timeout(10):
        while len(backend.queued) < count:
            await asyncio.sleep(0.001)


async def test_answers_come_in_the_order_of_the_requests(tmp_path: Path) -> None:
    async with opened(tmp_path / "kv.db") as backend, serving(backend) as address, connected(address) as client:
        for number in range(50):
            await client.send(put("/set/db/k", f"{number}".encode()) + head("GET", "/get/db/k"))
        for number in range(50):
            assert (await client.answer()).status == 200
            assert (await client.answer()).value() == str(number)


async def test_set_is_answered_when_it_has_ended_and_not_before() -> None:
    backend = QueueBackend()
    async with serving(backend) as address, connected(address) as client:
        await client.send(put("/set/db/k", b"v") + head("GET", "/get/db/k"))
        await wait_for_queued(backend, 1)
        answer = asyncio.create_task(client.answer())
        await asyncio.sleep(0.05)
        assert not answer.done()
        backend.queued[0][1](None)  # type: ignore[operator]
        assert (await answer).status == 200
        assert (await client.answer()).status == 404


async def test_set_that_fails_is_answered_with_its_error() -> None:
    backend = QueueBackend()
    async with serving(backend) as address, connected(address) as client:
        for number, (error, status) in enumerate([(StorageFullError("full"), 507), (StorageError("broken"), 503)]):
            await client.send(put("/set/db/k", b"v"))
            await wait_for_queued(backend, number + 1)
            backend.queued[number][1](error)  # type: ignore[operator]
            assert (await client.answer()).status == status
        for refusal, status in ((StorageFullError("full"), 507), (ZeroDivisionError(), 500), (WouldWaitError(), 200)):
            backend.refuses = refusal
            assert (await client.ask(put("/set/db/k", b"v"))).status == status
    assert await backend.get("db", "k") == "v"


async def test_client_that_leaves_before_its_set_has_ended_holds_nothing() -> None:
    backend = QueueBackend()
    async with serving(backend, max_bytes_in_flight=1000) as address:
        for number in range(5):
            async with connected(address) as client:
                await client.send(put("/set/db/k", b"v" * 900))
                await wait_for_queued(backend, number + 1)
            backend.queued[number][1](None)  # type: ignore[operator]
        async with connected(address) as client:
            await client.send(put("/set/db/k", b"v" * 900))
            await wait_for_queued(backend, 6)
            backend.queued[5][1](None)  # type: ignore[operator]
            assert (await client.answer()).status == 200


async def test_empty_values_that_are_set_at_once_are_all_answered() -> None:
    backend = QueueBackend()
    async with serving(backend) as address, contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(address)) for _ in range(3)]
        # The same headers several times, so that the last ones are known.
        for value in (b"", b"", b"v"):
            before = len(backend.queued)
            for number, client in enumerate(clients):
                await client.send(put("/set/db/k", value if number == 0 else b""))
                await wait_for_queued(backend, before + number + 1)
            for _, done in backend.queued[before:]:
                done(None)  # type: ignore[operator]
            async with asyncio.timeout(10):
                assert [(await client.answer()).status for client in clients] == [200, 200, 200]


async def test_set_can_be_awaited_too() -> None:
    service = Service(MemoryBackend(), options=ServerOptions())
    request = Request(b"PUT", b"/set/db/k", {b"host": b"localhost", b"content-length": b"1"})
    assert service.admit(request, "") is None
    request.body, request.received_bytes = b"v", 1
    result = service.answer(request)
    assert asyncio.iscoroutine(result)
    assert (await result).status == 200
    service.admission.release(request)
    assert service.admission.budget.held_bytes == 0
