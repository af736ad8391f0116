"""Spans and metrics of stores and cached functions, for OpenTelemetry: `AsyncKVStore(..., observer=OpenTelemetryObserver())`.

Source: names, units, bucket boundaries and what counts as an error are those of OpenTelemetry's semantic conventions 1.44.0,
`docs/db/database-spans.md`, `docs/db/database-metrics.md`, `docs/general/recording-errors.md`; for a cancelled call, of which
these say nothing, `docs/http/http-spans.md`. Names that begin with `aiokv.` have none.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from contextvars import Token
from functools import cache, lru_cache
from importlib.metadata import version
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from aiokv.caching.events import CacheEvent
from aiokv.errors import AioKVError, CallError
from aiokv.telemetry import CallEnded, CallHedged, CallRetried, CallStarted, Event, TokenRenewed

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.trace import SpanKind, StatusCode
except ImportError as missing:
    raise ImportError("aiokv.otel needs the package opentelemetry-api: pip install 'aiokv[otel]'") from missing

logger = logging.getLogger("aiokv")

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
OPERATION_BUCKETS_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0)
# A computation that is worth caching may take far longer than a database call.
COMPUTATION_BUCKETS_SECONDS = (*OPERATION_BUCKETS_SECONDS, 50.0, 100.0, 500.0)

_SCOPE = "aiokv"
_MAX_SPAN_NAME_CHARS = 255
_DEFAULT_PORTS = {"http": 80, "https": 443, "redis": 6379, "rediss": 6379, "valkey": 6379, "valkeys": 6379}

_SYSTEMS = {"sqlite": "sqlite", "redis": "redis", "rediss": "redis", "valkey": "valkey", "valkeys": "valkey"}
_OF_PREFIXES = {"keys", "count", "clear"}

_Attributes = Mapping[str, str | int]


class OpenTelemetryObserver:
    """An observer that makes a span of each call, and metrics of calls, retries, hedges, token renewals and cached functions.

    One object serves any number of stores, as `AsyncKVStore(observer=...)`, and cached functions, as `kv_cached(observer=...)`.
    The span of a call is the current span while the call runs, so the spans of an HTTP client nest below it. A failed call has
    `error.type`, the full name of the exception's class. A cancelled call is no failure: it has `aiokv.cancelled` instead.
    No span or metric holds a value, a token or a secret. No metric holds a key.

    Where no provider is set in the process when the first event comes, one warning says that nothing is recorded.

    An observer without providers of its own can be pickled. The copy uses the providers of the process that loads it.

    Args:
        tracer_provider: The provider of the tracer; None takes the process's provider, even if that is set later.
        meter_provider: The provider of the meter; None takes the process's provider likewise.
        include_keys: Whether spans hold keys, as `db.operation.parameter.key`, and prefixes of listings, likewise. The status
            of a failed span then holds the message of aiokv's error, which names the key. Spans of batches hold the number of
            keys alone, as `aiokv.keys`.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        include_keys: bool = False,
    ) -> None:
        self._has_providers = tracer_provider is not None or meter_provider is not None
        self._include_keys = include_keys
        self._has_looked = self._has_providers
        own_version = version("aiokv")
        self._tracer = trace.get_tracer(_SCOPE, own_version, tracer_provider, SCHEMA_URL)
        meter = metrics.get_meter(_SCOPE, own_version, meter_provider, SCHEMA_URL)
        self._operation_duration = meter.create_histogram(
            "db.client.operation.duration",
            unit="s",
            description="Duration of database client operations.",
            explicit_bucket_boundaries_advisory=OPERATION_BUCKETS_SECONDS,
        )
        self._retries = meter.create_counter(
            "aiokv.retries", unit="{retry}", description="Attempts that failed and were followed by another."
        )
        self._hedges = meter.create_counter(
            "aiokv.hedges", unit="{hedge}", description="Reads that were sent a second time because they were late."
        )
        self._token_renewals = meter.create_counter(
            "aiokv.token.renewals", unit="{renewal}", description="Exchanges of credentials for a token."
        )
        self._cache_events = meter.create_counter(
            "aiokv.cache.events", unit="{event}", description="What happened to calls of cached functions."
        )
        self._computation_duration = meter.create_histogram(
            "aiokv.cache.computation.duration",
            unit="s",
            description="Duration of the calls of cached functions that were not served from the cache.",
            explicit_bucket_boundaries_advisory=COMPUTATION_BUCKETS_SECONDS,
        )
        # The spans of calls under way. A call ends in the task in which it began, so that task detaches its own context.
        self._spans: dict[CallStarted, tuple[trace.Span, Token[context.Context]]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(include_keys={self._include_keys})"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._has_providers:
            raise TypeError(
                f"an {type(self).__name__} with providers of its own cannot be pickled; "
                "leave them out, and set the providers of each process with opentelemetry's set_*_provider"
            )
        return _unpickle, (type(self), self._include_keys)

    def __call__(self, event: Event | CacheEvent, /) -> None:
        """Record an event as a span or a metric; see `aiokv.telemetry.Observer`.

        Args:
            event: What happened to a call of a store or of a cached function.
        """
        if not self._has_looked:
            # Not at construction: programs may set their providers later.
            self._has_looked = True
            _warn_without_providers()
        match event:
            case CallStarted():
                self._begin(event)
            case CallEnded():
                self._end(event)
            case CacheEvent():
                self._count_cache_event(event)
            case CallRetried():
                self._note_retry(event)
            case CallHedged():
                self._note_hedge(event)
            case TokenRenewed():
                self._token_renewals.add(1, {**_describe_server(event.url), **_describe_error(event.error)})

    def _begin(self, call: CallStarted) -> None:
        name = f"{call.verb} {call.db_name}"[:_MAX_SPAN_NAME_CHARS]
        attributes = _describe_operation(call.verb, call.db_name, call.url)
        # CLIENT for memory:// too: a program's traces look the same with every URL.
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
        if not span.get_span_context().is_valid:
            # The process has no tracer provider, or its provider drops this span altogether.
            return
        if span.is_recording():
            if call.verb.endswith("_many"):
                # By the conventions one operation with many operands, as Redis's MGET, is no batch of operations.
                span.set_attribute("aiokv.keys", call.keys)
            elif self._include_keys:
                span.set_attribute(f"db.operation.parameter.{'prefix' if call.verb in _OF_PREFIXES else 'key'}", call.key)
        # A span that is not sampled becomes the current one, too: then the spans below it are not sampled either.
        self._spans[call] = span, context.attach(trace.set_span_in_context(span))

    def _end(self, event: CallEnded) -> None:
        call = event.call
        outcome = _describe_error(event.error)
        operation = _describe_operation(call.verb, call.db_name, call.url)
        # Recorded before the context is detached: an exemplar of this measurement refers to the current span.
        self._operation_duration.record(event.elapsed_seconds, {**operation, **outcome})
        span, token = self._spans.pop(call, (None, None))
        if span is None or token is None:
            return
        # A coroutine that is dropped unfinished may be closed in another context, where ours must not be detached.
        if not isinstance(event.error, GeneratorExit) or trace.get_current_span() is span:
            context.detach(token)
        if span.is_recording():
            span.set_attributes(outcome)
            if event.found is not None:
                span.set_attribute("aiokv.found", event.found)
            if event.failed_keys:
                span.set_attribute("aiokv.failed_keys", event.failed_keys)
            if "error.type" in outcome:
                message = str(event.error) if self._include_keys and isinstance(event.error, AioKVError) else None
                span.set_status(StatusCode.ERROR, message)
        span.end()

    def _note_retry(self, event: CallRetried) -> None:
        call = event.call
        outcome = _describe_error(event.error)
        self._retries.add(1, {**_describe_operation(call.verb, call.db_name, call.url), **outcome})
        span, _ = self._spans.get(call, (None, None))
        if span is not None and span.is_recording():
            attempt = {"aiokv.attempt": event.attempt, "aiokv.wait_seconds": event.wait_seconds}
            span.add_event("aiokv.retry", {**attempt, **outcome})

    def _note_hedge(self, event: CallHedged) -> None:
        call = event.call
        self._hedges.add(1, _describe_operation(call.verb, call.db_name, call.url))
        span, _ = self._spans.get(call, (None, None))
        if span is not None and span.is_recording():
            span.add_event("aiokv.hedge", {"aiokv.after_seconds": event.after_seconds})

    def _count_cache_event(self, event: CacheEvent) -> None:
        # A key is `prefix:version:digest`, and the prefix may hold colons, too.
        prefix = event.key.rsplit(":", 2)[0]
        self._cache_events.add(1, {"aiokv.cache.event": event.kind, "aiokv.cache.prefix": prefix})
        if event.kind == "computed":
            self._computation_duration.record(event.seconds, {"aiokv.cache.prefix": prefix})


@cache
def _warn_without_providers() -> None:
    """Log, once a process, that neither spans nor metrics are recorded, unless that is meant."""
    is_off = os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    # What the API gives as long as no provider is set; a `NoOp...Provider` was set by the program.
    providers = (type(trace.get_tracer_provider()).__name__, type(metrics.get_meter_provider()).__name__)
    if not is_off and providers == ("ProxyTracerProvider", "_ProxyMeterProvider"):
        logger.warning(
            "OpenTelemetryObserver records nothing, since this process has set no OpenTelemetry provider: "
            "install opentelemetry-sdk and an exporter, then call trace.set_tracer_provider and metrics.set_meter_provider, "
            "or start the program with opentelemetry-instrument; OTEL_SDK_DISABLED=true silences this"
        )


@cache
def _unpickle(kind: type[OpenTelemetryObserver], include_keys: bool) -> OpenTelemetryObserver:  # noqa: FBT001 (pickle's call)
    # One observer for all stores that are unpickled in this process: OpenTelemetry never releases instruments.
    return kind(include_keys=include_keys)


@lru_cache(maxsize=1024)
def _describe_operation(verb: str, db_name: str, url: str) -> _Attributes:
    """Return the attributes of a call's span and metrics; all are known before the call, so samplers can use them."""
    # A remote service may store its values in anything, and memory is no database: both are named after this package.
    system = _SYSTEMS.get(urlsplit(url).scheme.partition("+")[0], "aiokv")
    return MappingProxyType(
        {"db.system.name": system, "db.operation.name": verb, "db.namespace": db_name, **_describe_server(url)},
    )


def _describe_server(url: str) -> _Attributes:
    parts = urlsplit(url)
    default_port = _DEFAULT_PORTS.get(parts.scheme)
    if default_port is None or parts.hostname is None:
        # There is no server. The path of a file is left out, since it may name a user.
        return {}
    port = parts.port
    if port is None or port == default_port:
        return {"server.address": parts.hostname}
    return {"server.address": parts.hostname, "server.port": port}


def _describe_error(error: BaseException | None) -> Mapping[str, str | bool]:
    """Return the attributes of an error, without its message, which names the key."""
    if error is None:
        return {}
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return {"aiokv.cancelled": True}
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    status = error.status if isinstance(error, CallError) else None
    return {"error.type": name} if status is None else {"error.type": name, "db.response.status_code": str(status)}
