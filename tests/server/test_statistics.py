"""The counters of a server's workers: what is counted is found again, by every worker and after any of them."""

import itertools
import math
import mmap
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPOSITORY

from aiokv import clock
from aiokv.backends.base import Gauges
from aiokv.server.statistics import BOUNDS, DELETE, GET, OTHER, REASONS, ROW_BYTES, SET, Statistics, quantile, retire

A_WORKER = """
import mmap, os, sys, time
from aiokv.server.statistics import GET, Statistics

statistics = Statistics(mmap.mmap(int(sys.argv[1]), 0), row=int(sys.argv[2]))
statistics.opened()
for _ in range(int(sys.argv[3])):
    statistics.record(GET, 200, 0.001, 0, 10)
print("counted", flush=True)
time.sleep(60)
"""


def test_requests_are_counted_by_verb_and_status() -> None:
    statistics = Statistics()
    for _ in range(3):
        statistics.record(GET, 200, 0.001, 0, 100)
    statistics.record(GET, 404, 0.001, 0, 40)
    statistics.record(SET, 507, 0.002, 1_000, 60)
    total = statistics.total()
    assert total.statuses(GET) == {"200": 3, "404": 1}
    assert total.statuses(SET) == {"507": 1}
    assert (total.requests(GET), total.requests(SET), total.requests(DELETE)) == (4, 1, 0)
    assert (total.hits, total.misses) == (3, 1)
    assert (total.bytes_in, total.bytes_out) == (1_000, 400)
    assert math.isclose(total.seconds(GET), 0.004)


@pytest.mark.parametrize(
    ("status", "name"), [(100, "1xx"), (204, "2xx"), (302, "3xx"), (418, "4xx"), (599, "5xx"), (499, "499")]
)
def test_a_status_that_the_server_never_names_is_counted_by_its_class(status: int, name: str) -> None:
    statistics = Statistics()
    statistics.record(OTHER, status, 0.0, 0, 0)
    assert statistics.total().statuses(OTHER) == {name: 1}


def test_each_reason_of_a_refusal_is_counted_for_itself() -> None:
    statistics = Statistics()
    for times, reason in enumerate(REASONS):
        for _ in range(times):
            statistics.refused(reason)
    assert statistics.total().refusals == {reason: times for times, reason in enumerate(REASONS)}


def test_connections_are_open_until_they_are_closed() -> None:
    statistics = Statistics()
    for _ in range(3):
        statistics.opened()
    statistics.closed()
    total = statistics.total()
    assert (total.connections, total.accepted) == (2, 3)


def test_keys_and_lines_that_were_lost_are_counted() -> None:
    statistics = Statistics()
    statistics.wrong_key()
    statistics.dropped_lines(7)
    total = statistics.total()
    assert (total.wrong_keys, total.dropped_lines) == (1, 7)


def test_a_worker_that_drains_says_so_to_the_others() -> None:
    rows = bytearray(2 * ROW_BYTES)
    one, other = Statistics(rows, 0), Statistics(rows, 1)
    one.drain()
    assert {row: worker.draining for row, worker in other.workers().items()} == {0: True, 1: False}


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("median_seconds", [20e-6, 0.003, 2.0])
def test_a_percentile_is_right_to_a_tenth(share: float, median_seconds: float) -> None:
    draw = random.Random(7)
    samples = [draw.lognormvariate(math.log(median_seconds), 0.7) for _ in range(20_000)]
    statistics = Statistics()
    for sample in samples:
        statistics.record(GET, 200, sample, 0, 0)
    exact = sorted(samples)[int(share * len(samples))]
    assert quantile(statistics.total().durations(GET), share) == pytest.approx(exact, rel=0.07)


def test_a_percentile_of_nothing_is_none() -> None:
    assert quantile(Statistics().total().durations(GET), 0.5) is None


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.0, 0.0, 1e-6), (1e-9, 0.0, 1e-6), (1e6, 100.0, 100.0)])
def test_durations_beyond_the_buckets_are_counted_at_their_ends(seconds: float, least: float, most: float) -> None:
    statistics = Statistics()
    statistics.record(SET, 200, seconds, 0, 0)
    durations = statistics.total().durations(SET)
    assert sum(durations) == 1
    estimate = quantile(durations, 0.5)
    assert estimate is not None
    assert least <= estimate <= most


def test_a_bucket_holds_its_upper_bound() -> None:
    statistics = Statistics()
    statistics.record(GET, 200, 0.001, 0, 0)
    assert statistics.total().durations(GET)[BOUNDS.index(0.001)] == 1


def test_the_buckets_rise_by_a_seventh_at_most() -> None:
    assert all(low < high < low * 1.15 for low, high in itertools.pairwise(BOUNDS))


def test_the_workers_are_summed_and_told_apart() -> None:
    rows = bytearray(3 * ROW_BYTES)
    workers = [Statistics(rows, row) for row in range(3)]
    for times, worker in enumerate(workers, start=1):
        for _ in range(times):
            worker.record(GET, 200, 0.001, 1, 2)
        worker.opened()
    for worker in workers:
        total = worker.total()
        assert (total.requests(GET), total.connections, total.bytes_in, total.bytes_out) == (6, 3, 6, 12)
        assert [reading.requests(GET) for reading in worker.workers().values()] == [1, 2, 3]


def test_a_row_without_a_worker_is_no_worker() -> None:
    assert list(Statistics(bytearray(4 * ROW_BYTES), 2).workers()) == [2]


def test_the_next_worker_of_a_row_counts_on_and_begins_with_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = bytearray(ROW_BYTES)
    first = Statistics(rows)
    first.record(GET, 200, 0.001, 0, 10)
    first.refused("rate")
    first.opened()
    first.drain()
    monkeypatch.setattr(clock, "now", lambda: 5_000.0)
    second = Statistics(rows)
    second.record(GET, 200, 0.001, 0, 10)
    [worker] = second.workers().values()
    assert (worker.requests(GET), worker.bytes_out, worker.refusals["rate"], worker.accepted) == (2, 20, 1, 1)
    assert (worker.connections, worker.draining, worker.started, worker.starts) == (0, False, 5_000.0, 2)


def test_a_worker_that_was_killed_leaves_its_counters_to_the_next(tmp_path: Path) -> None:
    with (tmp_path / "rows").open("wb+") as file:
        file.truncate(2 * ROW_BYTES)
        shared = mmap.mmap(file.fileno(), 0)
        for _ in range(2):
            with subprocess.Popen(
                [sys.executable, "-c", A_WORKER, str(file.fileno()), "1", "500"],
                pass_fds=[file.fileno()],
                stdout=subprocess.PIPE,
                text=True,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == "counted\n"
                process.kill()
        reader = Statistics(shared, row=0)
        total = reader.total()
        assert (total.requests(GET), total.bytes_out, total.accepted) == (1_000, 10_000, 2)
        assert (reader.workers()[1].pid, reader.workers()[1].connections) == (process.pid, 1)
        retire(shared, 1)
        worker = reader.workers()[1]
        assert (worker.pid, worker.connections, worker.requests(GET), worker.starts) == (0, 0, 1_000, 2)


def test_what_the_backends_of_the_workers_counted_is_summed_and_never_falls() -> None:
    rows = bytearray(2 * ROW_BYTES)
    one, other = Statistics(rows, 0), Statistics(rows, 1)
    one.publish(Gauges(5, 50, expired=3, commits=10, committed_writes=40, failures=1))
    other.publish(Gauges(5, 50, expired=2, commits=None, committed_writes=None, failures=0))
    successor = Statistics(rows, 0)
    successor.publish(Gauges(5, 50, expired=1, commits=1, committed_writes=2, failures=0))
    successor.publish(Gauges(5, 50, expired=1, commits=2, committed_writes=4, failures=0))
    total = other.total()
    assert (total.expired, total.commits, total.committed_writes, total.failures) == (6, 12, 44, 1)


@pytest.mark.parametrize("size", [0, 1, ROW_BYTES - 8, ROW_BYTES + 8])
def test_memory_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"rows of {ROW_BYTES} bytes, not {size} bytes"):
        Statistics(bytearray(size))


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_beyond_the_memory_is_refused(row: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 1, not {row}"):
        Statistics(bytearray(2 * ROW_BYTES), row)


def test_a_row_begins_on_a_cache_line_of_its_own() -> None:
    assert ROW_BYTES % 64 == 0
