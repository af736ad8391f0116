"""`/metrics`: the figures of a server in the text format of Prometheus, the workers summed.

No label names an account, a namespace or a key: their number is unbounded, and they may be private.
"""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from aiokv.backends.base import Gauges
from aiokv.server.statistics import BOUNDS, VERBS, Reading, Statistics

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of `exposition`, the format that every Prometheus reads."""

# Three buckets for each power of ten, from 10 microseconds on: all of them would be 800 time series.
_EXPOSED = (
    *(BOUNDS.index(float(f"{step}e{exponent}")) for exponent in range(-5, 2) for step in (1, 2.5, 5)),
    len(BOUNDS) - 1,
)


def exposition(statistics: Statistics, gauges: Gauges | None = None, version: str = "") -> bytes:
    """Write the figures of all workers in Prometheus' text format.

    Args:
        statistics: The counters of this worker, whose backend's counts are published with them.
        gauges: The present figures of the backend; None where it has none.
        version: The version of the server, for `aiokv_build_info`.

    Returns:
        UTF-8 text, of the media type `CONTENT_TYPE`.
    """
    if gauges is not None:
        statistics.publish(gauges)
    registry = CollectorRegistry()
    registry.register(_Figures(statistics, gauges, version))
    return generate_latest(registry)


class _Figures(Collector):
    """The families of one exposition."""

    def __init__(self, statistics: Statistics, gauges: Gauges | None, version: str) -> None:
        self._statistics = statistics
        self._gauges = gauges
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """Yield each family of metrics once."""
        total, workers = self._statistics.total(), self._statistics.workers()
        build = GaugeMetricFamily("aiokv_build_info", "Version of the server; the value is always 1.", labels=["version"])
        build.add_metric([self._version], 1)
        yield build
        yield from _requests(total)
        yield from _connections(total)
        yield from _workers(workers)
        yield CounterMetricFamily(
            "aiokv_access_log_dropped_lines", "Lines that the access log could not write.", total.dropped_lines
        )
        if self._gauges is not None:
            yield from _backend(total, self._gauges)


def _requests(total: Reading) -> Iterator[Metric]:
    requests = CounterMetricFamily("aiokv_requests", "Requests answered, by verb and status.", labels=["verb", "status"])
    seconds = HistogramMetricFamily("aiokv_request_seconds", "Time from a request to its answer.", labels=["verb"])
    for index, verb in enumerate(VERBS):
        for status, count in total.statuses(index).items():
            requests.add_metric([verb, status], count)
        sums = list(accumulate(total.durations(index)))
        buckets = [(str(BOUNDS[bound]), float(sums[bound])) for bound in _EXPOSED]
        seconds.add_metric([verb], [*buckets, ("+Inf", float(sums[-1]))], sum_value=total.seconds(index))
    yield requests
    yield seconds
    yield CounterMetricFamily("aiokv_get_hits", "Gets that found a value.", total.hits)
    yield CounterMetricFamily("aiokv_get_misses", "Gets whose key was absent or had expired.", total.misses)
    batch_keys = CounterMetricFamily("aiokv_batch_keys", "Keys in batches, by what was done with them.", labels=["verb"])
    for verb, count in total.batch_keys.items():
        batch_keys.add_metric([verb], count)
    yield batch_keys
    yield GaugeMetricFamily("aiokv_watches", "Watches under way.", total.watches)
    yield CounterMetricFamily("aiokv_received_bytes", "Bytes of the bodies of requests.", total.bytes_in)
    yield CounterMetricFamily("aiokv_sent_bytes", "Bytes of the bodies of answers.", total.bytes_out)


def _connections(total: Reading) -> Iterator[Metric]:
    yield GaugeMetricFamily("aiokv_connections", "Connections open now.", total.connections)
    yield CounterMetricFamily("aiokv_connections_accepted", "Connections accepted.", total.accepted)
    refusals = CounterMetricFamily("aiokv_refusals", "Connections and requests refused, by reason.", labels=["reason"])
    for reason, count in total.refusals.items():
        refusals.add_metric([reason], count)
    yield refusals
    yield CounterMetricFamily("aiokv_wrong_keys", "Unknown keys offered for a token.", total.wrong_keys)


def _workers(workers: Mapping[int, Reading]) -> Iterator[Metric]:
    running = {row: worker for row, worker in workers.items() if worker.pid}
    yield GaugeMetricFamily("aiokv_workers", "Worker processes that run now.", len(running))
    yield GaugeMetricFamily(
        "aiokv_workers_draining", "Worker processes that are stopping.", sum(worker.draining for worker in running.values())
    )
    starts = CounterMetricFamily("aiokv_worker_starts", "Processes started for each worker.", labels=["worker"])
    started = GaugeMetricFamily("aiokv_worker_start_time_seconds", "Start of each worker's process.", labels=["worker"])
    for row, worker in workers.items():
        starts.add_metric([str(row)], worker.starts)
    for row, worker in running.items():
        started.add_metric([str(row)], worker.started)
    yield starts
    yield started


def _backend(total: Reading, gauges: Gauges) -> Iterator[Metric]:
    yield GaugeMetricFamily("aiokv_entries", "Entries stored, expired ones included until they are swept.", gauges.entries)
    yield GaugeMetricFamily("aiokv_value_bytes", "Bytes of the values stored, as UTF-8.", gauges.value_bytes)
    yield CounterMetricFamily("aiokv_expired_entries", "Entries swept after their expiry.", total.expired)
    yield CounterMetricFamily("aiokv_backend_failures", "Calls that failed by the store's own fault.", total.failures)
    if gauges.commits is not None:
        yield CounterMetricFamily("aiokv_commits", "Transactions committed.", total.commits)
    if gauges.committed_writes is not None:
        yield CounterMetricFamily("aiokv_committed_writes", "Writes in those transactions.", total.committed_writes)
    if gauges.wal_bytes is not None:
        yield GaugeMetricFamily("aiokv_wal_bytes", "Size of the write-ahead log.", gauges.wal_bytes)
    if gauges.disk_free_bytes is not None:
        yield GaugeMetricFamily("aiokv_disk_free_bytes", "Free space where the store is.", gauges.disk_free_bytes)
