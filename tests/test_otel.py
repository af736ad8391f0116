"""Spans and metrics as OpenTelemetry's own SDK receives them, by the names that its conventions give."""

import asyncio
import contextlib
import gc
import importlib
import logging
import pickle
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from helpers import clean_environment, no_wait
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Sampler
from opentelemetry.semconv.attributes.db_attributes import (
    DB_NAMESPACE,
    DB_OPERATION_NAME,
    DB_RESPONSE_STATUS_CODE,
    DB_SYSTEM_NAME,
)
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.server_attributes import SERVER_ADDRESS, SERVER_PORT
from opentelemetry.semconv.metrics.db_metrics import DB_CLIENT_OPERATION_DURATION
from opentelemetry.trace import NoOpTracerProvider, SpanKind, StatusCode
from yarl import URL

from aiokv import AsyncKVStore, BatchError, CacheEvent, kv_cached
from aiokv.backends.base import Backend
from aiokv.backends.http.backend import RemoteBackend
from aiokv.backends.memory import MemoryBackend
from aiokv.backends.observed import ObservedBackend
from aiokv.errors import CallError, TransportError
from aiokv.otel import OpenTelemetryObserver
from aiokv.telemetry import CallEnded, CallHedged, CallStarted, TokenRenewed
from aiokv.testing import ScriptedService

KEY = "customer-4711"
VALUE = "s3cret value"
URLS: dict[str, dict[str, str | int]] = {
    "memory://": {DB_SYSTEM_NAME: "aiokv"},
    "sqlite:////home/somebody/kv.db": {DB_SYSTEM_NAME: "sqlite"},
    "https://kv.example.com/prefix": {DB_SYSTEM_NAME: "aiokv", SERVER_ADDRESS: "kv.example.com"},
    "https://kv.example.com:443": {DB_SYSTEM_NAME: "aiokv", SERVER_ADDRESS: "kv.example.com"},
    "http://kv.example.com": {DB_SYSTEM_NAME: "aiokv", SERVER_ADDRESS: "kv.example.com"},
    "http://127.0.0.1:8787": {DB_SYSTEM_NAME: "aiokv", SERVER_ADDRESS: "127.0.0.1", SERVER_PORT: 8787},
    "https://[::1]:80": {DB_SYSTEM_NAME: "aiokv", SERVER_ADDRESS: "::1", SERVER_PORT: 80},
}


class Watch:
    """An SDK that keeps in memory what an observer gives it."""

    def __init__(self, *, sampler: Sampler = ALWAYS_ON, include_keys: bool = False) -> None:
        self._spans = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(sampler, shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self.tracer_provider.get_tracer("the program")
        self.observer = OpenTelemetryObserver(
            tracer_provider=self.tracer_provider, meter_provider=self.meter_provider, include_keys=include_keys
        )

    def backend(self, inner: Backend | None = None, url: str = "memory://") -> ObservedBackend:
        return ObservedBackend(inner or MemoryBackend(), self.observer, url)

    def spans(self) -> list[ReadableSpan]:
        return list(self._spans.get_finished_spans())

    def span(self) -> ReadableSpan:
        (span,) = self.spans()
        return span

    def metrics(self) -> dict[str, Any]:
        data = self._reader.get_metrics_data()
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str) -> list[Any]:
        metrics = self.metrics()
        return list(metrics[name].data.data_points) if name in metrics else []

    def everything(self) -> str:
        return "\n".join(
            [*(span.to_json() for span in self.spans()), *(metric.to_json() for metric in self.metrics().values())]
        )


class FailingBackend(MemoryBackend):
    """Fail each get with what a test wants."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    async def get(self, db_name: str, key: str) -> str | None:  # noqa: ARG002 (a backend's)
        raise self.error


class HeldBackend(MemoryBackend):
    """Answer a get once a test lets it, with the span that is the current one by then."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def get(self, db_name: str, key: str) -> str | None:  # noqa: ARG002 (a backend's)
        await self.gate.wait()
        return f"{trace.get_current_span().get_span_context().span_id:016x}"


@pytest.fixture
def watch() -> Watch:
    return Watch()


@contextlib.asynccontextmanager
async def failing_service(watch: Watch, *statuses: int) -> AsyncGenerator[ObservedBackend]:
    """Run a service of these answers, the last one for ever, whose errors repeat what they were asked."""
    remaining = list(statuses)

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        status = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if status == 200:
            return web.json_response({"value": VALUE} if request.method == "GET" else {})
        echo = f"no: {request.path} {(await request.read()).decode()}"
        return web.json_response({"error": echo}, status=status)

    async with ScriptedService(handler=answer) as scripted:
        url = scripted.url
        remote = RemoteBackend(URL(url), sleep=no_wait)
        try:
            yield watch.backend(remote, "https://kv.example.com")
        finally:
            await remote.aclose()


def error_to_meet() -> CallError:
    return TransportError("reset", verb="get", db_name="db", key=KEY, attempts=1)


@pytest.mark.parametrize("url", URLS)
async def test_span_and_duration_say_what_the_conventions_ask_for(watch: Watch, url: str) -> None:
    backend = watch.backend(url=url)
    await backend.set("weather", KEY, VALUE, 60)
    await backend.get("weather", KEY)
    await backend.get("weather", "other")
    await backend.delete("weather", KEY)
    spans = watch.spans()
    assert [span.name for span in spans] == ["set weather", "get weather", "get weather", "delete weather"]
    assert {span.kind for span in spans} == {SpanKind.CLIENT}
    assert {span.status.status_code for span in spans} == {StatusCode.UNSET}
    common = {**URLS[url], DB_NAMESPACE: "weather"}
    assert [dict(span.attributes or {}) for span in spans] == [
        {**common, DB_OPERATION_NAME: "set"},
        {**common, DB_OPERATION_NAME: "get", "aiokv.found": True},
        {**common, DB_OPERATION_NAME: "get", "aiokv.found": False},
        {**common, DB_OPERATION_NAME: "delete"},
    ]
    points = {point.attributes[DB_OPERATION_NAME]: point for point in watch.points(DB_CLIENT_OPERATION_DURATION)}
    assert {verb: point.count for verb, point in points.items()} == {"set": 1, "get": 2, "delete": 1}
    for verb, point in points.items():
        assert dict(point.attributes) == {**common, DB_OPERATION_NAME: verb}
    scope = spans[0].instrumentation_scope
    assert scope is not None
    assert scope.name == "aiokv"


def test_duration_is_in_seconds_with_the_buckets_of_the_convention(watch: Watch) -> None:
    call = CallStarted("get", "db", KEY, "memory://")
    watch.observer(call)
    watch.observer(CallEnded(call, 0.25, attempts=1, hedged=False, found=True, error=None))
    metric = watch.metrics()[DB_CLIENT_OPERATION_DURATION]
    (point,) = metric.data.data_points
    assert isinstance(point, HistogramDataPoint)
    assert (metric.unit, point.sum) == ("s", 0.25)
    assert list(point.explicit_bounds) == [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10]
    # The measurement leads to the span that it belongs to.
    context = watch.span().context
    assert context is not None
    assert [exemplar.span_id for exemplar in point.exemplars] == [context.span_id]


async def test_span_is_known_to_a_sampler_by_all_that_is_known_before_the_call() -> None:
    seen: list[tuple[str, Any]] = []

    class Spy(Sampler):
        def should_sample(self, parent_context: Any, trace_id: int, name: str, *rest: Any, **more: Any) -> Any:
            seen.append((name, dict(rest[1] if len(rest) > 1 else more["attributes"])))
            return ALWAYS_ON.should_sample(parent_context, trace_id, name)

        def get_description(self) -> str:
            return "spy"

    await Watch(sampler=Spy()).backend(url="https://kv.example.com:8443").get("db", KEY)
    assert seen == [
        (
            "get db",
            {
                DB_SYSTEM_NAME: "aiokv",
                DB_OPERATION_NAME: "get",
                DB_NAMESPACE: "db",
                SERVER_ADDRESS: "kv.example.com",
                SERVER_PORT: 8443,
            },
        )
    ]


async def test_span_is_the_current_one_while_the_call_runs_and_no_longer(watch: Watch) -> None:
    held = HeldBackend()
    held.gate.set()
    with watch.tracer.start_as_current_span("the program's") as outer:
        inside = await watch.backend(held).get("db", KEY)
        assert trace.get_current_span() is outer
    span = next(span for span in watch.spans() if span.name == "get db")
    assert span.context is not None
    assert span.parent is not None
    assert inside == f"{span.context.span_id:016x}"
    assert span.parent.span_id == outer.get_span_context().span_id


async def test_concurrent_calls_have_spans_of_their_own(watch: Watch) -> None:
    held = HeldBackend()
    backend = watch.backend(held)
    calls = [asyncio.create_task(backend.get("db", str(number))) for number in range(20)]
    await asyncio.sleep(0)
    held.gate.set()
    inside = await asyncio.gather(*calls)
    assert len(set(inside)) == 20
    assert set(inside) == {f"{span.context.span_id:016x}" for span in watch.spans() if span.context}
    assert not watch.observer._spans
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (error_to_meet(), {ERROR_TYPE: "aiokv.errors.TransportError"}),
        (
            CallError("no", verb="get", key=KEY, status=418),
            {ERROR_TYPE: "aiokv.errors.CallError", DB_RESPONSE_STATUS_CODE: "418"},
        ),
        (RuntimeError(KEY), {ERROR_TYPE: "RuntimeError"}),
    ],
    ids=["no answer", "status", "another's"],
)
async def test_failed_call_says_so_by_its_type_and_status_alone(
    watch: Watch, error: Exception, attributes: dict[str, str]
) -> None:
    with pytest.raises(type(error)):
        await watch.backend(FailingBackend(error)).get("db", KEY)
    span = watch.span()
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, None)
    assert not span.events
    assert span.attributes is not None
    assert attributes.items() <= span.attributes.items()
    (point,) = watch.points(DB_CLIENT_OPERATION_DURATION)
    assert attributes.items() <= point.attributes.items()
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize("include_keys", [False, True])
async def test_keys_stand_in_spans_where_asked_for_and_never_in_metrics(include_keys: bool) -> None:  # noqa: FBT001 (a case)
    watch = Watch(include_keys=include_keys)
    async with failing_service(watch, 503, 200, 400) as backend:
        await backend.set("db", KEY, VALUE, 60)
        with pytest.raises(CallError) as caught:
            await backend.set("db", KEY, VALUE, 60)
    spans = watch.spans()
    assert KEY in str(caught.value)
    if include_keys:
        assert [(span.attributes or {})["db.operation.parameter.key"] for span in spans] == [KEY, KEY]
        assert spans[1].status.description == str(caught.value)
    else:
        assert KEY not in watch.everything()
    assert KEY not in "".join(metric.to_json() for metric in watch.metrics().values())
    assert VALUE not in watch.everything()


async def test_messages_of_others_are_not_recorded_with_keys_either() -> None:
    watch = Watch(include_keys=True)
    with pytest.raises(RuntimeError):
        await watch.backend(FailingBackend(RuntimeError("a credentials object's own words"))).get("db", KEY)
    assert watch.span().status.description is None


async def test_retries_are_events_of_a_span_that_did_not_fail_and_are_counted(watch: Watch) -> None:
    async with failing_service(watch, 503, 429, 200) as backend:
        assert await backend.get("db", KEY) == VALUE
    span = watch.span()
    assert span.status.status_code is StatusCode.UNSET
    assert ERROR_TYPE not in (span.attributes or {})
    assert [event.name for event in span.events] == ["aiokv.retry"] * 2
    first, second = (dict(event.attributes or {}) for event in span.events)
    assert isinstance(first.pop("aiokv.wait_seconds"), float)
    assert isinstance(second.pop("aiokv.wait_seconds"), float)
    assert first == {"aiokv.attempt": 1, ERROR_TYPE: "aiokv.errors.UnavailableError", DB_RESPONSE_STATUS_CODE: "503"}
    assert second == {"aiokv.attempt": 2, ERROR_TYPE: "aiokv.errors.ThrottledError", DB_RESPONSE_STATUS_CODE: "429"}
    assert watch.metrics()["aiokv.retries"].unit == "{retry}"
    assert {point.attributes[DB_RESPONSE_STATUS_CODE]: point.value for point in watch.points("aiokv.retries")} == {
        "503": 1,
        "429": 1,
    }
    (point,) = watch.points(DB_CLIENT_OPERATION_DURATION)
    assert (point.count, ERROR_TYPE in point.attributes) == (1, False)


def test_hedge_is_an_event_and_is_counted(watch: Watch) -> None:
    call = CallStarted("get", "db", KEY, "https://kv.example.com")
    watch.observer(call)
    watch.observer(CallHedged(call, 0.125))
    watch.observer(CallEnded(call, 0.25, attempts=1, hedged=True, found=True, error=None))
    (event,) = watch.span().events
    assert (event.name, dict(event.attributes or {})) == ("aiokv.hedge", {"aiokv.after_seconds": 0.125})
    (point,) = watch.points("aiokv.hedges")
    assert (point.value, watch.metrics()["aiokv.hedges"].unit) == (1, "{hedge}")


def test_renewals_of_tokens_are_counted_by_host_and_outcome(watch: Watch) -> None:
    url = "https://rest.example.com:8443/storage/auth/token"
    watch.observer(TokenRenewed(url, 0.1, None))
    watch.observer(TokenRenewed(url, 0.1, CallError("no", status=403)))
    server = {SERVER_ADDRESS: "rest.example.com", SERVER_PORT: 8443}
    assert [(point.value, dict(point.attributes)) for point in watch.points("aiokv.token.renewals")] == [
        (1, server),
        (1, {**server, ERROR_TYPE: "aiokv.errors.CallError", DB_RESPONSE_STATUS_CODE: "403"}),
    ]
    assert watch.metrics()["aiokv.token.renewals"].unit == "{renewal}"


async def test_cancelled_call_is_told_apart_and_is_no_failure(watch: Watch) -> None:
    task = asyncio.create_task(watch.backend(HeldBackend()).get("db", KEY))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    span = watch.span()
    assert span.status.status_code is StatusCode.UNSET
    (point,) = watch.points(DB_CLIENT_OPERATION_DURATION)
    for attributes in (span.attributes or {}, point.attributes):
        assert attributes["aiokv.cancelled"] is True
        assert ERROR_TYPE not in attributes
    assert not watch.observer._spans


def test_call_that_is_thrown_away_with_its_loop_ends_its_span_in_silence(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(watch.backend(HeldBackend()).get("db", KEY))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    with caplog.at_level(logging.CRITICAL, "asyncio"):
        del task
        gc.collect()
    assert watch.span().name == "get db"
    assert caplog.records == []


async def test_call_that_is_closed_by_hand_leaves_no_span_behind(watch: Watch) -> None:
    call = watch.backend(HeldBackend()).get("db", KEY)
    call.send(None)
    assert trace.get_current_span() is not trace.INVALID_SPAN
    call.close()
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_what_is_not_sampled_is_measured_and_nothing_below_it_is_sampled() -> None:
    watch = Watch(sampler=ALWAYS_OFF)
    below: list[bool] = []

    class Inner(MemoryBackend):
        async def get(self, db_name: str, key: str) -> str | None:
            below.append(trace.get_current_span().get_span_context().is_valid)
            below.append(trace.get_current_span().is_recording())
            return await super().get(db_name, key)

    await watch.backend(Inner()).get("db", KEY)
    assert below == [True, False]
    assert watch.spans() == []
    assert [point.count for point in watch.points(DB_CLIENT_OPERATION_DURATION)] == [1]
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_metrics_come_without_traces() -> None:
    reader = InMemoryMetricReader()
    observer = OpenTelemetryObserver(
        tracer_provider=NoOpTracerProvider(), meter_provider=MeterProvider([reader], shutdown_on_exit=False)
    )
    await ObservedBackend(MemoryBackend(), observer, "memory://").get("db", KEY)
    assert not observer._spans
    assert DB_CLIENT_OPERATION_DURATION in str(reader.get_metrics_data())


async def test_long_namespace_makes_no_longer_span_name_than_is_allowed(watch: Watch) -> None:
    await watch.backend().get("d" * 5000, KEY)
    assert len(watch.span().name) == 255


async def test_two_observers_of_one_provider_count_together(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    other = OpenTelemetryObserver(tracer_provider=watch.tracer_provider, meter_provider=watch.meter_provider)
    await watch.backend().get("db", KEY)
    await ObservedBackend(MemoryBackend(), other, "memory://").get("db", KEY)
    assert [point.count for point in watch.points(DB_CLIENT_OPERATION_DURATION)] == [2]
    assert caplog.records == []


async def test_one_observer_watches_a_store_and_the_function_that_is_cached_in_it(watch: Watch) -> None:
    store = AsyncKVStore("db", url="memory://otel-cached", observer=watch.observer)

    @kv_cached(ttl=60, store=store, prefix="app:forecast", key=lambda city: city, observer=watch.observer)
    async def forecast(city: str) -> list[str]:
        return [city]

    assert [await forecast("Oslo") for _ in range(3)] == [["Oslo"]] * 3
    counts = {point.attributes["aiokv.cache.event"]: point for point in watch.points("aiokv.cache.events")}
    assert {kind: point.value for kind, point in counts.items()} == {"miss": 1, "computed": 1, "hit": 2}
    assert {point.attributes["aiokv.cache.prefix"] for point in counts.values()} == {"app:forecast"}
    assert watch.metrics()["aiokv.cache.events"].unit == "{event}"
    assert {span.name for span in watch.spans()} == {"get db", "set db"}
    (point,) = watch.points("aiokv.cache.computation.duration")
    assert dict(point.attributes) == {"aiokv.cache.prefix": "app:forecast"}
    assert point.count == 1


def test_computation_is_measured_in_seconds_and_no_other_event_is(watch: Watch) -> None:
    watch.observer(CacheEvent("computed", "app.f:0:00ff", 42.0))
    watch.observer(CacheEvent("hit", "app.f:0:00ff"))
    metric = watch.metrics()["aiokv.cache.computation.duration"]
    (point,) = metric.data.data_points
    assert (metric.unit, point.count, point.sum, point.explicit_bounds[-1]) == ("s", 1, 42.0, 500.0)
    assert "00ff" not in watch.everything()


async def test_store_with_an_observer_can_be_pickled_and_copies_share_one() -> None:
    store = AsyncKVStore("db", url="memory://otel-pickled", observer=OpenTelemetryObserver(include_keys=True))
    first, second = (pickle.loads(pickle.dumps(store)) for _ in range(2))
    assert await first.get("key") is None
    assert first._observer is second._observer
    assert repr(first._observer) == "OpenTelemetryObserver(include_keys=True)"


def test_observer_with_providers_says_why_it_cannot_be_pickled(watch: Watch) -> None:
    with pytest.raises(TypeError, match="leave them out"):
        pickle.dumps(watch.observer)


LATE_PROVIDERS = """
import asyncio, pickle
from aiokv import AsyncKVStore
from aiokv.otel import OpenTelemetryObserver
store = pickle.loads(pickle.dumps(AsyncKVStore("db", url="memory://", observer=OpenTelemetryObserver())))
asyncio.run(store.get("key"))
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
spans, reader, provider = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
asyncio.run(store.get("key"))
print([span.name for span in spans.get_finished_spans()])
print([metric.name for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics])
"""


def test_providers_that_the_process_sets_later_are_used() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LATE_PROVIDERS], capture_output=True, text=True, check=False)
    assert done.stdout == f"['get db']\n['{DB_CLIENT_OPERATION_DURATION}']\n"
    # Of the first call, before they were set.
    assert [line.partition(",")[0] for line in done.stderr.splitlines()] == ["OpenTelemetryObserver records nothing"]


WITHOUT_PROVIDERS = """
import asyncio, logging, sys
logging.basicConfig(format="%(levelname)s %(message)s")
from aiokv import AsyncKVStore
from aiokv.otel import OpenTelemetryObserver
from opentelemetry import metrics, trace
for call in sys.argv[1:]:
    eval(call)
for name in ("one", "other"):
    asyncio.run(AsyncKVStore(name, url="memory://", observer=OpenTelemetryObserver()).get("k"))
"""


@pytest.mark.parametrize(
    ("set_up", "environment", "warnings"),
    [
        ("", {}, 1),
        ("", {"OTEL_SDK_DISABLED": "true"}, 0),
        ("trace.set_tracer_provider(trace.NoOpTracerProvider())", {}, 0),
        ("metrics.set_meter_provider(__import__('opentelemetry.sdk.metrics').sdk.metrics.MeterProvider())", {}, 0),
    ],
    ids=["nothing set", "switched off", "no-op", "metrics alone"],
)
def test_observer_says_once_that_nothing_is_set_up_to_record(
    tmp_path: Path, set_up: str, environment: dict[str, str], warnings: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_PROVIDERS, *([set_up] if set_up else [])],
        env={**clean_environment(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count("WARNING OpenTelemetryObserver records nothing") == warnings
    assert done.stderr.count("install opentelemetry-sdk") == len(done.stderr.splitlines()) == warnings


def test_module_without_its_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aiokv.otel")
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"pip install 'aiokv\[otel\]'"):
        importlib.import_module("aiokv.otel")


@pytest.mark.parametrize("include_keys", [False, True])
async def test_calls_of_many_keys_listings_and_claims_have_spans_and_durations(*, include_keys: bool) -> None:
    watch = Watch(include_keys=include_keys)
    store = AsyncKVStore("db", backend=MemoryBackend(), observer=watch.observer)
    await store.set_many({KEY: VALUE, f"{KEY}-2": VALUE})
    await store.get_many([KEY, f"{KEY}-2"])
    listing = store.keys("customer")
    assert len([info async for info in listing]) == 2
    await store.count()
    await store.clear()
    async with store.claim(KEY):
        pass
    own = {DB_SYSTEM_NAME, DB_NAMESPACE}
    attributes = [{name: value for name, value in (span.attributes or {}).items() if name not in own} for span in watch.spans()]
    parameters = {"db.operation.parameter.key": KEY} if include_keys else {}
    prefix = {"db.operation.parameter.prefix": "customer"} if include_keys else {}
    empty = {"db.operation.parameter.prefix": ""} if include_keys else {}
    assert attributes == [
        # One operation with many operands is no batch of operations, so it bears no `db.operation.batch.size`.
        {DB_OPERATION_NAME: "set_many", "aiokv.keys": 2},
        {DB_OPERATION_NAME: "get_many", "aiokv.keys": 2},
        {DB_OPERATION_NAME: "keys", **prefix},
        {DB_OPERATION_NAME: "count", **empty},
        {DB_OPERATION_NAME: "clear", **empty},
        {DB_OPERATION_NAME: "claim", **parameters},
        {DB_OPERATION_NAME: "release", **parameters},
    ]
    assert [span.name for span in watch.spans()][:3] == ["set_many db", "get_many db", "keys db"]
    verbs = {point.attributes[DB_OPERATION_NAME] for point in watch.points(DB_CLIENT_OPERATION_DURATION)}
    assert verbs == {"set_many", "get_many", "keys", "count", "clear", "claim", "release"}
    assert VALUE not in watch.everything()
    assert (KEY in watch.everything()) is include_keys


async def test_batch_of_which_some_keys_fail_is_a_failure_with_their_number(watch: Watch) -> None:
    class Half(MemoryBackend):
        async def delete_many(self, db_name: str, keys: Sequence[str]) -> Any:  # noqa: ARG002 (a backend's)
            return [error_to_meet() if key != "a" else None for key in keys]

    with contextlib.suppress(BatchError):
        await AsyncKVStore("db", backend=Half(), observer=watch.observer).delete_many(["a", "b", "c"])
    span = watch.span()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes is not None
    assert (span.attributes["aiokv.keys"], span.attributes["aiokv.failed_keys"]) == (3, 2)
    assert span.attributes[ERROR_TYPE] == "aiokv.errors.TransportError"
    (point,) = watch.points(DB_CLIENT_OPERATION_DURATION)
    assert point.attributes[ERROR_TYPE] == "aiokv.errors.TransportError"
    assert "aiokv.keys" not in point.attributes


async def test_page_that_is_read_ahead_is_a_child_of_the_programs_span(watch: Watch) -> None:
    store = AsyncKVStore("db", backend=MemoryBackend(), observer=watch.observer)
    await store.set_many({f"k{i}": VALUE for i in range(1_500)})
    with watch.tracer.start_as_current_span("the program's") as outer:
        listing = store.keys()
        assert len([info async for info in listing]) == 1_500
        assert trace.get_current_span() is outer
    parents = [span.parent.span_id for span in watch.spans() if span.name == "keys db" and span.parent is not None]
    assert parents == [outer.get_span_context().span_id] * 2
    assert not watch.observer._spans
