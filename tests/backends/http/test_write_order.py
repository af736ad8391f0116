"""Writes of one key go one after the other, so that the last one wins also where the first one is slow."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import pytest
from aiohttp import web
from helpers import no_wait
from yarl import URL

from aiokv import AsyncKVStore
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.retry import RetryPolicy
from aiokv.errors import CallTimeoutError, UnavailableError
from aiokv.testing import ScriptedService


class SlowService:
    """Stores what it gets when its gate lets it, so that what came first may be stored last."""

    def __init__(self) -> None:
        self.gates: list[asyncio.Event] = []
        self.stored: list[str] = []
        self.status = 200

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        body = (await request.text()) if request.method != "DELETE" else "deleted"
        gate = asyncio.Event()
        self.gates.append(gate)
        await gate.wait()
        self.stored.append(body)
        return web.json_response({"status": "ok"}, status=self.status)


@contextlib.asynccontextmanager
async def slow_service(policy: RetryPolicy | None = None) -> AsyncGenerator[tuple[SlowService, RemoteBackend, ScriptedService]]:
    service = SlowService()
    async with ScriptedService(handler=service) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url), policy=policy, sleep=no_wait)
        try:
            yield service, backend, recorded
        finally:
            for gate in service.gates:
                gate.set()
            await backend.aclose()


async def settle(service: SlowService, requests: int) -> None:
    """Wait until that many have come, and as many more as would come if they were let."""
    async with asyncio.timeout(10):
        while len(service.gates) < requests:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.03)


async def test_second_write_of_a_key_is_sent_once_the_first_is_through() -> None:
    async with slow_service() as (service, backend, _):
        writes = [asyncio.create_task(backend.set("db", "k", value, 60)) for value in ("first", "second")]
        writes.append(asyncio.create_task(backend.delete("db", "k")))
        for sent in (1, 2, 3):
            await settle(service, sent)
            assert len(service.gates) == sent, "a write overtook another"
            service.gates[-1].set()
        await asyncio.gather(*writes)
        assert service.stored == ["first", "second", "deleted"]
        assert not backend._last_writes


async def test_writes_of_other_keys_and_namespaces_do_not_wait() -> None:
    async with slow_service() as (service, backend, _):
        places = [("db", "a"), ("db", "b"), ("other", "a")]
        writes = [asyncio.create_task(backend.set(db, key, "v", 60)) for db, key in places]
        await settle(service, 3)
        for gate in service.gates:
            gate.set()
        await asyncio.gather(*writes)


async def test_write_goes_on_where_the_one_before_it_failed() -> None:
    async with slow_service(RetryPolicy.none()) as (service, backend, _):
        service.status = 503
        first = asyncio.create_task(backend.set("db", "k", "first", 60))
        second = asyncio.create_task(backend.set("db", "k", "second", 60))
        await settle(service, 1)
        service.gates[0].set()
        with pytest.raises(UnavailableError):
            await first
        await settle(service, 2)
        service.status = 200
        service.gates[1].set()
        await second


async def test_cancelled_wait_lets_nobody_overtake_the_write_that_is_under_way() -> None:
    async with slow_service() as (service, backend, _):
        first = asyncio.create_task(backend.set("db", "k", "first", 60))
        await settle(service, 1)
        second = asyncio.create_task(backend.set("db", "k", "second", 60))
        third = asyncio.create_task(backend.set("db", "k", "third", 60))
        await asyncio.sleep(0.01)
        second.cancel()
        await settle(service, 1)
        fourth = asyncio.create_task(backend.set("db", "k", "fourth", 60))
        fourth_too = asyncio.create_task(backend.set("db", "k", "never", 60))
        await asyncio.sleep(0.01)
        fourth_too.cancel()
        await settle(service, 1)
        assert len(service.gates) == 1, "a write overtook the first one"
        for sent in (1, 2, 3):
            await settle(service, sent)
            service.gates[-1].set()
        await asyncio.gather(first, third, fourth)
        assert service.stored == ["first", "third", "fourth"]
        assert not backend._last_writes


async def test_write_that_waits_past_its_time_says_that_nothing_was_sent() -> None:
    async with slow_service() as (service, backend, recorded):
        first = asyncio.create_task(backend.set("db", "k", "first", 60))
        await settle(service, 1)
        hasty = backend.with_options(RetryPolicy(total_timeout=0.05), None)
        with pytest.raises(CallTimeoutError, match="an earlier write of this key") as caught:
            await hasty.set("db", "k", "second", 60)
        error = caught.value
        assert (error.maybe_applied, error.verb, error.db_name, error.key) == (False, "set", "db", "k")
        assert error.elapsed is not None
        assert len(recorded.requests) == 1
        service.gates[0].set()
        await first


async def test_stores_of_one_configuration_keep_one_order() -> None:
    service = SlowService()
    async with (
        ScriptedService(handler=service) as scripted,
        AsyncKVStore("db", url=scripted.url) as one,
        AsyncKVStore("db", url=scripted.url, retry=RetryPolicy(attempts=2)) as two,
    ):
        first = asyncio.create_task(one.set("k", "first"))
        await settle(service, 1)
        second = asyncio.create_task(two.set("k", "second"))
        third = asyncio.create_task(one.with_options(timeout=20).set("k", "third"))
        for sent in (1, 2, 3):
            await settle(service, sent)
            assert len(service.gates) == sent
            service.gates[-1].set()
        await asyncio.gather(first, second, third)
    assert service.stored == ["first", "second", "third"]


async def test_writes_that_give_up_in_their_order_leave_no_entry_behind() -> None:
    gate = asyncio.Event()

    async def hold(_request: web.BaseRequest) -> web.StreamResponse:
        await gate.wait()
        return web.json_response({"status": "ok"})

    async with ScriptedService(handler=hold) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url))
        first, second, third = (asyncio.create_task(backend.set("db", "k", text, 60)) for text in "abc")
        while not recorded.requests:
            await asyncio.sleep(0.001)
        for waiting in (second, third):
            waiting.cancel()
            await asyncio.wait([waiting])
        gate.set()
        await first
        await asyncio.sleep(0.01)
        await backend.aclose()
    assert backend._last_writes == {}


async def test_newcomer_waits_though_the_last_waiter_gave_up() -> None:
    async with slow_service() as (service, backend, _):
        first = asyncio.create_task(backend.set("db", "k", "first", 60))
        await settle(service, 1)
        second = asyncio.create_task(backend.set("db", "k", "second", 60))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.wait([second])
        third = asyncio.create_task(backend.set("db", "k", "third", 60))
        await settle(service, 1)
        assert len(service.gates) == 1, "a write overtook the first one"
        service.gates[0].set()
        await settle(service, 2)
        service.gates[1].set()
        await asyncio.gather(first, third)
        assert service.stored == ["first", "third"]
