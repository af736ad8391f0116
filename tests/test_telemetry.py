"""What an observer is told of calls, in which order, and what it is never told."""

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from aiohttp import web
from helpers import FakeClock, no_wait
from yarl import URL

from aiokv import AsyncKVStore, BatchError, HedgePolicy, Lost, RetryPolicy
from aiokv.backends.capabilities import ClaimOutcome, Entry
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.observed import ObservedBackend
from aiokv.errors import CallError, RejectedError, UnavailableError
from aiokv.telemetry import CallEnded, CallHedged, CallRetried, CallStarted, Event, ObservedCall, TokenRenewed
from aiokv.testing import ScriptedService
from aiokv.wire import TOKEN_PATH

KEY = "account:hunter2"
TOKEN = "t0ken-of-the-service"
VALUE = "s3cret value"


class SlowBackend(MemoryBackend):
    """Never answer a get."""

    async def get(self, db_name: str, key: str) -> str | None:
        await asyncio.Event().wait()
        return await super().get(db_name, key)


class Waits:
    """Stand in for the sleep between attempts, and keep what was asked for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await no_wait(seconds)


@asynccontextmanager
async def watched_service(
    *statuses: int, credentials: str | None = None, waits: Waits | None = None
) -> AsyncGenerator[tuple[ObservedBackend, list[Event], ScriptedService]]:
    """Run a service of these answers, the last one for ever, which echoes all that it is told; watch calls of it."""
    remaining = list(statuses)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        status = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if status == 200 and request.path == TOKEN_PATH:
            return web.json_response({"token": TOKEN, "token_type": "Bearer", "expires_at": "2999-01-01T00:00:00+00:00"})
        if status == 200:
            return web.json_response({"value": VALUE} if request.method == "GET" else {})
        echo = f"no: {request.headers.get('Authorization')} {(await request.read()).decode()}"
        return web.json_response({"error": echo}, status=status)

    events: list[Event] = []
    async with ScriptedService(handler=answer) as recorded:
        url = recorded.url
        remote = RemoteBackend(URL(url), credentials=credentials, sleep=waits or no_wait)
        try:
            yield ObservedBackend(remote, events.append, url), events, recorded
        finally:
            await remote.aclose()


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def ended(events: list[Event]) -> CallEnded:
    (end,) = (event for event in events if isinstance(event, CallEnded))
    return end


async def test_each_call_is_told_from_its_start_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr("aiokv.telemetry.time.perf_counter", clock)

    class Slow(MemoryBackend):
        async def get(self, db_name: str, key: str) -> str | None:
            clock.advance(0.25)
            return await super().get(db_name, key)

    events: list[Event] = []
    backend = ObservedBackend(Slow(), events.append, "memory://here")
    await backend.get("db", "key")
    await backend.set("db", "key", VALUE, 60)
    await backend.get("db", "key")
    await backend.delete("db", "key")
    starts, ends = events[::2], events[1::2]
    assert [(start.verb, start.db_name, start.key, start.url) for start in starts if isinstance(start, CallStarted)] == [
        (verb, "db", "key", "memory://here") for verb in ("get", "set", "get", "delete")
    ]
    assert ends == [
        CallEnded(start, seconds, attempts=1, hedged=False, found=found, error=None)
        for start, seconds, found in zip(starts, (0.25, 0.0, 0.25, 0.0), (False, None, True, None), strict=True)
        if isinstance(start, CallStarted)
    ]


async def test_store_tells_its_own_calls_alone_though_it_shares_a_backend() -> None:
    events: list[Event] = []
    url = "memory://shared-by-two"
    watched, other = AsyncKVStore("db", url=url, observer=events.append), AsyncKVStore("db", url=url)
    await other.set("key", VALUE)
    assert await watched.get("key") == VALUE
    await other.get("key")
    assert kinds(events) == ["CallStarted", "CallEnded"]
    # A batch is one call.
    await watched.get_many(["key", "none"])
    assert kinds(events).count("CallEnded") == 2


async def test_store_without_an_observer_makes_no_call_that_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("touched")

    monkeypatch.setattr(ObservedCall, "__init__", fail)
    async with AsyncKVStore("db", url="memory://unwatched") as store:
        await store.set("key", VALUE)
        assert await store.get("key") == VALUE
        assert type(store._backend_here()) is MemoryBackend


async def test_refused_argument_is_no_call() -> None:
    events: list[Event] = []
    store = AsyncKVStore("db", url="memory://", observer=events.append)
    with pytest.raises(ValueError, match="key"):
        await store.get("")
    assert events == []


async def test_failure_is_told_as_the_caller_sees_it() -> None:
    async with watched_service(403) as (backend, events, _):
        with pytest.raises(CallError) as caught:
            await backend.get("db", "key")
    assert kinds(events) == ["CallStarted", "CallEnded"]
    end = ended(events)
    assert end.error is caught.value
    assert (end.found, end.attempts) == (None, 1)


async def test_retries_are_told_between_start_and_end_with_their_waits() -> None:
    waits = Waits()
    async with watched_service(503, 429, 200, waits=waits) as (backend, events, recorded):
        assert await backend.get("db", "key") == VALUE
    assert kinds(events) == ["CallStarted", "CallRetried", "CallRetried", "CallEnded"]
    start, first, second, end = events
    assert isinstance(first, CallRetried)
    assert isinstance(second, CallRetried)
    assert isinstance(end, CallEnded)
    assert first.call is second.call is end.call is start
    assert [(event.attempt, event.error.status) for event in (first, second)] == [(1, 503), (2, 429)]
    assert [event.wait_seconds for event in (first, second)] == waits.seconds
    assert (end.attempts, end.found, end.error) == (3, True, None)
    assert len(recorded.requests) == 3


async def test_retries_of_another_store_in_the_same_task_are_not_told() -> None:
    async with watched_service(503, 200) as (backend, events, recorded):
        await ObservedBackend(MemoryBackend(), events.append, "memory://").get("db", "key")
        await backend._backend.get("db", "key")
    assert len(recorded.requests) == 2
    assert kinds(events) == ["CallStarted", "CallEnded"]


async def test_call_that_runs_out_of_attempts_is_retried_once_less_than_tried() -> None:
    async with watched_service(503) as (backend, events, recorded):
        with pytest.raises(UnavailableError) as caught:
            await backend.set("db", "key", VALUE, 60)
    assert kinds(events) == ["CallStarted", *["CallRetried"] * 3, "CallEnded"]
    assert ended(events).attempts == caught.value.attempts == len(recorded.requests) == 4


async def test_cancelled_call_ends_with_its_cancellation() -> None:
    events: list[Event] = []
    task = asyncio.create_task(ObservedBackend(SlowBackend(), events.append, "memory://").get("db", "key"))
    await asyncio.sleep(0)
    assert kinds(events) == ["CallStarted"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert isinstance(ended(events).error, asyncio.CancelledError)


def test_call_that_is_thrown_away_with_its_loop_ends_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    events: list[Event] = []
    loop = asyncio.new_event_loop()
    task = loop.create_task(ObservedBackend(SlowBackend(), events.append, "memory://").get("db", "key"))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    # What the collector meets and cannot raise, pytest takes for an error of this test.
    with caplog.at_level(logging.CRITICAL, "asyncio"):
        del task
        gc.collect()
    assert isinstance(ended(events).error, GeneratorExit)


async def test_observer_that_raises_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def observer(event: Event) -> None:
        raise ZeroDivisionError(type(event).__name__)

    store = AsyncKVStore("db", url="memory://watched-badly", observer=observer)
    await store.set("key", VALUE)
    assert await store.get("key") == VALUE
    told = [record for record in caplog.records if record.exc_info and record.exc_info[0] is ZeroDivisionError]
    assert len(told) == len(caplog.records) == 4
    assert {record.getMessage() for record in told} == {"the observer of a store failed"}


async def test_observer_that_raises_leaves_the_error_of_a_call_as_it_is() -> None:
    def observer(_: Event) -> None:
        raise ZeroDivisionError

    async def refuse(_: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"error": "no"}, status=400)

    async with ScriptedService(handler=refuse) as scripted, AsyncKVStore("db", url=scripted.url, observer=observer) as store:
        with pytest.raises(RejectedError):
            await store.get("key")


def test_equal_calls_are_two() -> None:
    first, second = (CallStarted("get", "db", "key", "memory://") for _ in range(2))
    assert first != second
    assert len({first, second}) == 2


async def test_concurrent_calls_are_not_mixed_up() -> None:
    asked: dict[str, int] = {}

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        # Of key n, the first n % 4 answers are failures, each with a status of its own.
        number = int(request.path.rpartition("/")[2])
        asked[request.path] = asked.get(request.path, -1) + 1
        await asyncio.sleep(0)
        failed = asked[request.path] < number % 4
        return web.json_response({"value": str(number)}, status=[500, 502, 503][asked[request.path]] if failed else 200)

    events: list[Event] = []
    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        remote = RemoteBackend(URL(url), sleep=no_wait)
        backend = ObservedBackend(remote, events.append, url)
        assert await asyncio.gather(*(backend.get("db", str(n)) for n in range(20))) == [str(n) for n in range(20)]
        await remote.aclose()
    for number in range(20):
        (start,) = (event for event in events if isinstance(event, CallStarted) and event.key == str(number))
        own = [event for event in events if isinstance(event, CallRetried | CallEnded) and event.call is start]
        assert [event.error.status for event in own[:-1] if isinstance(event, CallRetried)] == [500, 502, 503][: number % 4]
        assert isinstance(own[-1], CallEnded)
        assert own[-1].attempts == number % 4 + 1


async def test_read_that_is_sent_twice_is_told_once_between_start_and_end() -> None:
    held = asyncio.Event()
    late: list[bool] = []

    async def answer(_: web.BaseRequest) -> web.StreamResponse:
        if late and late.pop():
            await held.wait()
        return web.json_response({"value": VALUE})

    events: list[Event] = []
    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        hedge = HedgePolicy(min_wait=0.05, max_extra=1.0)
        async with AsyncKVStore("db", url=url, hedge=hedge, observer=events.append) as store:
            # How long answers take must be known before one is late.
            for _ in range(20):
                await store.get("key")
            events.clear()
            late.append(True)
            assert await store.get("key") == VALUE
            held.set()
    assert kinds(events) == ["CallStarted", "CallHedged", "CallEnded"]
    start, hedged, end = events
    assert isinstance(hedged, CallHedged)
    assert isinstance(end, CallEnded)
    assert hedged.call is end.call is start
    assert hedged.after_seconds > 0
    assert (end.hedged, end.attempts, end.error) == (True, 1, None)


async def test_renewal_of_a_token_is_told_once_for_all_that_wait_and_its_retries_are_nobodys() -> None:
    async with watched_service(503, 200, credentials=KEY) as (backend, events, recorded):
        await asyncio.gather(*(backend.get("db", str(n)) for n in range(5)))
    (renewed,) = (event for event in events if isinstance(event, TokenRenewed))
    assert renewed.url.endswith(TOKEN_PATH)
    assert renewed.error is None
    assert renewed.elapsed_seconds >= 0
    assert recorded.paths.count(TOKEN_PATH) == 2
    assert "CallRetried" not in kinds(events)
    assert {event.attempts for event in events if isinstance(event, CallEnded)} == {1}


async def test_token_that_cannot_be_had_is_told_with_its_error() -> None:
    async with watched_service(403, credentials=KEY) as (backend, events, _):
        with pytest.raises(CallError):
            await backend.get("db", "key")
    assert kinds(events) == ["CallStarted", "TokenRenewed", "CallEnded"]
    assert isinstance(events[1], TokenRenewed)
    assert isinstance(events[1].error, CallError)
    assert events[1].error.status == 403


@pytest.mark.parametrize("statuses", [(200,), (403,), (200, 503, 400), (200, 401, 200, 507)], ids=str)
async def test_no_event_bears_a_value_a_token_or_a_secret(statuses: tuple[int, ...]) -> None:
    async with watched_service(*statuses, credentials=KEY) as (backend, events, _):
        for call in (backend.set("db", "key", VALUE, 60), backend.get("db", "key")):
            with suppress(CallError):
                await call
    texts = [repr(event) for event in events]
    for event in events:
        error = getattr(event, "error", None)
        while error is not None:
            texts += [str(error), repr(error), repr(vars(error))]
            error = error.__cause__ or error.__context__
    assert len(events) >= 4
    for secret in (VALUE, TOKEN, "hunter2"):
        assert secret not in "\n".join(texts)


def test_long_key_is_whole_in_an_event_and_cut_where_it_is_shown() -> None:
    started = CallStarted("get", "db", "k" * 5000, "memory://")
    assert len(started.key) == 5000
    assert len(repr(started)) < 300


async def test_observer_stays_with_a_store_that_differs_in_options() -> None:
    events: list[Event] = []
    store = AsyncKVStore("db", url="memory://", observer=events.append)
    await store.with_options(retry=RetryPolicy.none()).get("key")
    assert kinds(events) == ["CallStarted", "CallEnded"]


@pytest.mark.parametrize("occasion", [CallStarted, CallRetried])
async def test_retries_of_a_call_that_an_observer_makes_are_not_told_of_the_observed_one(occasion: type[Event]) -> None:
    events: list[Event] = []
    others: list[asyncio.Task[None]] = []
    statuses = [503, 200]

    async def broken_once(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({"value": "v"}, status=statuses.pop(0))

    async def broken(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=503)

    async with ScriptedService(handler=broken_once) as scripted, ScriptedService(handler=broken) as audit_scripted:
        url = scripted.url
        audit_url = audit_scripted.url
        audit = AsyncKVStore("audit", url=audit_url, retry=RetryPolicy(attempts=2, backoff_base=0))

        async def note() -> None:
            with pytest.raises(UnavailableError):
                await audit.set("seen", "1")

        def observe(event: Event) -> None:
            events.append(event)
            if isinstance(event, occasion):
                others.append(asyncio.create_task(note()))

        policy = RetryPolicy(attempts=2, backoff_base=0)
        async with AsyncKVStore("db", url=url, retry=policy, observer=observe) as store:
            await store.get("k")
            await asyncio.gather(*others)
        await audit.aclose()
    assert [type(event) for event in events] == [CallStarted, CallRetried, CallEnded]


async def test_observer_that_is_cancelled_is_not_told_of_later_calls_that_nobody_watches() -> None:
    events: list[Event] = []

    async def broken(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=503)

    def observe(event: Event) -> None:
        events.append(event)
        raise asyncio.CancelledError

    async with (
        ScriptedService(handler=broken) as scripted,
        AsyncKVStore("db", url=scripted.url, retry=RetryPolicy(attempts=2)) as store,
    ):
        with pytest.raises(asyncio.CancelledError):
            await store.with_options(observer=observe).get("k")
        events.clear()
        with pytest.raises(UnavailableError):
            await store.get("k")
    assert events == []


async def test_observer_that_is_an_empty_container_is_told_too() -> None:
    class Recorder(list[Event]):
        def __call__(self, event: Event) -> None:
            self.append(event)

    events = Recorder()
    await AsyncKVStore("db", url="memory://").with_options(observer=events).get("k")
    assert len(events) == 2


async def test_observer_of_a_cancelled_wait_is_told_of_the_attempts_that_were_made() -> None:
    events: list[Event] = []

    async def broken(_request: web.BaseRequest) -> web.StreamResponse:
        return web.json_response({}, status=503)

    policy = RetryPolicy(attempts=2, backoff_base=25.0, backoff_cap=25.0)
    async with (
        ScriptedService(handler=broken) as recorded,
        AsyncKVStore("db", url=recorded.url, retry=policy, observer=events.append) as store,
    ):
        call = asyncio.create_task(store.get("k"))
        while not any(isinstance(event, CallRetried) for event in events):
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    ended = events[-1]
    assert isinstance(ended, CallEnded)
    assert (ended.attempts, len(recorded.requests)) == (1, 1)


async def test_batch_is_one_call_that_bears_the_number_of_its_keys_and_none_of_them() -> None:
    events: list[Event] = []
    store = AsyncKVStore("db", backend=MemoryBackend(), observer=events.append)
    values = {f"{KEY}-{i}": VALUE for i in range(1_500)}
    await store.set_many(values)
    await store.get_many(values)
    await store.delete_many(values)
    starts = [event for event in events if isinstance(event, CallStarted)]
    assert [(start.verb, start.key, start.keys) for start in starts] == [
        (verb, "", keys) for verb in ("set_many", "get_many", "delete_many") for keys in (1_000, 500)
    ]
    assert [(end.found, end.error, end.failed_keys) for end in events if isinstance(end, CallEnded)] == [(None, None, 0)] * 6
    assert repr(events[0]) == "CallStarted(set_many 1,000 keys in db 'db' at backend://MemoryBackend)"
    assert KEY not in repr(events)
    assert VALUE not in repr(events)


async def test_batch_of_which_some_keys_fail_ends_with_the_first_error_and_their_number() -> None:
    class Half(MemoryBackend):
        async def set_many(self, db_name: str, entries: Sequence[Entry]) -> Any:
            await super().set_many(db_name, entries)
            return [errors.get(entry.key) for entry in entries]

    errors = {"b": UnavailableError("broken"), "c": RejectedError("refused")}
    events: list[Event] = []
    with suppress(BatchError):
        await AsyncKVStore("db", backend=Half(), observer=events.append).set_many(dict.fromkeys("abc", VALUE))
    assert (ended(events).error, ended(events).failed_keys) == (errors["b"], 2)


async def test_batch_that_fails_as_a_whole_ends_with_its_error() -> None:
    class Broken(MemoryBackend):
        async def get_many(self, db_name: str, keys: Sequence[str]) -> Any:  # noqa: ARG002 (a backend's)
            raise error

    error = UnavailableError("broken")
    events: list[Event] = []
    with suppress(BatchError):
        await AsyncKVStore("db", backend=Broken(), observer=events.append).get_many(["a", "b"])
    assert (ended(events).error, ended(events).failed_keys) == (error, 0)


async def test_pages_counts_steps_and_claims_are_calls_and_owners_are_told_to_nobody() -> None:
    owners: list[str] = []

    class Claims(MemoryBackend):
        async def claim(self, db_name: str, key: str, owner: str, seconds: float) -> ClaimOutcome:
            owners.append(owner)
            return await super().claim(db_name, key, owner, seconds)

    events: list[Event] = []
    store = AsyncKVStore("db", backend=Claims(), observer=events.append)
    await store.set_many({f"k{i}": VALUE for i in range(1_500)})
    events.clear()
    listing = store.keys("k")
    assert len([info async for info in listing]) == 1_500
    await store.count("k1")
    await store.clear()
    async with store.claim(KEY):
        pass
    async with store.watch() as changes:
        assert await anext(changes) == Lost()
    starts = [event for event in events if isinstance(event, CallStarted)]
    assert [(start.verb, start.key, start.keys) for start in starts] == [
        *[("keys", "k", 1)] * 2,
        ("count", "k1", 1),
        *[("clear", "", 1)] * 2,
        ("claim", KEY, 1),
        ("release", KEY, 1),
    ]
    assert kinds(events).count("CallEnded") == len(starts)
    assert owners
    assert owners[0] not in repr(events)


async def test_retries_of_a_batch_are_told_as_those_of_its_call() -> None:
    answers = [503, 200]

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        headers = {"Aiokv-Extensions": "batch"}
        if request.method == "GET":
            return web.json_response({"value": VALUE}, headers=headers)
        status = answers.pop(0)
        body = {"values": [VALUE, VALUE]} if status == 200 else {"error": "later"}
        return web.json_response(body, status=status, headers=headers)

    events: list[Event] = []
    async with ScriptedService(handler=answer) as recorded:
        remote = RemoteBackend(URL(recorded.url), sleep=no_wait)
        try:
            await remote.get("db", "first")
            store = AsyncKVStore("db", backend=remote, observer=events.append)
            assert await store.get_many(["a", "b"]) == {"a": VALUE, "b": VALUE}
        finally:
            await remote.aclose()
    assert kinds(events) == ["CallStarted", "CallRetried", "CallEnded"]
    assert ended(events).attempts == 2
