"""Retries in an outage: each host has one retry quota, which pays for them and runs out."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator

import pytest
from aiohttp import web
from helpers import no_wait
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import QUOTA_TOKENS, RetryPolicy, RetryQuota, quota_of, reset_quotas
from aiokv.errors import CallError, ThrottledError, UnavailableError
from aiokv.testing import ScriptedService
from aiokv.wire import TOKEN_PATH


class Service:
    """Answers with the status that stands here now."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}

    async def __call__(self, _request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"value": "v"}, status=self.status, headers=self.headers)


@contextlib.asynccontextmanager
async def failing_service() -> AsyncGenerator[tuple[Service, str, ScriptedService]]:
    service = Service()
    async with ScriptedService(handler=service) as recorded:
        url = recorded.url
        yield service, url, recorded


@contextlib.asynccontextmanager
async def backend_of(url: str, **options: int) -> AsyncGenerator[RemoteBackend]:
    backend = RemoteBackend(URL(url), sleep=no_wait, options=HttpOptions(**options) if options else None)
    try:
        yield backend
    finally:
        await backend.aclose()


async def failed(backend: RemoteBackend) -> CallError:
    with pytest.raises(CallError) as caught:
        await backend.get("db", "k")
    return caught.value


async def test_outage_meets_one_send_a_call_once_the_quota_is_spent() -> None:
    async with failing_service() as (service, url, recorded), backend_of(url) as backend:
        service.status = 503
        errors = [await failed(backend) for _ in range(50)]
        sends = len(recorded.requests)
    retries = QUOTA_TOKENS // 14
    assert sends == 50 + retries
    assert [error.attempts for error in errors[:11]] == [4] * 11
    assert {error.attempts for error in errors[12:]} == {1}
    assert "retry quota is spent" in str(errors[-1])
    assert "quota" not in str(errors[0])


async def test_throttled_retry_costs_less_than_one_after_a_failure() -> None:
    async with failing_service() as (service, url, _recorded), backend_of(url) as backend:
        service.status = 429
        assert isinstance(await failed(backend), ThrottledError)
        assert quota_of(URL(url).authority).tokens == QUOTA_TOKENS - 3 * 5
        service.status, service.headers = 503, {"Retry-After": "0"}
        assert isinstance(await failed(backend), UnavailableError)
        assert quota_of(URL(url).authority).tokens == QUOTA_TOKENS - 6 * 5


async def test_success_refunds_so_that_faults_now_and_then_are_always_retried() -> None:
    async with failing_service() as (service, url, _recorded), backend_of(url) as backend:
        quota = quota_of(URL(url).authority)
        service.status = 503
        await failed(backend)
        spent = QUOTA_TOKENS - quota.tokens
        assert spent == 3 * 14
        service.status = 200
        for _ in range(10):
            await backend.get("db", "k")
        assert QUOTA_TOKENS - quota.tokens == spent - 10
        for _ in range(50):
            await backend.get("db", "k")
        assert quota.tokens == QUOTA_TOKENS


async def test_retry_that_succeeds_gets_its_cost_back() -> None:
    seen = 0

    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        nonlocal seen
        seen += 1
        return web.json_response({"value": "v"}, status=503 if seen % 2 else 200)

    async with ScriptedService(handler=answer) as scripted, backend_of(scripted.url) as backend:
        url = scripted.url
        for _ in range(100):
            assert await backend.get("db", "k") == "v"
        assert quota_of(URL(url).authority).tokens == QUOTA_TOKENS


async def test_all_stores_of_a_host_share_its_quota_and_another_host_has_its_own() -> None:
    async with (
        failing_service() as (service, url, recorded),
        failing_service() as (other_service, other_url, other_recorded),
        backend_of(url) as first,
        backend_of(url, pool_size=7) as second,
        backend_of(other_url) as other,
    ):
        service.status = other_service.status = 503
        for _ in range(13):
            await failed(first)
        before = len(recorded.requests)
        await failed(second)
        assert len(recorded.requests) == before + 1
        await failed(other)
        assert len(other_recorded.requests) == 4


async def test_exchange_of_credentials_is_paid_from_the_quota_of_its_own_host() -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=503 if request.raw_path == TOKEN_PATH else 200)

    async with ScriptedService(handler=answer) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url), credentials="id:secret", sleep=no_wait)
        with pytest.raises(UnavailableError):
            await backend.get("db", "k")
        await backend.aclose()
        assert recorded.paths == [TOKEN_PATH] * 4
        assert quota_of(URL(url).authority).tokens == QUOTA_TOKENS - 3 * 14


async def test_policy_without_retries_spends_nothing() -> None:
    async with failing_service() as (service, url, _recorded), backend_of(url) as backend:
        service.status = 503
        once = backend.with_options(RetryPolicy.none(), None)
        for _ in range(5):
            await failed(once)
        assert quota_of(URL(url).authority).tokens == QUOTA_TOKENS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
async def test_forked_child_begins_with_a_full_quota() -> None:
    quota_of("forked.example").pay(400)
    child = os.fork()
    if child == 0:
        os._exit(0 if quota_of("forked.example").tokens == QUOTA_TOKENS else 1)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert quota_of("forked.example").tokens == QUOTA_TOKENS - 400


def test_reset_fills_a_quota_that_is_in_use() -> None:
    quota = quota_of("reset.example")
    quota.pay(400)
    reset_quotas()
    assert quota.tokens == QUOTA_TOKENS


@given(st.lists(st.tuples(st.booleans(), st.integers(min_value=1, max_value=200))))
def test_quota_is_never_negative_nor_over_its_capacity(steps: list[tuple[bool, int]]) -> None:
    quota = RetryQuota()
    for pays, tokens in steps:
        before = quota.tokens
        if pays:
            assert quota.pay(tokens) is (tokens <= before)
        else:
            quota.refund(tokens)
        assert 0 <= quota.tokens <= QUOTA_TOKENS
        assert abs(quota.tokens - before) in {0, tokens} or quota.tokens == QUOTA_TOKENS


async def test_exchange_that_succeeds_gives_to_the_quota_of_its_host() -> None:
    status = 503

    async def give_token(_request: web.BaseRequest) -> web.StreamResponse:
        body = {"token": "t", "token_type": "Bearer", "expires_at": "2000-01-01T00:00:00Z"}
        return web.json_response(body, status=status)

    async with ScriptedService(handler=give_token) as token_scripted, ScriptedService(handler=Service()) as scripted:
        token_url = token_scripted.url
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials="id:secret", sleep=no_wait)
        # As with fal's service, whose tokens come from another host.
        backend._token_url = URL(token_url)
        for _ in range(13):
            with pytest.raises(UnavailableError):
                await backend.get("db", "k")
        quota = quota_of(backend._token_url.authority)
        spent = QUOTA_TOKENS - quota.tokens
        status = 200
        await backend.get("db", "k")
        await backend.aclose()
        assert QUOTA_TOKENS - quota.tokens < spent, "an exchange is never tried again for the rest of the process's life"


async def test_retry_that_succeeds_gets_no_more_than_its_own_cost_back() -> None:
    statuses = [503, 503, 200]

    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"value": "v"}, status=statuses.pop(0))

    async with ScriptedService(handler=answer) as scripted, backend_of(scripted.url) as backend:
        url = scripted.url
        quota = quota_of(URL(url).authority)
        quota.pay(400)
        assert await backend.get("db", "k") == "v"
        assert quota.tokens == 100 - 14


async def test_retry_that_is_cancelled_before_it_is_sent_gets_its_cost_back() -> None:
    async def wait_for_ever(_seconds: float) -> None:
        waiting.set()
        await asyncio.Event().wait()

    async with failing_service() as (service, url, recorded):
        service.status = 503
        backend = RemoteBackend(URL(url), sleep=wait_for_ever)
        for _ in range(3):
            waiting = asyncio.Event()
            call = asyncio.create_task(backend.get("db", "k"))
            await waiting.wait()
            call.cancel()
            await asyncio.wait([call])
        await backend.aclose()
        assert len(recorded.requests) == 3
        assert quota_of(URL(url).authority).tokens == QUOTA_TOKENS


async def test_exchange_spends_nothing_of_the_service_where_the_hosts_differ() -> None:
    async def refuse(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=503)

    async with ScriptedService(handler=refuse) as token_scripted, ScriptedService(handler=refuse) as scripted:
        token_url = token_scripted.url
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials="id:secret", sleep=no_wait)
        backend._token_url = URL(token_url)
        with pytest.raises(UnavailableError):
            await backend.get("db", "k")
        await backend.aclose()
        assert quota_of(URL(token_url).authority).tokens == QUOTA_TOKENS - 3 * 14
        assert quota_of(URL(url).authority).tokens == QUOTA_TOKENS
