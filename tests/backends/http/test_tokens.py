"""Tokens: one exchange for all, renewed ahead of time or when refused, and never shown or carried elsewhere."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from helpers import FakeClock, all_texts, no_wait
from yarl import URL

from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.options import Credentials, HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.backends.http.tokens import parse_token
from aiokv.backends.http.transport import Answer
from aiokv.errors import (
    AuthenticationError,
    CallError,
    CallTimeoutError,
    CredentialsError,
    RejectedError,
    ResponseError,
    StoreClosedError,
    TransportError,
    UnavailableError,
)
from aiokv.testing import ScriptedService
from aiokv.wire import TOKEN_PATH

KEY = "account:hunter2"
ONCE = RetryPolicy.none()


class TokenService:
    """A service that gives out tokens and takes each for an hour, unless a test says otherwise."""

    def __init__(self, clock: FakeClock | None = None) -> None:
        self.clock = clock or FakeClock()
        self.exchanges = 0
        self.refusals = 0
        self.token_status = 200
        # Closed by a test that wants to hold token requests back.
        self.gate = asyncio.Event()
        self.gate.set()
        self._accepted: dict[str, float] = {}

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == TOKEN_PATH:
            return await self._give_token(request)
        if self.clock() >= self._accepted.get(request.headers.get("Authorization", ""), 0.0):
            self.refusals += 1
            return web.json_response({"error": "token refused"}, status=401)
        return web.json_response({"value": request.raw_path.rpartition("/")[2]})

    async def _give_token(self, request: web.BaseRequest) -> web.StreamResponse:
        self.exchanges += 1
        number = self.exchanges
        await self.gate.wait()
        if self.token_status == 0:
            assert request.transport is not None
            request.transport.abort()
        elif self.token_status != 200:
            echo = f"refused {request.headers['Authorization']}"
            return web.json_response({"error": echo}, status=self.token_status, headers={"X-Request-Id": "r-1"})
        self._accepted[f"Bearer token-{number}"] = self.clock() + 3600
        return token_answer(f"token-{number}")

    def revoke(self) -> None:
        self._accepted.clear()


def token_answer(token: str, *, lifetime_seconds: float = 3600.0, date: str | None = None) -> web.Response:
    expires_at = (datetime.now(UTC) + timedelta(seconds=lifetime_seconds)).isoformat()
    body = {"token": token, "token_type": "Bearer", "base_url": "http://ignored", "expires_at": expires_at}
    return web.json_response(body, headers={"Date": date} if date else {})


@contextlib.asynccontextmanager
async def connected(
    service: TokenService,
    *,
    policy: RetryPolicy | None = None,
    pool_size: int = 100,
    credentials: str | Credentials = KEY,
) -> AsyncGenerator[tuple[RemoteBackend, ScriptedService]]:
    async with ScriptedService(handler=service.answer) as recorded:
        url = recorded.url
        backend = RemoteBackend(
            URL(url),
            credentials=credentials,
            policy=policy,
            options=HttpOptions(pool_size=pool_size),
            sleep=no_wait,
            clock=service.clock,
        )
        try:
            yield backend, recorded
        finally:
            service.gate.set()
            await backend.aclose()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def kv_sends(recorded: ScriptedService) -> int:
    return sum(not path.startswith(TOKEN_PATH) for path in recorded.paths)


async def test_concurrent_first_calls_make_one_exchange() -> None:
    service = TokenService()
    async with connected(service) as (backend, recorded):
        assert await asyncio.gather(*(backend.get("db", f"k{n}") for n in range(100))) == [f"k{n}" for n in range(100)]
    assert service.exchanges == 1
    assert kv_sends(recorded) == 100


async def test_key_goes_to_the_token_endpoint_and_the_token_to_the_rest() -> None:
    async with connected(TokenService()) as (backend, recorded):
        await backend.set("db", "key", "value", 60)
    exchange, call = recorded.requests
    assert (exchange.method, exchange.path, exchange.body) == ("POST", TOKEN_PATH, b"{}")
    assert exchange.headers["Authorization"] == f"Key {KEY}"
    assert exchange.headers["Content-Type"] == "application/json"
    assert call.headers["Authorization"] == "Bearer token-1"


async def test_refused_token_is_renewed_once_and_the_call_succeeds() -> None:
    service = TokenService()
    async with connected(service, policy=ONCE) as (backend, recorded):
        await backend.get("db", "first")
        service.revoke()
        assert await backend.get("db", "second") == "second"
        assert await backend.get("db", "third") == "third"
    assert service.exchanges == 2
    assert kv_sends(recorded) == 4


async def test_concurrent_refusals_make_one_renewal() -> None:
    service = TokenService()
    async with connected(service, policy=ONCE) as (backend, _):
        await backend.get("db", "first")
        service.revoke()
        assert await asyncio.gather(*(backend.get("db", f"k{n}") for n in range(50))) == [f"k{n}" for n in range(50)]
    assert service.exchanges == 2


async def test_refusal_that_arrives_after_the_renewal_uses_the_new_token() -> None:
    service = TokenService()
    straggler = asyncio.Event()
    original = service.answer

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        response = await original(request)
        if response.status == 401 and request.path.endswith("slow"):
            await straggler.wait()
        return response

    service.answer = answer  # type: ignore[method-assign]
    async with connected(service, policy=ONCE) as (backend, _):
        await backend.get("db", "first")
        service.revoke()
        slow = asyncio.create_task(backend.get("db", "slow"))
        await until(lambda: service.refusals == 1)
        assert await backend.get("db", "quick") == "quick"
        straggler.set()
        assert await slow == "slow"
    assert service.exchanges == 2


@pytest.mark.parametrize(("status", "sends", "exchanges"), [(401, 2, 2), (403, 1, 1)])
async def test_call_refused_for_good_fails_without_a_loop(status: int, sends: int, exchanges: int) -> None:
    asked = 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal asked
        if request.path == TOKEN_PATH:
            asked += 1
            return token_answer(f"t0ken-{asked}")
        return web.json_response({"error": f"no: {request.headers['Authorization']}"}, status=status)

    async with ScriptedService(handler=answer) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url), credentials=KEY, sleep=no_wait)
        with pytest.raises(AuthenticationError) as caught:
            await backend.set("db", "key", "value", 60)
        await backend.aclose()
    assert (kv_sends(recorded), asked) == (sends, exchanges)
    assert (caught.value.status, caught.value.attempts, caught.value.maybe_applied) == (status, 1, False)
    assert "t0ken" not in all_texts(caught.value)


async def test_background_renewal_blocks_no_call(clock: FakeClock) -> None:
    service = TokenService(clock)
    async with connected(service) as (backend, recorded):
        await backend.get("db", "first")
        clock.advance(3600 - 730)
        await backend.get("db", "second")
        await asyncio.sleep(0.01)
        assert service.exchanges == 1, "a token with more than a fifth of its life was renewed"
        clock.advance(30)
        service.gate.clear()
        for n in range(20):
            assert await backend.get("db", f"k{n}") == f"k{n}"
        await until(lambda: service.exchanges == 2)
        assert await backend.get("db", "still") == "still"
        assert {call.headers["Authorization"] for call in recorded.requests if not call.is_exchange} == {"Bearer token-1"}
        service.gate.set()
        await until(lambda: backend._tokens is not None and backend._tokens._header == "Bearer token-2")
        assert await backend.get("db", "after") == "after"
    assert (service.exchanges, service.refusals) == (2, 0)


async def test_failed_background_renewal_leaves_calls_working_and_is_tried_again_later(clock: FakeClock) -> None:
    service = TokenService(clock)
    async with connected(service, policy=ONCE) as (backend, _):
        await backend.get("db", "first")
        clock.advance(3000)
        service.token_status = 503
        assert await backend.get("db", "a") == "a"
        await until(lambda: service.exchanges == 2)
        await asyncio.sleep(0.02)
        for n in range(10):
            assert await backend.get("db", f"k{n}") == f"k{n}"
        await asyncio.sleep(0.02)
        assert service.exchanges == 2, "a failed renewal was tried again at every call"
        service.token_status = 200
        clock.advance(11)
        assert await backend.get("db", "b") == "b"
        await until(lambda: service.exchanges == 3)
        clock.advance(1000)
        assert await backend.get("db", "c") == "c"
    assert service.refusals == 0


async def test_calls_fail_once_the_token_is_dead_and_recover_with_the_token_endpoint(clock: FakeClock) -> None:
    service = TokenService(clock)
    async with connected(service, policy=ONCE) as (backend, _):
        await backend.get("db", "first")
        clock.advance(3602)
        service.token_status = 503
        with pytest.raises(UnavailableError, match="the token exchange at 127"):
            await backend.get("db", "second")
        service.token_status = 200
        assert await backend.get("db", "third") == "third"
    assert service.refusals == 0


async def test_constant_load_over_many_lives_of_a_token_meets_no_refusal(clock: FakeClock) -> None:
    service = TokenService(clock)
    async with connected(service, policy=ONCE) as (backend, recorded):
        for step in range(300):
            clock.advance(60)
            assert await asyncio.gather(*(backend.get("db", f"{step}-{n}") for n in range(4))) == [
                f"{step}-{n}" for n in range(4)
            ]
    assert service.refusals == 0
    assert kv_sends(recorded) == 1200
    assert 5 <= service.exchanges <= 8


@pytest.mark.parametrize(("status", "kind"), [(503, UnavailableError), (401, AuthenticationError), (0, TransportError)])
async def test_failed_exchange_is_shared_and_each_call_gets_its_own_error(status: int, kind: type[CallError]) -> None:
    service = TokenService()
    service.token_status = status
    service.gate.clear()
    async with connected(service, policy=ONCE) as (backend, recorded):
        calls: dict[tuple[str, str], Coroutine[Any, Any, object]] = {}
        for n in range(10):
            calls["get", f"g{n}"] = backend.get("db", f"g{n}")
            calls["set", f"s{n}"] = backend.set("db", f"s{n}", "value", 60)
            calls["delete", f"d{n}"] = backend.delete("db", f"d{n}")
        tasks = [asyncio.create_task(call) for call in calls.values()]
        await until(lambda: service.exchanges == 1)
        await asyncio.sleep(0.02)
        service.gate.set()
        errors = await asyncio.gather(*tasks, return_exceptions=True)
    assert service.exchanges == 1
    assert kv_sends(recorded) == 0
    assert len({id(error) for error in errors}) == 30
    for (verb, key), error in zip(calls, errors, strict=True):
        assert type(error) is kind
        assert (error.verb, error.db_name, error.key) == (verb, "db", key)
        assert (error.status, error.request_id) == ((status, "r-1") if status else (None, None))
        assert not error.maybe_applied
        assert "hunter2" not in all_texts(error)


async def test_exchange_has_the_retries_of_a_call_and_no_more() -> None:
    service = TokenService()
    service.token_status = 503
    async with connected(service) as (backend, _):
        with pytest.raises(UnavailableError):
            await backend.get("db", "key")
        assert service.exchanges == 4
        service.token_status = 401
        with pytest.raises(AuthenticationError, match="credentials were refused: check the argument credentials"):
            await backend.get("db", "key")
        assert service.exchanges == 5


async def test_failed_background_renewal_is_logged_without_a_secret(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    service = TokenService(clock)
    with caplog.at_level(logging.DEBUG, "aiokv"):
        async with connected(service) as (backend, _):
            await backend.get("db", "first")
            service.token_status = 503
            clock.advance(3000)
            await backend.get("db", "second")
            await until(lambda: "token renewal failed" in caplog.text)
    assert "hunter2" not in caplog.text
    assert "token-1" not in caplog.text


@pytest.mark.parametrize("cancelled", [1, 5], ids=["first", "all"])
async def test_cancelled_callers_leave_the_exchange_to_the_others(cancelled: int) -> None:
    service = TokenService()
    service.gate.clear()
    async with connected(service) as (backend, _):
        tasks = [asyncio.create_task(backend.get("db", f"k{n}")) for n in range(5)]
        await until(lambda: service.exchanges == 1)
        for task in tasks[:cancelled]:
            task.cancel()
        await asyncio.wait(tasks[:cancelled])
        late = asyncio.create_task(backend.get("db", "late"))
        await asyncio.sleep(0)
        service.gate.set()
        assert await late == "late"
        assert await asyncio.gather(*tasks[cancelled:]) == [f"k{n}" for n in range(cancelled, 5)]
        assert all(task.cancelled() for task in tasks[:cancelled])
    assert service.exchanges == 1


async def test_store_closed_during_an_exchange_says_so_to_each_call() -> None:
    service = TokenService()
    service.gate.clear()
    async with connected(service) as (backend, _):
        tasks = [asyncio.create_task(backend.get("db", f"k{n}")) for n in range(3)]
        await until(lambda: service.exchanges == 1)
        await backend.aclose()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, StoreClosedError), repr(outcome)


async def test_call_cancelled_while_its_store_is_closed_stays_cancelled() -> None:
    service = TokenService()
    service.gate.clear()
    async with connected(service) as (backend, _):
        call = asyncio.create_task(backend.get("db", "key"))
        await until(lambda: service.exchanges == 1)
        closing = asyncio.create_task(backend.aclose())
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call, closing])
        assert call.cancelled()


async def test_exchange_that_hangs_times_out_with_the_call() -> None:
    service = TokenService()
    service.gate.clear()
    async with connected(service, policy=RetryPolicy(total_timeout=0.3)) as (backend, _):
        with pytest.raises(CallTimeoutError) as caught:
            await backend.set("db", "key", "value", 60)
        assert not caught.value.maybe_applied
        await asyncio.sleep(0.02)
        service.gate.set()
        assert await backend.get("db", "key") == "key"


class SlowVault:
    """Credentials whose first look-up never ends."""

    def __init__(self) -> None:
        self.asked = 0

    async def authorization(self) -> str:
        self.asked += 1
        if self.asked == 1:
            await asyncio.Event().wait()
        return f"Key {KEY}"


async def test_credentials_that_hang_once_do_not_stop_later_calls() -> None:
    async with connected(TokenService(), policy=RetryPolicy(total_timeout=0.3), credentials=SlowVault()) as (backend, _):
        with pytest.raises(CallTimeoutError):
            await backend.get("db", "first")
        await asyncio.sleep(0.02)
        assert await backend.get("db", "second") == "second"


async def test_single_connection_serves_calls_exchange_and_renewal() -> None:
    service = TokenService()
    async with connected(service, policy=RetryPolicy(total_timeout=2), pool_size=1) as (backend, _):
        await asyncio.gather(*(backend.get("db", f"k{n}") for n in range(5)))
        service.revoke()
        await asyncio.gather(*(backend.get("db", f"k{n}") for n in range(5)))
    assert service.exchanges == 2


def token_body(**changed: object) -> str:
    body = {"token": "s3cret", "token_type": "Bearer", "expires_at": "2099-01-01T00:00:00Z", **changed}
    return json.dumps({name: value for name, value in body.items() if value != "absent"})


@pytest.mark.parametrize(
    "body",
    [
        *(token_body(expires_at=text) for text in ("2099-01-01T00:00:00", "tomorrow", "", 4070908800, None, "absent")),
        *(token_body(token=text) for text in ("s3cret\n", "s3cret-é", "", None, 5, {"s3cret": 1}, "absent")),
        *(token_body(token_type=text) for text in ("s3cret\n", None, "absent")),
        *('["s3cret"]', '"s3cret"', "s3cret", "null", ""),
    ],
)
async def test_answer_without_a_usable_token_is_told_and_not_shown(body: str) -> None:
    async def answer(_request: web.BaseRequest) -> web.Response:
        return web.Response(text=body, content_type="application/json")

    async with ScriptedService(handler=answer) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url), credentials=KEY, sleep=no_wait)
        with pytest.raises(ResponseError, match="no usable token") as caught:
            await backend.get("db", "key")
        await backend.aclose()
    assert recorded.paths == [TOKEN_PATH]
    assert "s3cret" not in all_texts(caught.value)


async def test_token_dead_on_arrival_is_used_until_it_is_refused(clock: FakeClock) -> None:
    service = TokenService(clock)
    original = service._give_token

    async def give_dead_token(request: web.BaseRequest) -> web.StreamResponse:
        await original(request)
        return token_answer(f"token-{service.exchanges}", lifetime_seconds=-500)

    service._give_token = give_dead_token  # type: ignore[method-assign]
    async with connected(service) as (backend, _):
        for n in range(20):
            assert await backend.get("db", f"k{n}") == f"k{n}"
        assert service.exchanges == 1
        service.revoke()
        assert await backend.get("db", "renewed") == "renewed"
    assert service.exchanges == 2


@pytest.mark.parametrize("hours", [-48, 0, 48])
def test_life_of_a_token_is_measured_on_the_clock_of_its_server(hours: int) -> None:
    server_now = (datetime.now(UTC) + timedelta(hours=hours)).replace(microsecond=0)
    expires_at = (server_now + timedelta(hours=1)).isoformat().encode()
    body = b'{"token": "t", "token_type": "Bearer", "expires_at": "%s"}' % expires_at
    token = parse_token(Answer(200, {"Date": format_datetime(server_now, usegmt=True)}, body))
    assert token.lifetime_seconds == 3600


@pytest.mark.parametrize("date", ["Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359", "9" * 400])
@pytest.mark.parametrize("expires_at", ["9999-12-31T23:59:59-23:59", "0001-01-01T00:00:00+23:59", "2099-01-01T00:00:00Z"])
def test_times_at_the_ends_of_the_calendar_give_a_token(date: str, expires_at: str) -> None:
    body = b'{"token": "t", "token_type": "Bearer", "expires_at": "%s"}' % expires_at.encode()
    assert parse_token(Answer(200, {"Date": date}, body)).header == "Bearer t"


@pytest.mark.parametrize("date", ["Sun, 23 Nov 2025 10:00:00 -0000", "Sun, 23 Nov 2025 10:00:00", "yesterday"])
async def test_odd_date_header_of_the_token_endpoint_does_not_break_calls(date: str) -> None:
    async def answer(request: web.BaseRequest) -> web.Response:
        return token_answer("t", date=date) if request.path == TOKEN_PATH else web.json_response({"value": "v"})

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials=KEY)
        assert await backend.get("db", "key") == "v"
        await backend.aclose()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("redirected", ["token", "get", "set"])
async def test_redirect_is_not_followed_and_the_other_host_receives_nothing(status: int, redirected: str) -> None:
    async def elsewhere(_request: web.BaseRequest) -> web.Response:
        return web.json_response({"value": "stolen"})

    async with ScriptedService(handler=elsewhere) as other:
        other_url = other.url

        async def answer(request: web.BaseRequest) -> web.Response:
            if request.path == TOKEN_PATH and redirected != "token":
                return token_answer("t")
            return web.json_response({}, status=status, headers={"Location": f"{other_url}{request.raw_path}"})

        async with ScriptedService(handler=answer) as recorded:
            url = recorded.url
            backend = RemoteBackend(URL(url), credentials=KEY, sleep=no_wait)
            call = backend.set("db", "key", "value", 60) if redirected == "set" else backend.get("db", "key")
            with pytest.raises(RejectedError, match="redirects are not followed") as caught:
                await call
            await backend.aclose()
    assert other.requests == []
    assert len(recorded.requests) == (1 if redirected == "token" else 2)
    assert (caught.value.status, caught.value.maybe_applied) == (status, False)


async def test_call_that_joins_an_old_exchange_has_its_own_time() -> None:
    asked = 0

    class SlowOnce:
        async def authorization(self) -> str:
            nonlocal asked
            asked += 1
            if asked == 1:
                await asyncio.Event().wait()
            return "Key id:s3cret"

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.raw_path.startswith("/storage"):
            expires_at = (datetime.now(UTC) + timedelta(hours=2)).isoformat()
            return web.json_response({"token": "t", "token_type": "Bearer", "base_url": "", "expires_at": expires_at})
        return web.json_response({"value": "v"})

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials=SlowOnce(), policy=RetryPolicy(total_timeout=0.3))
        first = asyncio.create_task(backend.get("db", "first"))
        await asyncio.sleep(0.25)
        assert await backend.get("db", "second") == "v"
        with pytest.raises(CallTimeoutError):
            await first
        await backend.aclose()


async def test_credentials_that_are_gone_at_the_second_attempt_do_not_hide_what_the_first_may_have_done() -> None:
    class Gone:
        asked = 0

        async def authorization(self) -> str:
            self.asked += 1
            if self.asked > 1:
                raise CredentialsError("the vault is locked")
            return "Key id:secret"

    calls = 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal calls
        if request.raw_path == TOKEN_PATH:
            body = {"token": "t", "token_type": "Bearer", "expires_at": "2100-01-01T00:00:00Z"}
            return web.json_response(body)
        calls += 1
        return web.json_response({}, status=503 if calls == 1 else 401)

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials=Gone(), sleep=no_wait)
        with pytest.raises(UnavailableError, match="the vault is locked") as caught:
            await backend.set("db", "k", "v", 60)
        await backend.aclose()
    assert caught.value.maybe_applied
    assert isinstance(caught.value.__cause__, CredentialsError)


async def refusing(request: web.BaseRequest) -> web.StreamResponse:
    if request.path == TOKEN_PATH:
        return token_answer("t0ken")
    return web.json_response({"error": "no access"}, status=403 if request.path.endswith("forbidden") else 401)


@pytest.mark.parametrize("key", ["unauthorized", "forbidden"])
async def test_refused_call_says_that_the_exchange_went_well_and_whose_credentials_they_were(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOKV_KEY", KEY)
    async with ScriptedService(handler=refusing) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), sleep=no_wait)
        with pytest.raises(AuthenticationError) as caught:
            await backend.get("db", key)
        await backend.aclose()
    assert "no access; the credentials (AIOKV_KEY) were exchanged for a token, and the service refused the call" in str(
        caught.value
    )
    assert "hunter2" not in all_texts(caught.value)


@pytest.mark.parametrize("source", ["AIOKV_KEY", "the argument credentials", "an object of type Vault"])
async def test_refused_exchange_says_so_and_names_the_source(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Vault:
        async def authorization(self) -> str:
            return f"Key {KEY}"

    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"error": "unknown key"}, status=401)

    monkeypatch.setenv("AIOKV_KEY", KEY)
    given = {"AIOKV_KEY": None, "the argument credentials": KEY, "an object of type Vault": Vault()}[source]
    async with ScriptedService(handler=answer) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url), credentials=given, sleep=no_wait)  # type: ignore[arg-type]
        with pytest.raises(AuthenticationError) as caught:
            await backend.get("db", "key")
        await backend.aclose()
    host = url.removeprefix("http://")
    expected = f"the token exchange at {host} failed: unknown key; the credentials were refused: check {source}"
    assert caught.value.reason == expected
    assert recorded.paths == [TOKEN_PATH]


async def test_call_that_is_refused_without_credentials_says_how_to_pass_some() -> None:
    async with ScriptedService(handler=refusing) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), sleep=no_wait)
        with pytest.raises(AuthenticationError, match="no credentials were sent: pass credentials="):
            await backend.get("db", "key")
        await backend.aclose()


async def test_exchange_that_does_not_end_is_named_as_such() -> None:
    service = TokenService()
    service.gate.clear()
    async with connected(service, policy=RetryPolicy(total_timeout=0.1)) as (backend, _):
        with pytest.raises(CallTimeoutError, match="the token exchange at 127"):
            await backend.get("db", "key")


async def test_short_secret_is_not_masked_in_what_the_service_says() -> None:
    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"error": "a key was not found"}, status=400)

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials="a:a", sleep=no_wait)
        with pytest.raises(RejectedError, match="a key was not found"):
            await backend.get("db", "key")
        await backend.aclose()
