"""Each fault of a network or a service, against each call: how it ends, how often it was sent, and what its error says."""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import trustme
from aiohttp import web

from aiokv import AsyncKVStore, HttpOptions, RetryPolicy
from aiokv.errors import (
    AuthenticationError,
    CallError,
    CallTimeoutError,
    ConnectError,
    RejectedError,
    ResponseError,
    ThrottledError,
    TransportError,
    UnavailableError,
)
from aiokv.testing import (
    FaultProxy,
    Garbage,
    Reply,
    ResetAfter,
    ResetBefore,
    ScriptedService,
    Stall,
    StallAfter,
    Truncate,
    disable_backoff,
)

VERBS = ["get", "set", "delete"]
POLICY = RetryPolicy(attempts=3, total_timeout=8.0, attempt_timeout=0.2, connect_timeout=2.0)
OLD, NEW = "what was there", "s3cret new value"
KEY = "id:hunter2"


@dataclass(frozen=True)
class Case:
    """A fault that does not pass.

    Args:
        kind: What a call ends with.
        attempts: How often it was tried, and so sent where there was a connection.
        maybe_applied: What a write's error says.
        applied: Whether a write was applied in truth.
        fields: Other fields of the error.
        passes: Whether the call succeeds where only its first request meets the fault.
    """

    kind: type[CallError]
    attempts: int = 3
    maybe_applied: bool = True
    applied: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    passes: bool = True


NETWORK: dict[str, tuple[Any, Case]] = {
    "reset before": (ResetBefore(), Case(TransportError)),
    "reset after": (ResetAfter(), Case(TransportError, applied=True)),
    "stall": (Stall(), Case(CallTimeoutError)),
    "stall after": (StallAfter(), Case(CallTimeoutError, applied=True)),
    "truncated": (Truncate(3), Case(TransportError, applied=True)),
    "garbage": (Garbage(), Case(ResponseError, attempts=1, passes=False)),
}

SERVICE: dict[str, tuple[Reply, Case]] = {
    "429": (Reply.throttled(0), Case(ThrottledError, maybe_applied=False, fields={"status": 429, "retry_after": 0.0})),
    "429 with a date": (
        Reply.throttled(datetime.now(UTC) - timedelta(hours=1)),
        Case(ThrottledError, maybe_applied=False, fields={"status": 429, "retry_after": 0.0}),
    ),
    "429 for longer than there is time": (
        Reply.throttled(3600),
        Case(ThrottledError, attempts=1, maybe_applied=False, passes=False, fields={"status": 429, "retry_after": 3600.0}),
    ),
    "503": (Reply.unavailable(), Case(UnavailableError, fields={"status": 503, "retry_after": None})),
    "502 page": (Reply.html(502), Case(UnavailableError, fields={"status": 502})),
    "redirect": (
        Reply.redirect("http://127.0.0.1:1/elsewhere"),
        Case(RejectedError, attempts=1, maybe_applied=False, passes=False, fields={"status": 307}),
    ),
    "broken json": (Reply.broken_json(), Case(ResponseError, attempts=1, passes=False, fields={"status": 200})),
}


async def call(store: AsyncKVStore, verb: str) -> str | None:
    if verb == "get":
        return await store.get("key")
    await (store.set("key", NEW) if verb == "set" else store.delete("key"))
    return None


async def failed(store: AsyncKVStore, verb: str) -> CallError:
    # Far past any policy here: a call that hangs is a failure, and not of the whole run.
    with disable_backoff(), pytest.raises(CallError) as caught:
        async with asyncio.timeout(15):
            await call(store, verb)
    return caught.value


def check(error: CallError, verb: str, case: Case) -> None:
    write = verb != "get"
    assert type(error) is case.kind
    assert error.attempts == case.attempts
    assert error.maybe_applied is (write and case.maybe_applied)
    assert (error.verb, error.db_name, error.key) == (verb, "db", "key")
    assert {name: getattr(error, name) for name in case.fields} == case.fields
    assert error.elapsed is not None
    # Its own words for time, which include every attempt, and nothing past the deadline.
    assert error.elapsed <= POLICY.total_timeout + 1
    if case.kind is CallTimeoutError:
        assert error.elapsed >= POLICY.attempt_timeout * case.attempts * 0.9
    text = f"{error}{error!r}{error.__cause__!r}{error.__context__!r}"
    assert NEW not in text
    assert "hunter2" not in text
    assert ("may have been applied" in str(error)) is (write and case.maybe_applied)


def state_after(verb: str, *, applied: bool) -> str | None:
    if verb == "get" or not applied:
        return OLD
    return NEW if verb == "set" else None


@contextlib.asynccontextmanager
async def behind_proxy(faults: Any) -> AsyncGenerator[tuple[FaultProxy, ScriptedService, AsyncKVStore]]:
    async with ScriptedService() as service, FaultProxy(service.url, faults=faults) as proxy:
        await service.backend.set("db", "key", OLD, 600)
        async with AsyncKVStore("db", url=proxy.url, retry=POLICY) as store:
            yield proxy, service, store


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", NETWORK)
async def test_fault_of_the_network_that_stays(name: str, verb: str) -> None:
    fault, case = NETWORK[name]
    async with behind_proxy(fault) as (proxy, service, store):
        check(await failed(store, verb), verb, case)
        assert len(proxy.requests) == case.attempts
        assert await service.backend.get("db", "key") == state_after(verb, applied=case.applied)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [name for name, (_, case) in NETWORK.items() if case.passes])
@pytest.mark.parametrize("warm", [False, True], ids=["new connection", "warm connection"])
async def test_fault_of_the_network_that_passes_is_not_noticed(name: str, verb: str, *, warm: bool) -> None:
    fault, _ = NETWORK[name]
    async with behind_proxy([None, fault] if warm else [fault]) as (proxy, service, store):
        if warm:
            assert await store.get("key") == OLD
        with disable_backoff():
            assert await call(store, verb) == (OLD if verb == "get" else None)
        assert len(proxy.requests) == 2 + warm
        assert await service.backend.get("db", "key") == state_after(verb, applied=True)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", SERVICE)
async def test_fault_of_the_service_that_stays(name: str, verb: str) -> None:
    reply, case = SERVICE[name]
    async with ScriptedService() as service, AsyncKVStore("db", url=service.url, retry=POLICY) as store:
        await service.backend.set("db", "key", OLD, 600)
        service.replies = reply
        check(await failed(store, verb), verb, case)
        assert len(service.requests) == case.attempts
        assert await service.backend.get("db", "key") == OLD


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", [name for name, (_, case) in SERVICE.items() if case.passes])
async def test_fault_of_the_service_that_passes_is_not_noticed(name: str, verb: str) -> None:
    async with ScriptedService(SERVICE[name][0]) as service, AsyncKVStore("db", url=service.url, retry=POLICY) as store:
        await service.backend.set("db", "key", OLD, 600)
        with disable_backoff():
            assert await call(store, verb) == (OLD if verb == "get" else None)
        assert len(service.requests) == 2
        assert await service.backend.get("db", "key") == state_after(verb, applied=True)


@pytest.mark.parametrize("verb", VERBS)
async def test_token_refused_once_is_renewed_and_not_noticed(verb: str) -> None:
    async with ScriptedService(requires_token=True) as service:
        await service.backend.set("db", "key", OLD, 600)
        async with AsyncKVStore("db", url=service.url, credentials=KEY, retry=POLICY) as store:
            await store.get("key")
            service.revoke_tokens()
            service.requests.clear()
            assert await call(store, verb) == (OLD if verb == "get" else None)
        assert (service.calls, service.exchanges) == (2, 1)
        assert await service.backend.get("db", "key") == state_after(verb, applied=True)


@pytest.mark.parametrize("verb", VERBS)
async def test_token_refused_always_fails_after_one_renewal(verb: str) -> None:
    async with ScriptedService() as service:
        service.replies = Reply.unauthorized()
        async with AsyncKVStore("db", url=service.url, credentials=KEY, retry=POLICY) as store:
            check(
                await failed(store, verb),
                verb,
                Case(AuthenticationError, attempts=1, maybe_applied=False, fields={"status": 401, "transient": False}),
            )
        assert (service.calls, service.exchanges) == (2, 2)


@pytest.mark.parametrize("verb", VERBS)
async def test_refused_connection(verb: str) -> None:
    async with behind_proxy(None) as (proxy, service, store):
        async with proxy.outage():
            check(await failed(store, verb), verb, Case(ConnectError, attempts=1, maybe_applied=False, fields={"status": None}))
        assert proxy.requests == []
        assert await call(store, verb) == (OLD if verb == "get" else None)
        assert await service.backend.get("db", "key") == state_after(verb, applied=True)


@pytest.mark.parametrize("verb", VERBS)
async def test_outage_that_ends_during_the_call_is_not_noticed(verb: str) -> None:
    async with behind_proxy(None) as (proxy, service, store):
        await proxy.stop_listening()
        task = asyncio.create_task(call(store, verb))
        await asyncio.sleep(0.05)
        await proxy.resume()
        assert await task == (OLD if verb == "get" else None)
        assert len(proxy.requests) == 1
        assert await service.backend.get("db", "key") == state_after(verb, applied=True)


@pytest.mark.parametrize("verb", VERBS)
async def test_name_that_cannot_be_resolved(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups = 0

    def unknown(*_: Any, **__: Any) -> Any:
        nonlocal lookups
        lookups += 1
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with AsyncKVStore("db", url="https://kv.invalid", retry=POLICY) as store:
        error = await failed(store, verb)
    fields = {"host": "kv.invalid:443", "status": None}
    check(error, verb, Case(ConnectError, attempts=1, maybe_applied=False, fields=fields))
    # By the call, and once more by the look at what it waits for.
    assert lookups == 2
    assert "cannot be resolved" in str(error)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", ["unknown authority", "another name"])
async def test_certificate_that_is_not_trusted_is_not_tried_again(verb: str, fault: str, tmp_path: Any) -> None:
    authority, received = trustme.CA(), 0

    async def handle(_request: web.BaseRequest) -> web.StreamResponse:
        nonlocal received
        received += 1
        return web.json_response({"value": "v"})

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1" if fault == "unknown authority" else "kv.example").configure_cert(context)
    trusted = trustme.CA() if fault == "unknown authority" else authority
    trusted.cert_pem.write_to_path(tmp_path / "ca.pem")
    runner = web.ServerRunner(web.Server(handle))
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        options = HttpOptions(ca_file=str(tmp_path / "ca.pem"))
        async with AsyncKVStore("db", url=f"https://127.0.0.1:{site.port}", http=options, retry=POLICY) as store:
            error = await failed(store, verb)
    finally:
        await runner.cleanup()
    check(error, verb, Case(ConnectError, attempts=1, maybe_applied=False, fields={"transient": False}))
    assert "certificate is not trusted" in str(error)
    assert received == 0
