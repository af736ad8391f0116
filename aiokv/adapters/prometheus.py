"""Metrics of stores and cached functions in prometheus_client's registry.

```python
from prometheus_client import start_http_server
from aiokv import AsyncKVStore, kv_cached
from aiokv.adapters.prometheus import PrometheusMetrics

metrics = PrometheusMetrics()
store = AsyncKVStore("weather", observer=metrics)

@kv_cached(ttl=60, store=store)
async def forecast(city: str) -> dict: ...

metrics.track(forecast)
start_http_server(9100)
```

`docs/metrics.md` lists the metrics. No label holds a key, a value, a URL or a message.
"""

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from aiokv.caching.binding import CachedCallable
from aiokv.caching.events import CacheEvent, CacheInfo
from aiokv.telemetry import CallEnded, CallHedged, CallRetried, CallStarted, Event, TokenRenewed

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ImportError(
        "aiokv.adapters.prometheus needs the package prometheus-client: pip install 'aiokv[prometheus]'"
    ) from missing

if TYPE_CHECKING:
    from aiokv.caching.near import NearCache

CALL_BUCKETS_SECONDS: Final = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
)
COMPUTATION_BUCKETS_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 50.0, 100.0, 500.0)

# Each count of a cached function: the metric, its help, and the value of the label `outcome` if it has one.
_COUNTS: Final[tuple[tuple[str, str, str, Callable[[CacheInfo], float]], ...]] = (
    ("aiokv_cache_calls", "Calls of cached functions, by what served them.", "hit", lambda info: info.hits),
    ("aiokv_cache_calls", "", "near_hit", lambda info: info.near_hits),
    ("aiokv_cache_calls", "", "stale_hit", lambda info: info.stale_hits),
    ("aiokv_cache_calls", "", "miss", lambda info: info.misses),
    ("aiokv_cache_joined_calls", "Calls that waited for another one's result.", "", lambda info: info.joined),
    ("aiokv_cache_computations", "Results that were computed.", "", lambda info: info.computations),
    ("aiokv_cache_not_stored", "Results that were returned but not stored.", "", lambda info: info.not_stored),
    ("aiokv_cache_store_errors", "Failures of the store in cached functions.", "", lambda info: info.store_errors),
    ("aiokv_cache_background_errors", "Background refreshes that failed.", "", lambda info: info.background_errors),
    ("aiokv_cache_saved_seconds", "Computation time of all that was served.", "", lambda info: info.seconds_saved),
)


class PrometheusMetrics:
    """An observer that counts the calls of stores, and a collector of what cached functions count themselves.

    One object serves any number of stores, as `AsyncKVStore(observer=...)`, and cached functions, by `track`. To track a
    function costs its calls nothing: its counts are read when Prometheus scrapes. `kv_cached(observer=...)` is for the
    durations of computations alone; with an observer, near hits cost more.

    An object on the process's own registry can be pickled; it arrives as the one object of the other process.

    Args:
        registry: Where the metrics are registered; None takes prometheus_client's own. A registry takes one such object.
        label_db: Whether the metrics of calls have the label `db`, the store's namespace. Leave it out where programs make
            namespaces without bound, such as one for each user.

    Raises:
        ValueError: The registry has these metrics already; use the object that registered them.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, label_db: bool = False) -> None:
        self._is_default = registry is None or registry is REGISTRY
        self._label_db = label_db
        registry = REGISTRY if registry is None else registry
        db = ("db",) if label_db else ()
        # First: where it is refused, nothing is left behind in the registry.
        self._calls = Counter(
            "aiokv_client_calls", "Calls of stores, by how they ended.", (*db, "verb", "outcome"), registry=registry
        )
        self._durations = Histogram(
            "aiokv_client_call_duration_seconds",
            "Time from a call's start to its end, retries included.",
            (*db, "verb"),
            buckets=CALL_BUCKETS_SECONDS,
            registry=registry,
        )
        self._in_flight = Gauge("aiokv_client_calls_in_flight", "Calls under way.", (*db, "verb"), registry=registry)
        self._errors = Counter(
            "aiokv_client_errors", "Calls that failed, by the error's class.", (*db, "verb", "error"), registry=registry
        )
        self._keys = Counter("aiokv_client_keys", "Keys of all calls, batches included.", (*db, "verb"), registry=registry)
        self._gets = Counter("aiokv_client_gets", "Gets, by whether a value was there.", (*db, "result"), registry=registry)
        self._retries = Counter(
            "aiokv_client_retries",
            "Attempts that failed and were followed by another.",
            (*db, "verb", "error"),
            registry=registry,
        )
        self._hedges = Counter("aiokv_client_hedges", "Gets that were sent a second time.", db, registry=registry)
        self._renewals = Counter(
            "aiokv_client_token_renewals", "Exchanges of credentials for a token.", ("outcome",), registry=registry
        )
        self._computations = Histogram(
            "aiokv_cache_computation_duration_seconds",
            "Time that a cached function took where nothing could be served.",
            ("function",),
            buckets=COMPUTATION_BUCKETS_SECONDS,
            registry=registry,
        )
        self._functions = _TrackedFunctions()
        registry.register(self._functions)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._is_default:
            raise TypeError(
                f"{type(self).__name__} on a registry of its own cannot be pickled; leave the registry out, or make the store "
                "in the process that uses it"
            )
        return _unpickle, (self._label_db,)

    def track(self, *functions: CachedCallable) -> None:
        """Give the counts of cached functions, and the sizes of their near caches, to Prometheus; each once.

        Args:
            functions: What `kv_cached` and `kv_cached_many` made.

        Raises:
            TypeError: A function is not cached.
        """
        for function in functions:
            if not isinstance(function, CachedCallable):
                raise TypeError(
                    f"track takes functions decorated with kv_cached or kv_cached_many, not {type(function).__name__}"
                )
            self._functions.add(function)

    def __call__(self, event: Event | CacheEvent, /) -> None:
        """Count an event; see `aiokv.telemetry.Observer`.

        Args:
            event: What happened to a call of a store or of a cached function.
        """
        match event:
            case CallStarted():
                self._in_flight.labels(*self._db_of(event), event.verb).inc()
            case CallEnded():
                self._end(event)
            case CallRetried():
                self._retries.labels(*self._db_of(event.call), event.call.verb, type(event.error).__name__).inc()
            case CallHedged():
                (self._hedges.labels(event.call.db_name) if self._label_db else self._hedges).inc()
            case TokenRenewed():
                self._renewals.labels(_outcome_of(event.error)).inc()
            case CacheEvent(kind="computed"):
                # A key is `prefix:version:digest`, and the prefix may hold colons, too.
                self._computations.labels(event.key.rsplit(":", 2)[0]).observe(event.seconds)

    def _end(self, event: CallEnded) -> None:
        call = event.call
        labels = (*self._db_of(call), call.verb)
        outcome = _outcome_of(event.error)
        self._in_flight.labels(*labels).dec()
        self._calls.labels(*labels, outcome).inc()
        self._durations.labels(*labels).observe(event.elapsed_seconds)
        self._keys.labels(*labels).inc(call.keys)
        if outcome == "error":
            self._errors.labels(*labels, type(event.error).__name__).inc()
        if event.found is not None:
            self._gets.labels(*self._db_of(call), "found" if event.found else "absent").inc()

    def _db_of(self, call: CallStarted) -> tuple[str, ...]:
        return (call.db_name,) if self._label_db else ()


class _TrackedFunctions(Collector):
    """The counts of cached functions, read when they are asked for."""

    def __init__(self) -> None:
        self._functions: dict[int, CachedCallable] = {}
        self._lock = Lock()

    def add(self, function: CachedCallable) -> None:
        with self._lock:
            # Forms bound to instances share the cache, and so the counts, of their function.
            self._functions[id(function._cache)] = function  # noqa: SLF001 (of this package)

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            functions = list(self._functions.values())
        # Functions of one name count together, as they share results.
        infos: dict[str, list[CacheInfo]] = {}
        nears: dict[int, tuple[NearCache, set[str]]] = {}
        for function in functions:
            name = function._cache.keys.prefix  # noqa: SLF001 (of this package)
            infos.setdefault(name, []).append(function.info())
            view = function._cache.near  # noqa: SLF001 (of this package)
            if view is not None:
                nears.setdefault(id(view.near), (view.near, set()))[1].add(name)
        families: dict[str, CounterMetricFamily] = {}
        for metric, text, outcome, read in _COUNTS:
            labels = ["function", "outcome"] if outcome else ["function"]
            family = families.setdefault(metric, CounterMetricFamily(metric, text, labels=labels))
            for name, of_name in infos.items():
                family.add_metric([name, outcome] if outcome else [name], sum(map(read, of_name)))
        yield from families.values()
        results = GaugeMetricFamily("aiokv_near_cache_results", "Results in a near cache.", labels=["functions"])
        size = GaugeMetricFamily("aiokv_near_cache_bytes", "Memory that a near cache takes, about.", labels=["functions"])
        for near, names in nears.values():
            label = [",".join(sorted(names))]
            results.add_metric(label, len(near.slots))
            size.add_metric(label, near.size_bytes)
        yield results
        yield size


@cache
def _unpickle(label_db: bool) -> PrometheusMetrics:  # noqa: FBT001 (pickle's call)
    return PrometheusMetrics(label_db=label_db)


def _outcome_of(error: BaseException | None) -> str:
    if error is None:
        return "ok"
    return "cancelled" if isinstance(error, asyncio.CancelledError | GeneratorExit) else "error"
