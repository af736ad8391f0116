"""Transparent batching: gets of one turn of the loop travel together, and stay apart in all that their callers see."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from aiohttp import web
from extension_service import ExtensionService, connected
from helpers import no_wait
from yarl import URL

from aiokv import AsyncKVStore
from aiokv.backends.base import is_patient
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.hedge import HedgePolicy
from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.memory import MemoryBackend
from aiokv.batch_wire import Fault
from aiokv.errors import (
    CallError,
    CallTimeoutError,
    CredentialsError,
    ResponseError,
    StoreClosedError,
    UnavailableError,
)
from aiokv.server import running_server
from aiokv.testing import FaultProxy, ResetAfter, ScriptedService
from aiokv.wire import TOKEN_PATH, error_body

KEYS = [f"k{number}" for number in range(64)]


async def fill(service: ExtensionService, keys: list[str] = KEYS) -> None:
    for key in keys:
        await service.backend.set("db", key, f"value of {key}", 60)


def together(backend: RemoteBackend, keys: list[str], db_name: str = "db") -> list["asyncio.Task[str | None]"]:
    return [asyncio.create_task(backend.get(db_name, key)) for key in keys]


class Gate:
    """Holds batches back until a test opens it."""

    def __init__(self, service: ExtensionService) -> None:
        self.service = service
        self.opened = asyncio.Event()
        self.held = 0
        self.cut = 0

    async def __call__(self, request: web.BaseRequest) -> None:
        if request.method == "POST":
            self.held += 1
            try:
                await self.opened.wait()
            except asyncio.CancelledError:
                self.cut += 1
                raise

    async def wait_for(self, count: int = 1) -> None:
        async with asyncio.timeout(10):
            while self.held < count:
                await asyncio.sleep(0.001)


async def test_gets_of_one_turn_travel_as_one_request_beside_the_first() -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        assert await asyncio.gather(*together(backend, KEYS)) == [f"value of {key}" for key in KEYS]
        assert sorted(service.asked) == ["GET get", "POST batch"]
        assert await asyncio.gather(*together(backend, ["absent", "k1", "gone"])) == [None, "value of k1", None]


async def test_gets_one_after_the_other_are_plain_and_wait_for_no_turn() -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        for key in KEYS[:5]:
            assert await backend.get("db", key) == f"value of {key}"
    assert service.asked == ["GET get"] * 5


async def test_get_that_finds_another_under_way_but_none_in_its_turn_is_plain() -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        first = asyncio.create_task(backend.get("db", "k0"))
        await asyncio.sleep(0)
        second = asyncio.create_task(backend.get("db", "k1"))
        assert await asyncio.gather(first, second) == ["value of k0", "value of k1"]
    assert service.asked == ["GET get"] * 2


async def test_workers_in_a_closed_loop_go_on_travelling_together() -> None:
    service = ExtensionService()
    await fill(service)

    async def work(backend: RemoteBackend) -> None:
        for key in KEYS[:20]:
            assert await backend.get("db", key) == f"value of {key}"

    async with connected(service) as backend:
        await asyncio.gather(*(work(backend) for _ in range(30)))
    assert len(service.asked) < 30 * 20 / 4


async def test_equal_keys_of_one_turn_are_asked_once() -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        values = await asyncio.gather(*together(backend, ["k0", *["k1"] * 10, *["k2"] * 10]))
        assert values == ["value of k0", *["value of k1"] * 10, *["value of k2"] * 10]
    assert b'{"get":["k1","k2"]}' in service.bodies or b'{"get":["k2","k1"]}' in service.bodies


async def test_namespaces_travel_apart() -> None:
    service = ExtensionService()
    await service.backend.set("db", "k", "of db", 60)
    await service.backend.set("other", "k", "of other", 60)
    async with connected(service) as backend:
        tasks = [task for _ in range(3) for db_name in ("db", "other") for task in together(backend, ["k", "x"], db_name)]
        values = await asyncio.gather(*tasks)
    assert values == ["of db", None, "of other", None] * 3


async def test_impatient_gets_travel_apart_from_patient_ones() -> None:
    service = ExtensionService()

    async def impatient(backend: RemoteBackend, key: str) -> str | None:
        is_patient.set(False)
        return await backend.get("db", key)

    async with connected(service) as backend:
        first = together(backend, ["k0"])
        mixed = [*together(backend, KEYS[1:4]), *(asyncio.create_task(impatient(backend, key)) for key in KEYS[4:8])]
        await asyncio.gather(*first, *mixed)
    assert sorted(service.asked) == ["GET get", "POST batch", "POST batch"]


async def test_batching_can_be_switched_off() -> None:
    service = ExtensionService()
    async with connected(service, options=HttpOptions(batching=False)) as backend:
        await asyncio.gather(*together(backend, KEYS))
    assert service.asked == ["GET get"] * 64


async def test_server_without_batches_gets_plain_requests() -> None:
    service = ExtensionService(extensions="scan")
    async with connected(service) as backend:
        await asyncio.gather(*together(backend, KEYS))
    assert service.asked == ["GET get"] * 64


async def test_more_gets_than_a_batch_holds_travel_as_several() -> None:
    store = MemoryBackend()
    async with running_server(store) as address, FaultProxy(address) as proxy:
        backend = RemoteBackend(URL(proxy.url))
        keys = [f"k{n}" for n in range(2_500)]
        for key in keys:
            await store.set("db", key, key, 60)
        await backend.get("db", "learn")
        assert await asyncio.gather(*together(backend, keys)) == keys
        assert [request.method for request in proxy.requests].count("POST") == 3
        await backend.aclose()


async def test_values_that_do_not_fit_one_answer_come_with_the_next() -> None:
    store = MemoryBackend()
    async with running_server(store) as address:
        backend = RemoteBackend(URL(address))
        keys = KEYS[:12]
        for key in keys:
            await store.set("db", key, key * 900_000 if len(key) == 2 else key, 60)
        await backend.get("db", "learn")
        values = await asyncio.gather(*together(backend, keys))
        assert values == [key * 900_000 if len(key) == 2 else key for key in keys]
        await backend.aclose()


async def test_cancelled_get_leaves_the_others_alone() -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        gate = service.override = Gate(service)
        tasks = together(backend, KEYS[:10])
        await gate.wait_for()
        for task in tasks[1:4]:
            task.cancel()
        await asyncio.wait(tasks[1:4])
        assert all(task.cancelled() for task in tasks[1:4])
        gate.opened.set()
        assert await asyncio.gather(*tasks[4:]) == [f"value of {key}" for key in KEYS[4:10]]


async def test_request_of_gets_that_are_all_cancelled_is_cancelled() -> None:
    service = ExtensionService()
    async with connected(service, options=HttpOptions(pool_size=2)) as backend:
        gate = service.override = Gate(service)
        tasks = together(backend, KEYS[:10])
        await gate.wait_for()
        for task in tasks[1:]:
            task.cancel()
        await asyncio.wait(tasks)
        async with asyncio.timeout(10):
            while backend._running_groups:
                await asyncio.sleep(0.001)
        assert backend._transport._slots._value == 2


@pytest.mark.parametrize("cancelled", ["leader", "follower", "all"])
async def test_get_cancelled_before_its_batch_is_sent_is_not_asked_for(cancelled: str) -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        first, *tasks = together(backend, KEYS[:6])
        await asyncio.sleep(0)
        # The first is under way; the second waits for the end of the turn, which is now; the others have joined it.
        leaving = {"leader": tasks[:1], "follower": tasks[1:2], "all": tasks}[cancelled]
        for task in leaving:
            task.cancel()
        staying = [task for task in tasks if task not in leaving]
        outcomes = await asyncio.gather(first, *staying)
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in leaving)
        assert len(outcomes) == 1 + len(staying)
        assert None not in outcomes
        assert await asyncio.gather(*together(backend, KEYS[:4])) == [f"value of {key}" for key in KEYS[:4]]
        assert not backend._running_groups
    asked = b"".join(service.bodies[: 1 + bool(staying)])
    if cancelled == "follower":
        assert b'"k2"' not in asked


async def test_gets_with_timeouts_of_their_own_end_at_their_own_time() -> None:
    service = ExtensionService()
    await fill(service)

    async def hasty(work: Coroutine[Any, Any, str | None]) -> str | None:
        async with asyncio.timeout(0.05):
            return await work

    async with connected(service) as backend:
        gate = service.override = Gate(service)
        patient = together(backend, KEYS[:5])
        impatient = [asyncio.create_task(hasty(backend.get("db", key))) for key in KEYS[5:8]]
        done, _ = await asyncio.wait(impatient)
        assert all(isinstance(task.exception(), TimeoutError) for task in done)
        gate.opened.set()
        assert await asyncio.gather(*patient) == [f"value of {key}" for key in KEYS[:5]]


async def test_views_with_other_deadlines_travel_apart() -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        gate = service.override = Gate(service)
        hasty = backend.with_options(RetryPolicy(total_timeout=0.1), None)
        patient = together(backend, KEYS[:5])
        outcomes = await asyncio.gather(*together(hasty, KEYS[5:10]), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes[1:]] == [CallTimeoutError] * 4
        gate.opened.set()
        assert await asyncio.gather(*patient) == [f"value of {key}" for key in KEYS[:5]]


async def test_batch_that_fails_gives_each_get_an_error_of_its_own() -> None:
    service = ExtensionService()

    async def fail(request: web.BaseRequest) -> web.Response | None:
        return service.respond(503, error_body("down")) if request.method == "POST" else None

    async with connected(service, policy=RetryPolicy(attempts=2)) as backend:
        service.override = fail
        outcomes = await asyncio.gather(*together(backend, ["k0", "k1", "k2", "k2"]), return_exceptions=True)
        errors = [outcome for outcome in outcomes if isinstance(outcome, UnavailableError)]
        assert [(error.verb, error.db_name, error.key) for error in errors] == [("get", "db", f"k{n}") for n in (1, 2, 2)]
        assert len({id(error) for error in errors}) == 3
        assert all((error.attempts, error.status, error.maybe_applied) == (2, 503, False) for error in errors)
        assert all(error.elapsed is not None and error.host for error in errors)
    assert service.asked.count("POST batch") == 2


async def test_error_of_one_key_is_that_of_its_get() -> None:
    service = ExtensionService()
    await fill(service)
    service.faults = {"k3": Fault(500, "its value is damaged")}
    async with connected(service, policy=RetryPolicy.none()) as backend:
        outcomes = await asyncio.gather(*together(backend, KEYS[:6]), return_exceptions=True)
        assert isinstance(outcomes[3], UnavailableError)
        assert (outcomes[3].key, outcomes[3].verb, outcomes[3].attempts) == ("k3", "get", 1)
        assert [outcomes[n] for n in (0, 1, 2, 4, 5)] == [f"value of k{n}" for n in (0, 1, 2, 4, 5)]


@pytest.mark.parametrize("status", [413, 501, 404])
async def test_batch_that_is_refused_as_such_becomes_plain_gets(status: int) -> None:
    service = ExtensionService()
    await fill(service)

    async def refuse(request: web.BaseRequest) -> web.Response | None:
        return service.respond(status, error_body("no")) if request.method == "POST" else None

    async with connected(service) as backend:
        service.override = refuse
        assert await asyncio.gather(*together(backend, KEYS[:10])) == [f"value of {key}" for key in KEYS[:10]]
    assert sorted(service.asked) == [*["GET get"] * 10, "POST batch"]


async def test_answer_that_lies_fails_the_gets_and_gives_no_get_the_value_of_another() -> None:
    service = ExtensionService()

    async def lie(request: web.BaseRequest) -> web.Response | None:
        return service.respond(200, b'{"values":["v"]}') if request.method == "POST" else None

    async with connected(service) as backend:
        service.override = lie
        outcomes = await asyncio.gather(*together(backend, KEYS[:5]), return_exceptions=True)
        assert outcomes[0] is None
        assert [type(outcome) for outcome in outcomes[1:]] == [ResponseError] * 4


async def test_connection_reset_in_the_middle_of_a_batch_costs_no_get() -> None:
    service = ExtensionService()
    await fill(service)
    async with ScriptedService(handler=service.answer) as scripted, FaultProxy(scripted.url) as proxy:
        backend = RemoteBackend(URL(proxy.url), sleep=no_wait)
        await backend.get("db", "learn")
        proxy.faults = [ResetAfter(), ResetAfter()]
        assert await asyncio.gather(*together(backend, KEYS)) == [f"value of {key}" for key in KEYS]
        await backend.aclose()


async def test_store_closed_while_a_batch_is_under_way_says_so_to_each_get() -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        gate = service.override = Gate(service)
        tasks = together(backend, KEYS[:5])
        await gate.wait_for()
        await backend.aclose()
        outcomes = await asyncio.gather(*tasks[1:], return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StoreClosedError] * 4
        assert [outcome.key for outcome in outcomes if isinstance(outcome, CallError)] == KEYS[1:5]


async def test_credentials_that_are_gone_fail_each_get() -> None:
    class Gone:
        def __init__(self) -> None:
            self.is_gone = False

        async def authorization(self) -> str:
            if self.is_gone:
                raise CredentialsError("the vault is locked")
            return "Key id:secret"

    service, vault = ExtensionService(), Gone()

    async def check(request: web.BaseRequest) -> web.Response | None:
        if request.path == TOKEN_PATH:
            return web.json_response({"token": "t", "token_type": "Bearer", "expires_at": "2100-01-01T00:00:00Z"})
        return service.respond(401, b"{}") if vault.is_gone else None

    service.override = check
    async with ScriptedService(handler=service.answer) as scripted:
        backend = RemoteBackend(URL(scripted.url), credentials=vault, sleep=no_wait)
        await backend.get("db", "learn")
        vault.is_gone = True
        outcomes = await asyncio.gather(*together(backend, KEYS[:4]), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [CredentialsError] * 4
        assert len({id(outcome) for outcome in outcomes}) == 4
        await backend.aclose()


async def test_batch_is_hedged_like_a_get() -> None:
    service = ExtensionService()
    await fill(service)
    async with connected(service) as backend:
        hedged = backend.with_options(RetryPolicy.none(), HedgePolicy(quantile=0.5, max_extra=1.0, min_wait=0.02))
        for _ in range(25):
            await hedged.get("db", "k0")
        service.asked.clear()
        hangs = asyncio.Event()

        async def hang_once(request: web.BaseRequest) -> None:
            if request.method == "POST" and service.asked.count("POST batch") == 1:
                await hangs.wait()

        service.override = hang_once
        assert await asyncio.gather(*together(hedged, KEYS[:5])) == [f"value of {key}" for key in KEYS[:5]]
        hangs.set()
    assert service.asked.count("POST batch") == 2


async def test_gets_that_are_cancelled_at_any_moment_disturb_no_other() -> None:
    store = MemoryBackend()
    draw = random.Random(7)
    async with running_server(store) as address:
        backend = RemoteBackend(URL(address))
        for key in KEYS:
            await store.set("db", key, f"value of {key}", 60)
        await backend.get("db", "learn")

        async def work() -> None:
            for _ in range(60):
                key = draw.choice(KEYS)
                task = asyncio.create_task(backend.get("db", key))
                for _ in range(draw.randrange(12)):
                    await asyncio.sleep(0)
                if draw.random() < 0.4:
                    task.cancel()
                await asyncio.wait([task])
                assert task.cancelled() or task.result() == f"value of {key}"

        await asyncio.gather(*(work() for _ in range(20)))
        assert backend._groups.under_way == 0
        assert not backend._groups._open
        async with asyncio.timeout(10):
            while backend._running_groups:
                await asyncio.sleep(0.001)
        await backend.aclose()


async def test_gets_of_a_store_travel_together_by_default() -> None:
    memory = MemoryBackend()
    async with running_server(memory) as address, FaultProxy(address) as proxy:
        async with AsyncKVStore("db", url=proxy.url) as store:
            await store.set("k1", "one")
            proxy.requests.clear()
            assert await asyncio.gather(*(store.get(key) for key in KEYS[:30])) == [None, "one", *[None] * 28]
        assert sorted(request.method for request in proxy.requests) == ["GET", "POST"]


@pytest.mark.parametrize("turns", range(6))
async def test_gets_of_a_store_that_is_closed_before_their_batch_began_end(turns: int) -> None:
    service = ExtensionService()
    async with connected(service) as backend:
        await fill(service)
        tasks = together(backend, KEYS[:5])
        for _ in range(turns):
            await asyncio.sleep(0)
        await backend.aclose()
        _, waiting = await asyncio.wait(tasks, timeout=10)
        assert not waiting
        assert {type(task.exception()) for task in tasks} <= {StoreClosedError, type(None)}
        assert backend._running_groups == set()
