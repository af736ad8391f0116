"""The figures of a server at one moment, as `/status.json` shows them."""

from collections.abc import Iterable, Mapping
from typing import Any

from aiokv import clock
from aiokv.backends.base import Gauges
from aiokv.server.statistics import BOUNDS, STATUSES, VERBS, Reading, Statistics, quantile

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_MISS = "404"


def read(statistics: Statistics, gauges: Gauges | None, version: str, problem: str | None) -> dict[str, Any]:
    """Take the present figures, the workers summed.

    Args:
        statistics: The counters of this worker, whose backend's counts are published with them.
        gauges: The present figures of the backend; None where it has none.
        version: The version of the server.
        problem: Why the server is not ready, or None.

    Returns:
        Counts since the start, gauges, and under `window` the rates and percentiles over that time; all of them fit JSON.
    """
    if gauges is not None:
        statistics.publish(gauges)
    total, workers, now = statistics.total(), statistics.workers(), clock.now()
    running = [worker for worker in workers.values() if worker.pid]
    started = min((worker.started for worker in running), default=now)
    verbs = {verb: _read_verb(total, index) for index, verb in enumerate(VERBS)}
    stopping = bool(running) and all(worker.draining for worker in running)
    state = "Not ready" if problem else "Stopping" if stopping else "Ready"
    reading = {
        "version": version,
        "time": now,
        "state": state,
        "problem": problem,
        "up": max(0.0, now - started),
        "requests": sum(verb["requests"] for verb in verbs.values()),
        "hits": total.hits,
        "misses": total.misses,
        "bytes_in": total.bytes_in,
        "bytes_out": total.bytes_out,
        "connections": total.connections,
        "accepted": total.accepted,
        "wrong_keys": total.wrong_keys,
        "dropped_lines": total.dropped_lines,
        "refusals": total.refusals,
        "statuses": _sum_statuses(verbs.values()),
        "verbs": verbs,
        "store": None if gauges is None else _read_store(total, gauges),
        "workers": [_read_worker(row, worker, now) for row, worker in workers.items()],
    }
    return reading | {"window": _read_window(reading, total)}


def _read_verb(total: Reading, index: int) -> dict[str, Any]:
    statuses = total.statuses(index)
    refused = sum(count for status, count in statuses.items() if status.startswith("4"))
    durations = zip((0.0, *BOUNDS), (*BOUNDS, None), total.durations(index), strict=True)
    return {
        "requests": sum(statuses.values()),
        # A get of an absent key is no error.
        "refused": refused - (statuses.get(_MISS, 0) if VERBS[index] == "get" else 0),
        "failed": sum(count for status, count in statuses.items() if status.startswith("5")),
        "statuses": statuses,
        "seconds": total.seconds(index),
        "durations": [bucket for bucket in durations if bucket[2]],
    }


def _sum_statuses(verbs: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    sums = dict.fromkeys(STATUSES, 0)
    for verb in verbs:
        for status, count in verb["statuses"].items():
            sums[status] += count
    return sums


def _read_store(total: Reading, gauges: Gauges) -> dict[str, int | None]:
    return {
        "entries": gauges.entries,
        "value_bytes": gauges.value_bytes,
        "wal_bytes": gauges.wal_bytes,
        "disk_free_bytes": gauges.disk_free_bytes,
        "expired": total.expired,
        "commits": None if gauges.commits is None else total.commits,
        "committed_writes": None if gauges.committed_writes is None else total.committed_writes,
        "failures": total.failures,
    }


def _read_worker(row: int, worker: Reading, now: float) -> dict[str, Any]:
    return {
        "worker": row,
        "pid": worker.pid or None,
        "state": "Stopping" if worker.draining else "Serving" if worker.pid else "Ended",
        "up": max(0.0, now - worker.started) if worker.pid else None,
        "starts": worker.starts,
        "requests": sum(worker.requests(index) for index in range(len(VERBS))),
        "connections": worker.connections,
    }


def _read_window(reading: Mapping[str, Any], total: Reading) -> dict[str, Any]:
    """Return the rates and percentiles since the start; the script returns those between two readings."""
    seconds = reading["up"]

    def rate(count: float) -> float | None:
        return count / seconds if seconds else None

    verbs = {
        verb: {"rate": rate(reading["verbs"][verb]["requests"])}
        | {name: quantile(total.durations(index), share) for name, share in _SHARES.items()}
        for index, verb in enumerate(VERBS)
    }
    gets, commits = total.hits + total.misses, total.commits
    return {
        "name": "since the start",
        "requests": rate(reading["requests"]),
        "bytes_in": rate(total.bytes_in),
        "bytes_out": rate(total.bytes_out),
        "hit_ratio": total.hits / gets if gets else None,
        "writes_per_commit": total.committed_writes / commits if commits else None,
        "verbs": verbs,
    }
