"""A read that is late is sent a second time, within a budget; nothing else is."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from helpers import no_wait
from yarl import URL

from aiokv import AsyncKVStore, CallHedged, Event, HedgePolicy
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.hedge import Hedger
from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.errors import CallTimeoutError, UnavailableError
from aiokv.testing import ScriptedService
from aiokv.wire import TOKEN_PATH

# Late after 50 ms, and never short of budget.
EAGER = HedgePolicy(quantile=0.5, max_extra=1.0, min_wait=0.05)

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def value(text: str = "v", status: int = 200) -> web.Response:
    return web.json_response({"value": text}, status=status)


class Scripted:
    """Answers at once until told otherwise, then takes one step a request, then answers at once again."""

    def __init__(self) -> None:
        self.steps: list[Answer] = []
        self.left = 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self.steps.pop(0)(request) if self.steps else value()

    async def stall(self, request: web.BaseRequest) -> web.StreamResponse:
        transport = request.transport
        while transport is not None and not transport.is_closing():
            await asyncio.sleep(0.002)
        self.left += 1
        return value("too late")


async def slow(_request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.sleep(0.2)
    return value("slow")


async def quick(_request: web.BaseRequest) -> web.StreamResponse:
    return value("quick")


async def broken(_request: web.BaseRequest) -> web.StreamResponse:
    return value("", 503)


async def broken_slowly(_request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.sleep(0.2)
    return value("", 503)


@contextlib.asynccontextmanager
async def hedged(
    policy: HedgePolicy = EAGER, retry: RetryPolicy | None = None, pool_size: int = 100
) -> AsyncGenerator[tuple[Scripted, RemoteBackend, ScriptedService]]:
    """Run a service whose usual time is known already."""
    service = Scripted()
    async with ScriptedService(handler=service) as recorded:
        url = recorded.url
        plain = RemoteBackend(URL(url), options=HttpOptions(pool_size=pool_size), sleep=no_wait)
        backend = plain.with_options(retry or RetryPolicy.none(), policy)
        for _ in range(20):
            await backend.get("db", "warm")
        recorded.requests.clear()
        try:
            yield service, backend, recorded
        finally:
            await plain.aclose()


async def test_stalled_read_is_answered_by_the_second_request_and_the_first_is_given_up() -> None:
    async with hedged() as (service, backend, recorded):
        service.steps = [service.stall, quick]
        assert await backend.get("db", "k") == "quick"
        assert len(recorded.requests) == 2
        async with asyncio.timeout(10):
            while not service.left:
                await asyncio.sleep(0.002)
        assert await backend.get("db", "k") == "v"


async def test_first_answer_wins_where_the_second_is_slower() -> None:
    async with hedged() as (service, backend, recorded):
        service.steps = [slow, service.stall]
        assert await backend.get("db", "k") == "slow"
        assert len(recorded.requests) == 2


async def test_read_in_time_is_sent_once() -> None:
    async with hedged(HedgePolicy(quantile=0.5, max_extra=1.0, min_wait=5.0)) as (service, backend, recorded):
        service.steps = [slow]
        assert await backend.get("db", "k") == "slow"
        assert len(recorded.requests) == 1


@pytest.mark.parametrize("verb", ["set", "delete"])
async def test_writes_are_never_sent_twice(verb: str) -> None:
    async with hedged() as (service, backend, recorded):
        service.steps = [slow]
        await (backend.set("db", "k", "v", 60) if verb == "set" else backend.delete("db", "k"))
        assert len(recorded.requests) == 1


async def test_failure_of_the_second_request_waits_for_the_first() -> None:
    async with hedged() as (service, backend, _):
        service.steps = [slow, broken]
        assert await backend.get("db", "k") == "slow"


async def test_failure_of_the_first_request_waits_for_the_second() -> None:
    async with hedged() as (service, backend, _):
        service.steps = [broken_slowly, slow]
        assert await backend.get("db", "k") == "slow"


async def test_failure_of_both_is_one_failed_attempt_that_is_retried() -> None:
    async with hedged(retry=RetryPolicy(attempts=2)) as (service, backend, recorded):
        service.steps = [broken_slowly, broken, quick]
        assert await backend.get("db", "k") == "quick"
        assert len(recorded.requests) == 3


async def test_failure_before_it_is_late_is_not_hedged() -> None:
    async with hedged() as (service, backend, recorded):
        service.steps = [broken]
        with pytest.raises(UnavailableError):
            await backend.get("db", "k")
        assert len(recorded.requests) == 1


async def test_no_second_request_where_no_connection_is_free() -> None:
    async with hedged(pool_size=1) as (service, backend, recorded):
        service.steps = [slow]
        assert await backend.get("db", "k") == "slow"
        assert len(recorded.requests) == 1


async def test_both_stalled_fail_within_the_time_of_an_attempt() -> None:
    async with hedged(retry=RetryPolicy(attempts=1, attempt_timeout=0.2)) as (service, backend, _):
        service.steps = [service.stall, service.stall]
        with pytest.raises(CallTimeoutError):
            await backend.get("db", "k")


async def test_cancelled_read_gives_both_requests_up() -> None:
    async with hedged() as (service, backend, recorded):
        service.steps = [service.stall, service.stall]
        task = asyncio.create_task(backend.get("db", "k"))
        async with asyncio.timeout(10):
            while len(recorded.requests) < 2:
                await asyncio.sleep(0.002)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while service.left < 2:
                await asyncio.sleep(0.002)
        assert not [task for task in asyncio.all_tasks() if "aiokv" in task.get_name()]


@pytest.mark.parametrize("cancelled", [False, True], ids=["answered", "cancelled"])
async def test_loser_that_fails_in_the_moment_of_the_answer_is_not_reported_as_unseen(*, cancelled: bool) -> None:
    hedger = Hedger(HedgePolicy(quantile=0.5, max_extra=1.0, min_wait=0.0))
    await no_answer_is_late(hedger, 20)
    hedger.wait_seconds = 0.0
    answers: list[asyncio.Future[str]] = []
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    async def send() -> str:
        answers.append(asyncio.get_running_loop().create_future())
        return await answers[-1]

    read = asyncio.create_task(hedger.first_of(send, is_good=lambda _: True, may_hedge=lambda: True))
    while len(answers) < 2:
        await asyncio.sleep(0)
    answers[1].set_exception(UnavailableError("no"))
    if cancelled:
        answers[0].set_exception(UnavailableError("no"))
        await asyncio.sleep(0)
        read.cancel()
        with pytest.raises((asyncio.CancelledError, UnavailableError)):
            await read
    else:
        answers[0].set_result("v")
        assert await read == "v"
    del read
    answers.clear()
    await asyncio.sleep(0.01)
    gc.collect()
    assert reported == []


async def no_answer_is_late(hedger: Hedger, count: int) -> None:
    async def send() -> str:
        return "v"

    for _ in range(count):
        await hedger.first_of(send, is_good=lambda _: True, may_hedge=lambda: True)


async def test_nothing_is_hedged_before_it_is_known_how_long_answers_take() -> None:
    hedger = Hedger(HedgePolicy())
    await no_answer_is_late(hedger, 19)
    assert hedger.wait_seconds is None
    await no_answer_is_late(hedger, 1)
    assert hedger.wait_seconds is not None


@pytest.mark.parametrize("max_extra", [0.05, 0.2])
async def test_budget_bounds_second_requests_though_every_answer_is_late(max_extra: float) -> None:
    hedger = Hedger(HedgePolicy(max_extra=max_extra, min_wait=0.0))
    await no_answer_is_late(hedger, 20)
    sends = 0

    async def send() -> str:
        nonlocal sends
        sends += 1
        # Late by any measure, without the time for it.
        for _ in range(10):
            await asyncio.sleep(0)
        return "v"

    hedger.wait_seconds = 0.0
    for _ in range(400):
        hedger.wait_seconds = 0.0
        await hedger.first_of(send, is_good=lambda _: True, may_hedge=lambda: True)
    assert 0 < sends - 400 <= max_extra * 420


async def test_wait_is_the_quantile_of_recent_answers_and_follows_them() -> None:
    loop = asyncio.get_running_loop()
    now = loop.time()
    hedger = Hedger(HedgePolicy())
    hedger._loop = clock = FakeLoop(now)  # type: ignore[assignment]

    async def take(seconds: float) -> None:
        async def send() -> str:
            clock.now += seconds
            return "v"

        await hedger.first_of(send, is_good=lambda _: True, may_hedge=lambda: False)

    for _ in range(10):
        for tenths in range(1, 101):
            await take(tenths / 10)
    assert hedger.wait_seconds == pytest.approx(9.6, abs=0.1)
    for _ in range(1000):
        await take(1.0)
    assert hedger.wait_seconds == pytest.approx(1.0)


class FakeLoop:
    """Time that moves only when a test says so."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


@pytest.mark.parametrize(
    "options",
    [{"quantile": 0}, {"quantile": 1}, {"max_extra": 0}, {"max_extra": 1.1}, {"min_wait": -1}, {"min_wait": float("nan")}],
)
def test_policy_that_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=name):
        HedgePolicy(**options)


@pytest.mark.parametrize("hedge", [1, "yes", None, 0.95])
def test_hedge_of_another_type_is_refused(hedge: Any) -> None:
    with pytest.raises(TypeError, match="hedge"):
        AsyncKVStore("db", url="memory://", hedge=hedge)


async def test_store_hedges_where_it_was_asked_to_and_not_elsewhere() -> None:
    service = Scripted()
    async with ScriptedService(handler=service) as recorded, AsyncKVStore("db", url=recorded.url, hedge=EAGER) as store:
        for _ in range(20):
            await store.get("warm")
        recorded.requests.clear()
        service.steps = [service.stall, quick]
        assert await store.get("k") == "quick"
        assert len(recorded.requests) == 2
        service.steps = [slow]
        assert await store.with_options(hedge=False).get("k") == "slow"
        assert len(recorded.requests) == 3


async def test_read_that_waits_for_a_token_is_not_hedged() -> None:
    held, calls = asyncio.Event(), 0

    async def serve(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal calls
        if request.raw_path == TOKEN_PATH:
            if calls:
                await held.wait()
            token = {"token": "t", "token_type": "Bearer", "expires_at": "2100-01-01T00:00:00Z"}
            return web.json_response(token)
        calls += 1
        return web.json_response({"value": "v"})

    async with ScriptedService(handler=serve) as recorded:
        url = recorded.url
        plain = RemoteBackend(URL(url), credentials="id:secret")
        backend = plain.with_options(RetryPolicy(), HedgePolicy(quantile=0.5, max_extra=1.0, min_wait=0.2))
        for _ in range(20):
            await backend.get("db", "warm")
        assert plain._tokens is not None
        # The token's life is over.
        plain._tokens._renew_at = plain._tokens._expires_at = 0.0
        recorded.requests.clear()
        reads = [asyncio.create_task(backend.get("db", f"k{number}")) for number in range(10)]
        await asyncio.sleep(0.4)
        held.set()
        await asyncio.gather(*reads)
        await plain.aclose()
    assert len([path for path in recorded.paths if path != TOKEN_PATH]) == 10


async def test_no_second_request_waits_for_a_connection() -> None:
    events: list[Event] = []
    service = Scripted()
    options = HttpOptions(pool_size=1)
    async with (
        ScriptedService(handler=service) as scripted,
        AsyncKVStore("db", url=scripted.url, http=options, hedge=EAGER, observer=events.append) as store,
    ):
        for _ in range(20):
            await store.get("warm")
        service.steps = [slow]
        assert await store.get("k") == "slow"
    assert not [event for event in events if isinstance(event, CallHedged)]


async def test_views_of_one_backend_share_what_is_known_and_the_budget() -> None:
    service = Scripted()
    async with ScriptedService(handler=service) as recorded, AsyncKVStore("db", url=recorded.url, hedge=EAGER) as store:
        for number in range(20):
            await store.with_options(timeout=5 + number).get("warm")
        recorded.requests.clear()
        service.steps = [service.stall, quick]
        assert await store.with_options(timeout=9).get("k") == "quick"
        assert len(recorded.requests) == 2


async def test_budget_saved_up_is_bounded() -> None:
    hedger = Hedger(HedgePolicy(max_extra=1.0))
    await no_answer_is_late(hedger, 500)
    assert hedger._credit == 10.0


async def test_closing_waits_until_every_loser_is_gone() -> None:
    async with hedged() as (service, backend, _):
        service.steps = [service.stall, quick]
        assert await backend.get("db", "k") == "quick"
        assert backend._hedger is not None
        await backend._hedger.aclose()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "aiokv read"]
