"""What is sent again and what is not, counted at the server, and what an error tells of it."""

import asyncio
import contextlib
import logging
import pickle
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import aiohttp
import pytest
from aiohttp import web
from helpers import all_texts, no_wait
from yarl import URL

from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.http.options import HttpOptions
from aiokv.backends.http.retry import RetryPolicy
from aiokv.errors import (
    AuthenticationError,
    CallError,
    CallTimeoutError,
    ConnectError,
    PoolTimeoutError,
    RejectedError,
    ResponseError,
    StorageFullError,
    StoreClosedError,
    ThrottledError,
    TransportError,
    UnavailableError,
    ValueTooLargeError,
)
from aiokv.testing import ScriptedService
from aiokv.wire import MAX_ANSWER_BYTES, TOKEN_PATH

VERBS = ["get", "set", "delete"]
VALUE = "s3cret value"


@dataclass(frozen=True)
class Step:
    """What the service does with one request."""

    status: int = 200
    body: bytes = b'{"value": "v"}'
    headers: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""


OK = Step()
DROP, RESET, HANG = Step(fault="drop"), Step(fault="reset"), Step(fault="hang")


async def perform(step: Step, request: web.BaseRequest) -> web.StreamResponse:
    transport = request.transport
    if step.fault and transport is not None:
        if step.fault == "hang":
            while not transport.is_closing():
                await asyncio.sleep(0.002)
        if step.fault == "reset":
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.abort()
    return web.Response(status=step.status, body=step.body, headers=step.headers)


@contextlib.asynccontextmanager
async def service(
    *steps: Step,
    policy: RetryPolicy | None = None,
    pool_size: int = 100,
    sleep: Callable[[float], Awaitable[None]] = no_wait,
) -> AsyncGenerator[tuple[RemoteBackend, ScriptedService]]:
    """Run a service that takes one step a request, the last one for ever, and a backend that speaks to it."""
    remaining = list(steps)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return await perform(remaining.pop(0) if len(remaining) > 1 else remaining[0], request)

    async with ScriptedService(handler=answer) as recorded:
        url = recorded.url
        backend = RemoteBackend(URL(url), policy=policy, options=HttpOptions(pool_size=pool_size), sleep=sleep)
        try:
            yield backend, recorded
        finally:
            await backend.aclose()


Connected = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw_service(answer: Connected, scheme: str = "http") -> AsyncGenerator[RemoteBackend]:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    backend = RemoteBackend(URL(f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"), sleep=no_wait)
    try:
        yield backend
    finally:
        await backend.aclose()
        server.close()
        await server.wait_closed()


async def send_and_close(writer: asyncio.StreamWriter, answer: bytes) -> None:
    writer.write(answer)
    await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def call(backend: RemoteBackend, verb: str, key: str = "key") -> str | None:
    if verb == "get":
        return await backend.get("db", key)
    if verb == "set":
        await backend.set("db", key, VALUE, 60)
    else:
        await backend.delete("db", key)
    return None


async def failure(backend: RemoteBackend, verb: str) -> CallError:
    with pytest.raises(CallError) as caught:
        await call(backend, verb)
    return caught.value


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("policy", "sends"), [(None, 4), (RetryPolicy.none(), 1), (RetryPolicy(attempts=7), 7)], ids=["default", "none", "seven"]
)
async def test_failing_service_sees_exactly_the_attempts(verb: str, policy: RetryPolicy | None, sends: int) -> None:
    async with service(Step(503), policy=policy) as (backend, recorded):
        error = await failure(backend, verb)
    assert len(recorded.requests) == error.attempts == sends
    assert isinstance(error, UnavailableError)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("attempts", [1, 4])
@pytest.mark.parametrize("fault", [DROP, RESET], ids=["drop", "reset"])
@pytest.mark.parametrize("reused", [False, True], ids=["new", "reused"])
async def test_broken_connection_is_not_resent_behind_our_back(verb: str, attempts: int, fault: Step, *, reused: bool) -> None:
    steps = [OK, fault] if reused else [fault]
    async with service(*steps, policy=RetryPolicy(attempts=attempts)) as (backend, recorded):
        if reused:
            await backend.get("db", "warm")
        error = await failure(backend, verb)
    assert len(recorded.requests) == attempts + reused
    assert error.attempts == attempts
    assert isinstance(error, TransportError)
    assert error.maybe_applied is (verb != "get")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("fault", [DROP, RESET, HANG, Step(503), Step(429)], ids=["drop", "reset", "hang", "503", "429"])
async def test_passing_fault_is_not_noticed(verb: str, fault: Step) -> None:
    async with service(fault, OK, policy=RetryPolicy(attempt_timeout=0.2)) as (backend, recorded):
        assert await call(backend, verb) == ("v" if verb == "get" else None)
    assert len(recorded.requests) == 2
    assert len(set(recorded.paths)) == 1
    assert {request.body for request in recorded.requests} == {VALUE.encode() if verb == "set" else b""}


async def test_large_value_is_sent_again_whole() -> None:
    value = "é" * 950_000
    received: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        received.append(await reader.readexactly(1_900_000))
        await send_and_close(writer, b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\n{}" % (503 if len(received) == 1 else 200))

    async with raw_service(answer) as backend:
        await backend.set("db", "key", value, 60)
    assert [body == value.encode() for body in received] == [True, True]


@pytest.mark.parametrize(
    ("status", "kind", "sends", "maybe_applied"),
    [
        *((status, RejectedError, 4, False) for status in (408, 409, 425)),
        (429, ThrottledError, 4, False),
        *((status, UnavailableError, 4, True) for status in (500, 502, 503, 504)),
        *((status, RejectedError, 1, False) for status in (302, 400, 404, 405, 410, 422)),
        *((status, AuthenticationError, 1, False) for status in (401, 403)),
        (413, ValueTooLargeError, 1, False),
        *((status, UnavailableError, 1, False) for status in (501, 505)),
        (507, StorageFullError, 1, False),
        *((status, UnavailableError, 1, True) for status in (506, 508, 599)),
    ],
)
@pytest.mark.parametrize("verb", ["set", "delete"])
async def test_status_decides_retry_error_and_outcome(
    verb: str, status: int, kind: type[CallError], sends: int, *, maybe_applied: bool
) -> None:
    async with service(Step(status, b'{"error": "no"}')) as (backend, recorded):
        error = await failure(backend, verb)
    assert type(error) is kind
    assert len(recorded.requests) == error.attempts == sends
    assert (error.status, error.maybe_applied) == (status, maybe_applied)


async def test_absent_key_is_none_for_a_get_alone() -> None:
    async with service(Step(404, b"<html>")) as (backend, recorded):
        assert await backend.get("db", "key") is None
    assert len(recorded.requests) == 1


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"<html>", "text/html; charset=utf-8", "look at the host and the port in the URL"),
        (b'{"error":"no such path; known: /get/, /set/"}', "application/json", "look at the path in the URL"),
    ],
)
async def test_404_that_is_not_about_the_key_is_no_answer_to_a_get(body: bytes, content_type: str, words: str) -> None:
    async with service(Step(404, body, {"Content-Type": content_type})) as (backend, recorded):
        with pytest.raises(ResponseError, match=words) as caught:
            await backend.get("db", "key")
    assert (caught.value.status, caught.value.key, len(recorded.requests)) == (404, "key", 1)


@pytest.mark.parametrize("status", [201, 202, 204])
async def test_success_that_the_protocol_does_not_know_leaves_the_outcome_open(status: int) -> None:
    async with service(Step(status, b"")) as (backend, recorded):
        error = await failure(backend, "set")
    assert isinstance(error, ResponseError)
    assert (error.maybe_applied, len(recorded.requests)) == (True, 1)


def later(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (lambda: "7", 7, 8),
        (lambda: " 7 ", 7, 8),
        (lambda: later(7), 5.5, 8),
        (lambda: later(-100), 0, 1),
        (lambda: "0", 0, 1),
        (lambda: "soon", 0, 1),
        (lambda: "-5", 0, 1),
    ],
    ids=["seconds", "spaces", "date", "past", "zero", "word", "negative"],
)
async def test_wait_comes_on_top_of_retry_after(header: Callable[[], str], least: float, most: float, status: int) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await no_wait(seconds)

    async with service(Step(status, headers={"Retry-After": header()}), OK, sleep=sleep) as (backend, recorded):
        assert await backend.get("db", "key") == "v"
    assert len(recorded.requests) == 2
    assert len(waits) == 1
    assert least <= waits[0] <= most


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("header", [lambda: "3600", lambda: later(3600), lambda: "9" * 400], ids=["seconds", "date", "huge"])
async def test_retry_after_past_the_deadline_fails_at_once_and_is_told(header: Callable[[], str], status: int) -> None:
    async with service(Step(status, headers={"Retry-After": header()}), OK) as (backend, recorded):
        error = await failure(backend, "get")
    assert len(recorded.requests) == error.attempts == 1
    assert error.retry_after is not None
    assert error.retry_after >= 3590
    assert "asks to wait" in str(error)


@pytest.mark.parametrize(
    ("error", "bounds"),
    [
        (UnavailableError("x"), [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2]),
        (ThrottledError("x"), [1, 2, 4, 8, 16, 20, 20, 20]),
        (UnavailableError("x", retry_after=0.0), [1, 2, 4, 8, 16, 20, 20, 20]),
    ],
    ids=["transient", "throttled", "with_retry_after"],
)
def test_waits_are_drawn_from_zero_to_a_doubling_bound(error: CallError, bounds: list[float]) -> None:
    for retry_number, bound in enumerate(bounds, start=1):
        drawn = [RetryPolicy().wait_seconds(retry_number, error) for _ in range(300)]
        assert 0 <= min(drawn) < bound * 0.2
        assert bound * 0.8 < max(drawn) <= bound
    assert RetryPolicy().wait_seconds(100_000, error) <= 20


@pytest.mark.parametrize("attempt_timeout", [0.1, 10.0])
async def test_deadline_spans_all_attempts(attempt_timeout: float) -> None:
    policy = RetryPolicy(attempts=1000, total_timeout=0.25, attempt_timeout=attempt_timeout, backoff_base=0)
    async with service(HANG, policy=policy) as (backend, recorded):
        error = await failure(backend, "set")
    assert isinstance(error, CallTimeoutError)
    assert error.elapsed is not None
    assert 0.2 <= error.elapsed < 5
    assert 1 <= len(recorded.requests) <= error.attempts <= 3
    assert error.maybe_applied


@pytest.mark.parametrize("verb", VERBS)
async def test_refused_connection_says_that_nothing_was_sent(verb: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    backend = RemoteBackend(URL(f"http://127.0.0.1:{port}"), policy=RetryPolicy(wait_for_ready=0.05))
    error = await failure(backend, verb)
    await backend.aclose()
    assert isinstance(error, ConnectError)
    assert (error.attempts, error.maybe_applied, error.host) == (1, False, f"127.0.0.1:{port}")


async def test_unknown_host_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_arguments: object, **_options: object) -> list[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    backend = RemoteBackend(URL("https://kv.invalid"), policy=RetryPolicy(wait_for_ready=0))
    error = await failure(backend, "set")
    await backend.aclose()
    assert isinstance(error, ConnectError)
    assert "Name or service not known" in str(error)
    assert not error.maybe_applied


async def test_server_that_hangs_up_on_plain_http_may_want_tls() -> None:
    async with service(*[DROP] * 4) as (backend, _):
        assert "may want https://" in str(await failure(backend, "get"))


async def test_failed_tls_handshake_is_told_in_words() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        await send_and_close(writer, b"HTTP/1.1 400 No\r\n\r\n")

    async with raw_service(answer, scheme="https") as backend:
        error = await failure(backend, "get")
    assert isinstance(error, ConnectError)
    assert "TLS handshake" in str(error)
    assert "not permitted" not in str(error)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("first", "unknown"), [(DROP, True), (RESET, True), (HANG, True), (Step(503), True), (Step(429), False)]
)
@pytest.mark.parametrize("refusal", [400, 403])
async def test_refusal_after_an_unknown_outcome_leaves_it_unknown(
    verb: str, first: Step, refusal: int, *, unknown: bool
) -> None:
    async with service(first, Step(refusal), policy=RetryPolicy(attempt_timeout=0.2)) as (backend, _):
        error = await failure(backend, verb)
    assert (error.status, error.attempts) == (refusal, 2)
    assert error.maybe_applied is (unknown and verb != "get")


UNDECODABLE = [b"", b"s3cret", b"<html>s3cret</html>", b'["s3cret"]', b'{"value": 5, "x": "s3cret"}', b'{"value": "s3cret']


@pytest.mark.parametrize("body", [*UNDECODABLE, b'{"value": "s3cret\xff"}', b'{"value": "s3cret\\ud800"}', b"null"])
async def test_undecodable_answer_is_not_retried_and_not_shown(body: bytes) -> None:
    async with service(Step(200, body)) as (backend, recorded):
        error = await failure(backend, "get")
    assert isinstance(error, ResponseError)
    assert len(recorded.requests) == 1
    assert (error.status, error.verb, error.key) == (200, "get", "key")
    assert "s3cret" not in all_texts(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


async def test_undecodable_answer_bears_the_facts_of_its_call() -> None:
    async with service(Step(503), Step(200, b"<html>", {"X-Request-Id": "r-7"})) as (backend, recorded):
        error = await failure(backend, "get")
    assert isinstance(error, ResponseError)
    assert len(recorded.requests) == error.attempts == 2
    assert error.request_id == "r-7"
    assert error.elapsed is not None


NOT_HTTP = {
    "garbage": b"hello\r\n\r\n",
    "bad_chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nabc",
    "long_header": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",
    "two_lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
}


@pytest.mark.parametrize("name", NOT_HTTP)
async def test_answer_that_is_not_http_is_not_retried_and_shows_no_token(name: str) -> None:
    sends = 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sends
        if request.path == TOKEN_PATH:
            return web.json_response({"token": "t0ken", "token_type": "Bearer", "expires_at": "2099-01-01T00:00:00Z"})
        sends += 1
        assert request.transport is not None
        request.transport.write(NOT_HTTP[name])
        return await perform(HANG, request)

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), credentials="id:hunter2", sleep=no_wait, policy=RetryPolicy(attempt_timeout=2))
        error = await failure(backend, "set")
        await backend.aclose()
    assert isinstance(error, ResponseError)
    assert (sends, error.maybe_applied) == (1, True)
    assert "t0ken" not in all_texts(error)
    assert "hunter2" not in all_texts(error)


@pytest.mark.parametrize("header", ["X-Fal-Request-Id", "X-Request-Id"])
@pytest.mark.parametrize("verb", VERBS)
async def test_error_bears_all_facts_and_survives_pickling(verb: str, header: str) -> None:
    async with service(Step(503, b'{"error": "down"}', {header: "r-1", "Retry-After": "0"})) as (backend, recorded):
        error = await failure(backend, verb)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert type(each) is UnavailableError
        assert (each.verb, each.db_name, each.key) == (verb, "db", "key")
        assert (each.status, each.attempts, each.retry_after, each.request_id) == (503, 4, 0.0, "r-1")
        assert each.host == recorded.requests[0].headers["Host"]
        assert each.elapsed is not None
        assert each.maybe_applied is (verb != "get")
        assert str(each) == str(error)
        assert "down" in str(each)


async def test_request_id_that_is_no_text_can_still_be_printed() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await send_and_close(writer, b"HTTP/1.1 400 No\r\nX-Request-Id: \xff\xfe\r\nContent-Length: 0\r\n\r\n")

    async with raw_service(answer) as backend:
        error = await failure(backend, "get")
    assert error.status == 400
    assert str(error).encode()


@pytest.mark.parametrize("size", [1, 100_000, 1_900_000])
async def test_service_that_closes_before_the_body_came_is_told_with_the_key_cut(size: int) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await send_and_close(writer, b"HTTP/1.1 413 No\r\nContent-Length: 0\r\n\r\n")

    async with raw_service(answer) as backend:
        for _ in range(5):
            with pytest.raises(CallError) as caught:
                await backend.set("db", "k" * 5000, "v" * size, 60)
            assert isinstance(caught.value, ValueTooLargeError | TransportError)
            assert len(str(caught.value)) < 500


async def test_call_without_a_connection_in_time_says_so() -> None:
    async with service(HANG, policy=RetryPolicy(total_timeout=0.1), pool_size=1) as (backend, recorded):
        first, second = await asyncio.gather(*(call(backend, "set", key) for key in ("a", "b")), return_exceptions=True)
    assert type(first) is CallTimeoutError
    assert isinstance(second, PoolTimeoutError)
    assert "pool_size" in str(second)
    assert not second.maybe_applied
    assert len(recorded.requests) == 1


async def test_cancelled_call_is_not_tried_again() -> None:
    async with service(HANG) as (backend, recorded):
        task = asyncio.create_task(call(backend, "set"))
        while not recorded.requests:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.02)
    assert len(recorded.requests) == 1


async def test_cancelled_calls_leak_no_connection() -> None:
    dice = random.Random(7)

    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(dice.uniform(0, 0.001))
        return web.json_response({"value": "v" * dice.choice([1, 300_000])})

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), options=HttpOptions(pool_size=1), policy=RetryPolicy(total_timeout=5))
        tasks = [asyncio.create_task(backend.get("db", "key")) for _ in range(100)]
        for task in tasks:
            await asyncio.sleep(dice.choice([0, dice.uniform(0, 0.002)]))
            task.cancel()
        await asyncio.wait(tasks)
        for _ in range(3):
            assert str(await backend.get("db", "key")).strip("v") == ""
        assert any(task.cancelled() for task in tasks)
        await backend.aclose()


@pytest.mark.parametrize("verb", ["get", "set"])
async def test_answer_larger_than_any_value_is_refused_while_it_streams(verb: str) -> None:
    sent = sends = 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal sent, sends
        sends += 1
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while sent < 10 * MAX_ANSWER_BYTES:
                await response.write(bytes(2**18))
                sent += 2**18
        return response

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), sleep=no_wait)
        error = await failure(backend, verb)
        await backend.aclose()
    assert isinstance(error, ResponseError)
    assert sends == 1
    assert sent < 3 * MAX_ANSWER_BYTES
    assert error.maybe_applied is (verb == "set")


async def test_large_error_body_does_not_break_the_pool() -> None:
    large = Step(400, b'{"error": "%s"}' % (b"x" * 300_000))
    async with service(*([large] * 10), OK, pool_size=1, policy=RetryPolicy(total_timeout=5)) as (backend, _):
        for outcome in await asyncio.gather(*(call(backend, "get") for _ in range(10)), return_exceptions=True):
            assert isinstance(outcome, RejectedError)
            assert outcome.status == 400
            assert len(str(outcome)) < 500
        assert await backend.get("db", "key") == "v"


@pytest.mark.parametrize("status", [400, 500])
async def test_value_echoed_by_the_service_is_masked(status: int, caplog: pytest.LogCaptureFixture) -> None:
    echo = f'{{"error": "cannot store {VALUE} here"}}'.encode()
    with caplog.at_level(logging.DEBUG):
        async with service(Step(status, echo)) as (backend, _):
            error = await failure(backend, "set")
    assert "cannot store *** here" in str(error)
    assert VALUE not in all_texts(error)
    assert VALUE not in caplog.text


async def test_concurrent_retries_do_not_mix_up_results() -> None:
    seen: Counter[str] = Counter()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        key = request.raw_path.rpartition("/")[2]
        seen[key] += 1
        await asyncio.sleep(0.005)
        return web.json_response({"value": f"of {key}"}, status=503 if seen[key] == 1 else 200)

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        backend = RemoteBackend(URL(url), sleep=no_wait)
        assert await asyncio.gather(*(backend.get("db", f"k{n}") for n in range(30))) == [f"of k{n}" for n in range(30)]
        await backend.aclose()
    assert set(seen.values()) == {2}


@pytest.mark.parametrize("verb", ["set", "delete"])
@pytest.mark.parametrize("body", [b"", b"<html>Welcome to the hotel</html>", b"[]", b"null"])
async def test_page_that_answers_a_write_in_the_services_place_is_no_success(verb: str, body: bytes) -> None:
    async with service(Step(200, body)) as (backend, recorded):
        error = await failure(backend, verb)
    assert isinstance(error, ResponseError)
    assert (error.maybe_applied, len(recorded.requests)) == (True, 1)


async def test_full_disk_after_a_broken_connection_does_not_contradict_itself() -> None:
    full = Step(507, b'{"error": "the store has no room left; nothing was stored"}')
    async with service(DROP, full) as (backend, _):
        error = await failure(backend, "set")
    assert error.maybe_applied
    assert "nothing was stored; an earlier attempt may have been applied" in str(error)
    assert "the set may have been applied" in str(error)


async def test_full_disk_says_that_nothing_was_applied() -> None:
    async with service(Step(507, b'{"error": "the store has no room left; nothing was stored"}')) as (backend, _):
        error = await failure(backend, "set")
    assert (error.status, error.maybe_applied) == (507, False)
    assert "the set was not applied" in str(error)


@pytest.mark.parametrize("verb", ["set", "delete"])
async def test_call_whose_time_is_over_before_it_has_a_connection_was_not_applied(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect_for_ever(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", connect_for_ever)
    backend = RemoteBackend(URL("http://127.0.0.1:1"), policy=RetryPolicy(attempts=1, total_timeout=0.05))
    error = await failure(backend, verb)
    assert type(error) is CallTimeoutError
    assert not error.maybe_applied
    assert "no connection before the call's time was over" in str(error)
    assert not backend._transport._connector.unconnected
    await backend.aclose()


async def test_write_whose_store_closes_before_it_has_a_connection_was_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    connecting = asyncio.Event()

    async def connect_for_ever(*_: object, **__: object) -> None:
        connecting.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(aiohttp.TCPConnector, "_create_connection", connect_for_ever)
    backend = RemoteBackend(URL("http://127.0.0.1:1"), policy=RetryPolicy.none())
    call = asyncio.create_task(failure(backend, "set"))
    await connecting.wait()
    await backend.aclose()
    error = await call
    assert (type(error), error.maybe_applied) == (StoreClosedError, False)


async def test_request_id_that_echoes_the_value_is_masked() -> None:
    async with service(Step(400, b"{}", {"X-Request-Id": f"r-{VALUE}"})) as (backend, _):
        error = await failure(backend, "set")
    assert error.request_id == "r-***"


@pytest.mark.parametrize("status", [200, 400, 503])
@pytest.mark.parametrize("secret", ["t0ken-of-the-call", "hunter2-of-the-key"])
async def test_request_id_that_echoes_a_credential_is_masked(status: int, secret: str) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == TOKEN_PATH:
            token = {"token": "t0ken-of-the-call", "token_type": "Bearer", "expires_at": "2099-01-01T00:00:00Z"}
            return web.json_response(token)
        return web.json_response([], status=status, headers={"X-Request-Id": f"r-{secret}"})

    async with ScriptedService(handler=answer) as scripted:
        backend = RemoteBackend(URL(scripted.url), credentials="id:hunter2-of-the-key", sleep=no_wait)
        error = await failure(backend, "set")
        await backend.aclose()
    assert error.request_id == "r-***"
    assert secret not in all_texts(error)


@pytest.mark.parametrize("header", ["9" * 400, "Fri, 31 Dec 9999 23:59:59 -2359"])
async def test_retry_after_past_every_clock_is_a_typed_error(header: str) -> None:
    async with service(Step(503, headers={"Retry-After": header}), OK) as (backend, recorded):
        error = await failure(backend, "get")
    assert isinstance(error, UnavailableError)
    assert len(recorded.requests) == 1


async def test_timeouts_that_a_program_computes_are_not_kept() -> None:
    async with service(OK) as (backend, _):
        for number in range(200):
            await backend.with_options(RetryPolicy(total_timeout=5 + number / 100), None).get("db", "key")
        assert len(backend._transport._deadlines) <= 64


@pytest.mark.parametrize("total", [0.15, 10.0], ids=["total", "attempt"])
async def test_one_timer_for_all_attempts_ends_each_in_its_own_time(total: float) -> None:
    policy = RetryPolicy(attempts=1, total_timeout=total, attempt_timeout=0.15)
    async with service(HANG, policy=policy) as (backend, _):
        calls = []
        for number in range(5):
            calls.append(asyncio.create_task(failure(backend, "set")))
            await asyncio.sleep(0.01 * number)
        errors = await asyncio.gather(*calls)
    assert {type(error) for error in errors} == {CallTimeoutError}
    assert all(0.14 <= (error.elapsed or 0) < 5 for error in errors)
    assert not any(deadline.waiting for deadline in backend._transport._deadlines.values())


async def test_cancellation_in_the_moment_of_the_timeout_stays_a_cancellation() -> None:
    async with service(HANG, policy=RetryPolicy(attempts=1, attempt_timeout=5)) as (backend, recorded):
        task = asyncio.create_task(call(backend, "set"))
        while not recorded.requests:
            await asyncio.sleep(0.001)
        (deadline,) = backend._transport._deadlines.values()
        deadline._expire()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@contextlib.asynccontextmanager
async def held_calls(count: int) -> AsyncGenerator[tuple[list[asyncio.Task[None]], asyncio.Event]]:
    """Yield sets that a service has got, each sent once, and what lets it answer them."""
    answers, arrived = asyncio.Event(), 0

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        nonlocal arrived
        arrived += 1
        await answers.wait()
        return web.json_response({"ok": True})

    async with ScriptedService(handler=answer) as scripted:
        backend = RemoteBackend(URL(scripted.url), policy=RetryPolicy(attempts=1))
        calls = [asyncio.create_task(backend.set("db", f"k{number}", VALUE, 60)) for number in range(count)]
        async with asyncio.timeout(10):
            while arrived < count:
                await asyncio.sleep(0.001)
        yield calls, answers
        answers.set()
        await backend.aclose()


def stand_still(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let time pass in which the event loop does nothing."""
    loop = asyncio.get_running_loop()
    time = loop.time
    monkeypatch.setattr(loop, "time", lambda: time() + seconds)


async def test_calls_that_are_answered_after_a_standstill_are_not_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async with held_calls(64) as (calls, answers):
        stand_still(monkeypatch, 25.0)
        answers.set()
        assert await asyncio.gather(*calls) == [None] * 64


async def test_calls_that_are_not_answered_after_a_standstill_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async with held_calls(3) as (calls, _):
        stand_still(monkeypatch, 25.0)
        async with asyncio.timeout(8):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [CallTimeoutError] * 3


async def test_loop_that_stands_still_again_and_again_ends_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    async with held_calls(3) as (calls, _):
        for _ in range(50):
            # Longer than a call may wait for what has come meanwhile.
            stand_still(monkeypatch, 5.0)
            await asyncio.sleep(0)
        assert all(call.done() for call in calls)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [CallTimeoutError] * 3
