"""Metrics of stores and cached functions, as Prometheus reads them."""

import asyncio
import gc
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import clean_environment

from aiokv import AsyncKVStore, BatchError, CallError, NearCache, RetryPolicy, kv_cached, kv_cached_many
from aiokv.backends.memory import MemoryBackend
from aiokv.telemetry import CallHedged, CallStarted, TokenRenewed
from aiokv.testing import Reply, ScriptedService

pytest.importorskip("prometheus_client", reason="prometheus-client is not installed: pip install 'aiokv[prometheus]'")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aiokv.adapters.prometheus import PrometheusMetrics

KEY = "customer-4711"
ORDER = ("functions", "function", "db", "verb", "outcome", "error", "result", "le")


class Scraped:
    """A registry with metrics, and what Prometheus reads from it."""

    def __init__(self, **options: Any) -> None:
        self.registry = CollectorRegistry()
        self.metrics = PrometheusMetrics(self.registry, **options)

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    def samples(self, name: str) -> dict[tuple[str, ...], float]:
        return {
            tuple(sample.labels[label] for label in ORDER if label in sample.labels): sample.value
            for family in text_string_to_metric_families(self.text())
            for sample in family.samples
            if sample.name == name
        }


class Failing(MemoryBackend):
    async def get(self, db_name: str, key: str) -> str | None:
        if key == "hang":
            await asyncio.sleep(60)
        raise CallError("it failed", verb="get", db_name=db_name, key=key)


async def test_calls_count_by_verb_and_outcome() -> None:
    scraped = Scraped()
    store = AsyncKVStore("db", url="memory://prometheus-calls", observer=scraped.metrics)
    await store.set(KEY, "secret value")
    await store.get(KEY)
    await store.get("absent")
    await store.set_many({"a": "1", "b": "2"})
    await store.get_many(["a", "b", "c"])
    assert scraped.samples("aiokv_client_calls_total") == {
        ("set", "ok"): 1,
        ("get", "ok"): 2,
        ("set_many", "ok"): 1,
        ("get_many", "ok"): 1,
    }
    assert scraped.samples("aiokv_client_keys_total") == {("set",): 1, ("get",): 2, ("set_many",): 2, ("get_many",): 3}
    assert scraped.samples("aiokv_client_gets_total") == {("found",): 1, ("absent",): 1}
    assert scraped.samples("aiokv_client_call_duration_seconds_count")[("get",)] == 2
    assert scraped.samples("aiokv_client_call_duration_seconds_bucket")[("get", "10.0")] == 2
    assert set(scraped.samples("aiokv_client_calls_in_flight").values()) == {0}
    assert KEY not in scraped.text()
    assert "secret" not in scraped.text()


async def test_failures_and_cancelled_calls_are_told_apart() -> None:
    scraped = Scraped()
    store = AsyncKVStore("db", backend=Failing(), observer=scraped.metrics)
    with pytest.raises(CallError):
        await store.get(KEY)
    task = asyncio.create_task(store.get("hang"))
    await asyncio.sleep(0.01)
    assert scraped.samples("aiokv_client_calls_in_flight") == {("get",): 1}
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(BatchError):
        await AsyncKVStore("db", backend=Failing(), observer=scraped.metrics, concurrency=1).get_many([KEY, "a"])
    assert scraped.samples("aiokv_client_calls_total")[("get", "cancelled")] == 1
    assert scraped.samples("aiokv_client_calls_total")[("get", "error")] >= 1
    assert {labels[-1] for labels in scraped.samples("aiokv_client_errors_total")} == {"CallError"}
    assert scraped.samples("aiokv_client_calls_in_flight")[("get",)] == 0


async def test_retries_of_a_real_service_count() -> None:
    scraped = Scraped()
    async with (
        ScriptedService(Reply.unavailable(), None) as service,
        AsyncKVStore(
            "db", url=service.url, credentials="id:secret", retry=RetryPolicy(backoff_base=0.001), observer=scraped.metrics
        ) as store,
    ):
        await store.set(KEY, "v")
    assert scraped.samples("aiokv_client_retries_total") == {("set", "UnavailableError"): 1}
    assert scraped.samples("aiokv_client_calls_total") == {("set", "ok"): 1}


def test_hedges_and_renewals_count() -> None:
    scraped = Scraped()
    call = CallStarted("get", "db", KEY, "https://host")
    scraped.metrics(CallHedged(call, 0.1))
    scraped.metrics(TokenRenewed("https://host/token", 0.1, None))
    scraped.metrics(TokenRenewed("https://host/token", 0.1, RuntimeError("secret")))
    assert scraped.samples("aiokv_client_hedges_total") == {(): 1}
    assert scraped.samples("aiokv_client_token_renewals_total") == {("ok",): 1, ("error",): 1}
    assert "secret" not in scraped.text()


async def test_namespace_is_a_label_where_that_is_asked_for() -> None:
    scraped = Scraped(label_db=True)
    await AsyncKVStore("weather", url="memory://prometheus-db", observer=scraped.metrics).get("k")
    scraped.metrics(CallHedged(CallStarted("get", "weather", "k", ""), 0.1))
    assert scraped.samples("aiokv_client_calls_total") == {("weather", "get", "ok"): 1}
    assert scraped.samples("aiokv_client_hedges_total") == {("weather",): 1}


async def test_cached_functions_count_without_an_observer() -> None:
    scraped = Scraped()
    store = AsyncKVStore("db", url="memory://prometheus-cached")
    near = NearCache(30)

    @kv_cached(ttl=60, store=store, near=near, key=lambda n: n, prefix="square")
    async def square(n: int) -> str:
        return str(n * n)

    @kv_cached_many(ttl=60, store=store, near=near, key=lambda ids: ids, prefix="names")
    async def names(ids: list[int]) -> dict[int, str]:
        return {one: str(one) for one in ids}

    scraped.metrics.track(square, names)
    scraped.metrics.track(square)
    for n in (1, 1, 2):
        await square(n)
    await names([1, 2, 3])
    calls = scraped.samples("aiokv_cache_calls_total")
    assert {labels: count for labels, count in calls.items() if count} == {
        ("square", "near_hit"): 1,
        ("square", "miss"): 2,
        ("names", "miss"): 3,
    }
    assert scraped.samples("aiokv_cache_computations_total")[("square",)] == 2
    assert scraped.samples("aiokv_near_cache_results") == {("names,square",): 5}
    assert scraped.samples("aiokv_near_cache_bytes")[("names,square",)] == near.size_bytes > 0


async def test_computations_are_timed_where_the_function_has_the_observer() -> None:
    scraped = Scraped()
    store = AsyncKVStore("db", url="memory://prometheus-computed")

    @kv_cached(ttl=60, store=store, key=lambda n: n, prefix="a:b", observer=scraped.metrics)
    async def slow(n: int) -> int:
        return n

    await slow(1)
    await slow(1)
    assert scraped.samples("aiokv_cache_computation_duration_seconds_count") == {("a:b",): 1}


def test_what_is_not_cached_cannot_be_tracked() -> None:
    with pytest.raises(TypeError, match="not function"):
        Scraped().metrics.track(lambda: None)  # type: ignore[arg-type]


def test_registry_takes_the_metrics_once() -> None:
    scraped = Scraped()
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        PrometheusMetrics(scraped.registry)


def test_metrics_keep_to_the_conventions_of_prometheus() -> None:
    scraped = Scraped()
    names = {family.name for family in text_string_to_metric_families(scraped.text())}
    assert len(names) >= 15
    assert all(re.fullmatch(r"aiokv_(client|cache|near_cache)_[a-z_]+", name) for name in names)
    for family in text_string_to_metric_families(scraped.text()):
        assert family.documentation.endswith(".")
        assert (family.type == "histogram") == family.name.endswith("_duration_seconds")


def test_metrics_of_own_registries_are_not_pickled() -> None:
    with pytest.raises(TypeError, match="leave the registry out"):
        pickle.dumps(Scraped().metrics)


def test_pickled_store_counts_in_the_registry_of_the_other_process(tmp_path: Path) -> None:
    program = """
import asyncio, pickle
from prometheus_client import REGISTRY
from aiokv import AsyncKVStore
from aiokv.adapters.prometheus import PrometheusMetrics
pickled = b"%s"
stores = [pickle.loads(bytes.fromhex(pickled.decode())) for _ in range(2)]
for store in stores:
    asyncio.run(store.get("k"))
print(REGISTRY.get_sample_value("aiokv_client_calls_total", {"verb": "get", "outcome": "ok"}))
"""
    make = "import pickle; from aiokv import AsyncKVStore; from aiokv.adapters.prometheus import PrometheusMetrics; "
    make += "print(pickle.dumps(AsyncKVStore('db', url='memory://', observer=PrometheusMetrics())).hex())"

    def run(code: str) -> str:
        environment = clean_environment(tmp_path)
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout

    assert run(program % run(make).strip()) == "2.0\n"


def test_metrics_hold_no_call_that_has_ended() -> None:
    scraped = Scraped()
    asyncio.run(AsyncKVStore("db", url="memory://prometheus-held", observer=scraped.metrics).get("k"))
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, CallStarted) and one.key == "k"]
