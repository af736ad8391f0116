"""`/metrics`: what Prometheus' own parser reads from it."""

import re
from collections.abc import Iterator

import pytest

from aiokv.backends.base import Gauges
from aiokv.server.statistics import GET, REASONS, ROW_BYTES, SET, VERBS, Statistics, quantile

pytest.importorskip("prometheus_client", reason="pip install 'aiokv[server]'")

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from aiokv.server.metrics import CONTENT_TYPE, exposition

GAUGES = Gauges(
    entries=7, value_bytes=700, expired=3, commits=10, committed_writes=45, wal_bytes=4_096, disk_free_bytes=10**12, failures=2
)


def parse(text: bytes) -> Iterator[Metric]:
    return text_string_to_metric_families(text.decode())


def samples_of(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for family in parse(text) for sample in family.samples
    }


def value_of(text: bytes, name: str, **labels: str) -> float:
    return samples_of(text)[name, frozenset(labels.items())]


@pytest.fixture
def busy() -> Statistics:
    statistics = Statistics()
    for millisecond in range(1, 101):
        statistics.record(GET, 200 if millisecond % 4 else 404, millisecond / 1_000, 0, 50)
    statistics.record(SET, 200, 0.3, 1_000, 11)
    statistics.opened()
    statistics.refused("quota")
    statistics.wrong_key()
    return statistics


def test_requests_are_there_by_verb_and_status(busy: Statistics) -> None:
    text = exposition(busy)
    assert value_of(text, "aiokv_requests_total", verb="get", status="200") == 75
    assert value_of(text, "aiokv_requests_total", verb="get", status="404") == 25
    assert value_of(text, "aiokv_requests_total", verb="set", status="200") == 1
    assert (value_of(text, "aiokv_get_hits_total"), value_of(text, "aiokv_get_misses_total")) == (75, 25)
    assert (value_of(text, "aiokv_received_bytes_total"), value_of(text, "aiokv_sent_bytes_total")) == (1_000, 5_011)


def test_the_histogram_of_durations_is_cumulative_and_whole(busy: Statistics) -> None:
    text = exposition(busy)
    buckets = {
        float(dict(labels)["le"]): value
        for (name, labels), value in samples_of(text).items()
        if name == "aiokv_request_seconds_bucket" and ("verb", "get") in labels
    }
    assert [buckets[bound] for bound in (0.0005, 0.001, 0.005, 0.05, 0.1, float("inf"))] == [0, 1, 5, 50, 100, 100]
    counts = [buckets[bound] for bound in sorted(buckets)]
    assert counts == sorted(counts)
    assert value_of(text, "aiokv_request_seconds_count", verb="get") == 100
    assert value_of(text, "aiokv_request_seconds_sum", verb="get") == pytest.approx(5.05)


def test_every_verb_and_reason_is_there_before_the_first_request() -> None:
    samples = samples_of(exposition(Statistics()))
    assert {dict(labels)["reason"] for name, labels in samples if name == "aiokv_refusals_total"} == set(REASONS)
    assert {dict(labels)["verb"] for name, labels in samples if name == "aiokv_request_seconds_count"} == set(VERBS)


def test_connections_refusals_and_wrong_keys_are_counted(busy: Statistics) -> None:
    text = exposition(busy)
    assert value_of(text, "aiokv_connections") == 1
    assert value_of(text, "aiokv_connections_accepted_total") == 1
    assert value_of(text, "aiokv_refusals_total", reason="quota") == 1
    assert value_of(text, "aiokv_wrong_keys_total") == 1


def test_the_backend_shows_its_sizes_and_counts(busy: Statistics) -> None:
    text = exposition(busy, GAUGES)
    expected = {
        "aiokv_entries": 7,
        "aiokv_value_bytes": 700,
        "aiokv_expired_entries_total": 3,
        "aiokv_commits_total": 10,
        "aiokv_committed_writes_total": 45,
        "aiokv_wal_bytes": 4_096,
        "aiokv_disk_free_bytes": 10**12,
        "aiokv_backend_failures_total": 2,
    }
    assert {name: value_of(text, name) for name in expected} == expected


def test_what_a_backend_does_not_have_is_left_out(busy: Statistics) -> None:
    names = {name for name, _ in samples_of(exposition(busy, Gauges(entries=1, value_bytes=2, expired=0)))}
    assert "aiokv_entries" in names
    assert not names & {"aiokv_commits_total", "aiokv_committed_writes_total", "aiokv_wal_bytes", "aiokv_disk_free_bytes"}
    assert "aiokv_entries" not in {name for name, _ in samples_of(exposition(busy))}


def test_the_workers_are_summed() -> None:
    rows = bytearray(3 * ROW_BYTES)
    one, other = Statistics(rows, 0), Statistics(rows, 1)
    one.record(GET, 200, 0.001, 0, 1)
    other.record(GET, 200, 0.001, 0, 1)
    other.publish(GAUGES)
    other.drain()
    text = exposition(one, GAUGES)
    assert value_of(text, "aiokv_requests_total", verb="get", status="200") == 2
    assert value_of(text, "aiokv_committed_writes_total") == 90
    assert value_of(text, "aiokv_entries") == 7
    assert (value_of(text, "aiokv_workers"), value_of(text, "aiokv_workers_draining")) == (2, 1)
    assert value_of(text, "aiokv_worker_starts_total", worker="1") == 1
    assert value_of(text, "aiokv_worker_start_time_seconds", worker="1") > 1.7e9


def test_the_names_keep_to_the_conventions(busy: Statistics) -> None:
    for family in parse(exposition(busy, GAUGES, "1.2")):
        assert re.fullmatch(r"aiokv_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert family.type in {"counter", "gauge", "histogram"}
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert set(sample.labels) <= {"verb", "status", "reason", "le", "worker", "version"}


def test_a_percentile_of_the_buckets_is_that_of_the_status_page(busy: Statistics) -> None:
    # Prometheus' histogram_quantile interpolates between the exposed bounds 0.05 and 0.1.
    text = exposition(busy)
    low = value_of(text, "aiokv_request_seconds_bucket", verb="get", le="0.05")
    high = value_of(text, "aiokv_request_seconds_bucket", verb="get", le="0.1")
    estimate = 0.05 + 0.05 * (90 - low) / (high - low)
    assert quantile(busy.total().durations(GET), 0.9) == pytest.approx(estimate, rel=0.1)


def test_the_version_and_the_media_type_are_there(busy: Statistics) -> None:
    assert value_of(exposition(busy, None, '1.0"\n'), "aiokv_build_info", version='1.0"\n') == 1
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")
