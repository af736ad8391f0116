"""The scripted service: what each reply is to a store, tokens, the script's end, and what is counted."""

import asyncio
import itertools
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone

import aiohttp
import pytest
from aiohttp import web
from helpers import FakeClock

from aiokv import (
    AsyncKVStore,
    AuthenticationError,
    CallError,
    RejectedError,
    ResponseError,
    RetryPolicy,
    ThrottledError,
    TransportError,
    UnavailableError,
)
from aiokv.testing import Reply, ScriptedService, ServiceRequest, disable_backoff
from aiokv.wire import TOKEN_PATH

KEY = "me:s3cret"


def store_of(service: ScriptedService, *, attempts: int = 1, credentials: str | None = None) -> AsyncKVStore:
    return AsyncKVStore("db", url=service.url, retry=RetryPolicy(attempts=attempts), credentials=credentials)


async def test_service_without_a_script_is_the_real_one() -> None:
    async with ScriptedService() as service, store_of(service) as store:
        await store.set("k", "v")
        assert await store.get("k") == "v"
        assert await service.backend.get("db", "k") == "v"
        await store.delete("k")
        assert await store.get("k") is None
    assert [(seen.number, seen.method, seen.path, seen.status) for seen in service.requests] == [
        (1, "PUT", "/set/db/k?ttl=2592000", 200),
        (2, "GET", "/get/db/k", 200),
        (3, "DELETE", "/delete/db/k", 200),
        (4, "GET", "/get/db/k", 404),
    ]


@pytest.mark.parametrize(
    ("reply", "error", "status"),
    [
        (Reply.throttled(), ThrottledError, 429),
        (Reply.unavailable(), UnavailableError, 503),
        (Reply.unauthorized(), AuthenticationError, 401),
        (Reply.html(), UnavailableError, 502),
        (Reply.html(200), ResponseError, 200),
        (Reply.html(403), AuthenticationError, 403),
        (Reply.redirect("http://127.0.0.1:1/elsewhere"), RejectedError, 307),
        (Reply.broken_json(), ResponseError, 200),
        (Reply.error(418, "a teapot"), RejectedError, 418),
    ],
    ids=["429", "503", "401", "page", "page as 200", "page as 403", "redirect", "broken JSON", "418"],
)
async def test_reply_is_the_error_that_it_stands_for(reply: Reply, error: type[CallError], status: int) -> None:
    async with ScriptedService(reply) as service, store_of(service) as store:
        with pytest.raises(error) as raised:
            await store.get("k")
        assert raised.value.status == status
        # Then the script has ended.
        assert await store.get("k") is None
    assert [(seen.reply, seen.status) for seen in service.requests] == [(reply, status), (None, 404)]


async def test_reply_of_a_value_is_that_value() -> None:
    async with ScriptedService(Reply.value("scripted"), None) as service, store_of(service) as store:
        assert [await store.get("k"), await store.get("k")] == ["scripted", None]


@pytest.mark.parametrize(
    ("retry_after", "least", "most"),
    [(7, 7, 7), (lambda: datetime.now(UTC) + timedelta(hours=2), 7_100, 7_200), ("soon", None, None), (None, None, None)],
    ids=["seconds", "date", "nonsense", "none"],
)
async def test_wait_that_a_reply_asks_for_reaches_the_error(
    retry_after: object, least: float | None, most: float | None
) -> None:
    given = retry_after() if callable(retry_after) else retry_after
    async with ScriptedService(Reply.unavailable(given)) as service, store_of(service) as store:
        with pytest.raises(UnavailableError) as raised:
            await store.get("k")
    met = raised.value.retry_after
    assert met is None if least is None or most is None else met is not None and least <= met <= most


def test_moment_is_written_as_http_has_it() -> None:
    moment = datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    assert Reply.throttled(moment).headers["Retry-After"] == "Tue, 01 Jan 2030 00:00:00 GMT"


async def test_retries_get_past_a_script_and_are_counted() -> None:
    async with ScriptedService(Reply.throttled(), Reply.unavailable(), Reply.html(504)) as service:
        with disable_backoff():
            async with store_of(service, attempts=4) as store:
                await store.set("k", "v")
        assert await service.backend.get("db", "k") == "v"
    assert (service.calls, service.exchanges) == (4, 0)


async def test_replies_are_one_for_all_an_iterator_or_a_function() -> None:
    def writes_fail(request: ServiceRequest) -> Reply | None:
        return Reply.unavailable() if request.method == "PUT" else None

    async with ScriptedService() as service, store_of(service) as store:
        service.replies = Reply.value("always")
        assert [await store.get("k") for _ in range(3)] == ["always"] * 3
        service.replies = itertools.cycle([Reply.value("a"), Reply.value("b")])
        assert [await store.get("k") for _ in range(3)] == ["a", "b", "a"]
        service.replies = writes_fail
        assert await store.get("k") is None
        with pytest.raises(UnavailableError):
            await store.set("k", "v")
        service.replies = None
        await store.set("k", "v")


async def test_function_that_fails_is_a_500_and_is_raised_at_the_end() -> None:
    async def use() -> None:
        async with ScriptedService() as service, store_of(service) as store:
            service.replies = lambda _: Reply(status=1 // 0)
            with pytest.raises(UnavailableError):
                await store.get("k")

    with pytest.raises(ZeroDivisionError):
        await use()


async def test_delay_of_a_reply_is_waited_for_and_ends_with_the_service() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async with ScriptedService(Reply(delay_seconds=3), sleep=sleep) as service, store_of(service) as store:
        await store.set("k", "v")
    assert slept == [3]
    async with ScriptedService(Reply(delay_seconds=3600)) as service, store_of(service) as store:
        call = asyncio.create_task(store.get("k"))
        while not service.requests:
            await asyncio.sleep(0.001)
        await service.aclose()
        with pytest.raises(CallError):
            await call


async def test_scripted_answer_to_a_large_body_leaves_the_connection_usable() -> None:
    async with ScriptedService(Reply.throttled(), Reply.done()) as service, aiohttp.ClientSession() as session:
        for status in (429, 200):
            async with session.put(f"{service.url}/set/db/k", data=b"x" * 1_000_000) as response:
                assert response.status == status
        assert session.connector is not None
        assert len(session.connector._conns) == 1


async def test_token_endpoint_has_a_script_of_its_own_and_refuses_once_or_always() -> None:
    async with ScriptedService(Reply.value("scripted"), token_replies=[Reply.unauthorized()]) as service:
        async with store_of(service, credentials=KEY) as store:
            with pytest.raises(AuthenticationError):
                await store.get("k")
            assert await store.get("k") == "scripted"
            assert (service.calls, service.exchanges) == (1, 2)
        service.token_replies = Reply.unauthorized()
        async with store_of(service, credentials=KEY) as store:
            for _ in range(2):
                with pytest.raises(AuthenticationError):
                    await store.get("k")
        assert (service.calls, service.exchanges) == (1, 4)


async def test_call_refused_by_401_once_fetches_a_token_and_is_sent_again() -> None:
    async with ScriptedService(Reply.unauthorized()) as service, store_of(service, credentials=KEY) as store:
        await store.set("k", "v")
        assert (service.calls, service.exchanges) == (2, 2)


async def test_token_is_required_lives_as_long_as_it_is_to_and_can_be_revoked() -> None:
    clock = FakeClock()
    async with (
        ScriptedService(Reply.value("scripted"), requires_token=True, token_lifetime_seconds=600, clock=clock) as service,
        store_of(service, credentials=KEY) as store,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{service.url}/get/db/k") as response:
            assert response.status == 401
        assert await store.get("k") == "scripted"
        exchanges = service.exchanges
        clock.advance(599)
        await store.set("k", "v")
        assert service.exchanges == exchanges
        clock.advance(1)
        await store.set("k", "v")
        assert service.exchanges == exchanges + 1
        service.revoke_tokens()
        await store.set("k", "v")
        assert service.exchanges == exchanges + 2


async def test_life_of_a_token_is_what_the_client_is_told() -> None:
    async with (
        ScriptedService(token_lifetime_seconds=90) as service,
        aiohttp.ClientSession() as session,
        session.post(f"{service.url}/storage/auth/token") as response,
    ):
        token = await response.json()
    life = datetime.fromisoformat(token["expires_at"]) - datetime.now(UTC)
    assert timedelta(seconds=60) < life <= timedelta(seconds=90)
    assert token["base_url"] == f"http://127.0.0.1:{token['base_url'].rpartition(':')[2]}"


async def test_record_bears_no_header_and_no_body() -> None:
    async with ScriptedService() as service, store_of(service, credentials=KEY) as store:
        await store.set("k", "val" + "ue")
    assert "value" not in repr(service.requests)
    assert "s3cret" not in repr(service.requests)
    assert "Bearer" not in repr(service.requests)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Reply(99),
        lambda: Reply(delay_seconds=-1),
        lambda: Reply.error(200),
        lambda: Reply.redirect("/", 200),
        lambda: Reply.throttled(datetime(2030, 1, 1)),  # noqa: DTZ001 (what is refused)
    ],
)
def test_reply_that_cannot_be_is_refused(make: Callable[[], Reply]) -> None:
    with pytest.raises(ValueError, match=r"status|delay_seconds|retry_after"):
        make()


@pytest.mark.parametrize("replies", [(429,), (Reply.throttled,)], ids=["number", "method"])
def test_what_is_no_reply_is_refused(replies: tuple[object, ...]) -> None:
    with pytest.raises(TypeError, match="Reply"):
        ScriptedService(*replies)  # type: ignore[arg-type]


async def test_service_that_does_not_run_says_how_to_run_it() -> None:
    service = ScriptedService()
    with pytest.raises(RuntimeError, match="async with"):
        _ = service.url
    await service.aclose()
    async with service:
        with pytest.raises(RuntimeError, match="already"):
            await service.__aenter__()


async def test_request_is_recorded_with_headers_and_body_that_its_repr_does_not_show() -> None:
    async with ScriptedService(Reply.done()) as service, AsyncKVStore("db", url=service.url, credentials="id:s3cret") as store:
        await store.set("k", "s3cret value")
        exchange, call = service.requests
    assert exchange.headers["Authorization"] == "Key id:s3cret"
    assert (call.body, call.headers["Content-Type"]) == (b"s3cret value", "text/plain; charset=utf-8")
    assert service.paths == [TOKEN_PATH, "/set/db/k?ttl=2592000"]
    assert "s3cret" not in repr(service.requests)


async def test_handler_answers_every_request_in_place_of_the_scripts() -> None:
    async def abort(request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with ScriptedService(Reply.done(), handler=abort) as service:
        store = AsyncKVStore("db", url=service.url, retry=RetryPolicy.none())
        with pytest.raises(TransportError):
            await store.set("k", "v")
        await store.aclose()
    assert [request.body for request in service.requests] == [b"v"]


async def test_token_lives_by_the_clock_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        ScriptedService(requires_token=True, token_lifetime_seconds=60) as service,
        AsyncKVStore("db", url=service.url, credentials="id:secret") as store,
    ):
        await store.get("k")
        now = time.time()
        monkeypatch.setattr("aiokv.clock.now", lambda: now + 61)
        await store.get("k")
    assert service.exchanges == 2
