"""The laws of the model of `benchmarks/scale.py`: it adds up, grows with its load, and agrees with what is known."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scale_model import (
    PLANNERS,
    Assumptions,
    Cost,
    behind_near_caches,
    best_plan,
    harmonic,
    highest_rate,
    load_of,
    plan_cluster,
    plan_several_clusters,
    plan_sqlite,
    response_us,
    split_hot_keys,
)

ASSUMED = Assumptions()
COSTS = {
    "memory": Cost(25, 30, 0, 0, 250),
    "sqlite": Cost(40, 60, 0, 0, 120, sets_ps=20_000, commit_ms=0.5),
    "redis": Cost(90, 95, 12, 14, 90),
    "cluster": Cost(100, 105, 15, 18, 110),
}
shapes = pytest.mark.parametrize("shape", list(COSTS))
many_keys = st.floats(1e2, 1e9)
rates = st.floats(1, 1e7)


@pytest.mark.parametrize(("used", "times"), [(0.0, 1.0), (0.5, 2.0), (0.9, 10.0), (0.99, 100.0)])
def test_exponential_calls_wait_as_in_the_queue_of_one_server(used: float, times: float) -> None:
    assert response_us(10, used) == pytest.approx(10 * times)


def test_calls_that_take_all_the_same_time_wait_half_as_long() -> None:
    wait = response_us(10, 0.8) - 10
    assert response_us(10, 0.8, variation=0) - 10 == pytest.approx(wait / 2)


def test_queue_that_is_full_never_ends() -> None:
    assert response_us(10, 1.0) == math.inf


@pytest.mark.parametrize("exponent", [0.0, 0.5, 0.99, 1.0, 1.2])
@pytest.mark.parametrize("count", [1, 10, 1_000, 1_001, 200_000])
def test_shares_of_keys_add_up_to_one(count: int, exponent: float) -> None:
    assert harmonic(count, exponent) == pytest.approx(math.fsum(rank**-exponent for rank in range(1, count + 1)), rel=1e-6)


@pytest.mark.parametrize(("keys", "zipf", "share"), [(1, 0.99, 1.0), (1e6, 0.0, 1e-6), (3, 1.0, 6 / 11)])
def test_hottest_key_has_its_share(keys: float, zipf: float, share: float) -> None:
    load = load_of(keys, 1_000, replace(ASSUMED, zipf=zipf, set_share=0.25))
    assert (load.hot_gets_ps, load.hot_sets_ps) == (pytest.approx(750 * share), pytest.approx(250 * share))
    assert load.requests_ps == pytest.approx(1_000)


@shapes
@given(keys=many_keys, rate=rates, factor=st.floats(1, 50))
def test_more_load_never_needs_less(shape: str, keys: float, rate: float, factor: float) -> None:
    plans = [PLANNERS[shape](load_of(keys, one, ASSUMED), COSTS[shape], ASSUMED) for one in (rate, rate * factor)]
    assert plans[0].servers <= plans[1].servers
    assert plans[0].engines <= plans[1].engines
    assert plans[0].price <= plans[1].price
    assert plans[0].works >= plans[1].works


@shapes
@given(keys=many_keys, rate=rates, factor=st.integers(1, 50))
def test_larger_values_never_need_less(shape: str, keys: float, rate: float, factor: int) -> None:
    larger = replace(ASSUMED, value_bytes=ASSUMED.value_bytes * factor)
    plans = [PLANNERS[shape](load_of(keys, rate, given_), COSTS[shape], given_) for given_ in (ASSUMED, larger)]
    assert (plans[0].engines, plans[0].servers) <= (plans[1].engines, plans[1].servers)
    assert plans[0].price <= plans[1].price
    assert plans[0].works >= plans[1].works


@given(keys=many_keys, rate=rates, zipf=st.floats(0, 0.9))
def test_a_hotter_key_never_needs_fewer_primaries(keys: float, rate: float, zipf: float) -> None:
    plans = [
        plan_cluster(load_of(keys, rate, given_), COSTS["cluster"], given_)
        for given_ in (replace(ASSUMED, zipf=zipf), replace(ASSUMED, zipf=zipf + 0.3))
    ]
    assert plans[0].engines <= plans[1].engines


@given(keys=many_keys, rate=rates)
def test_plan_of_a_cluster_adds_up(keys: float, rate: float) -> None:
    load, cost = load_of(keys, rate, ASSUMED), COSTS["cluster"]
    plan = plan_cluster(load, cost, ASSUMED)
    assert plan.price == pytest.approx(plan.servers * ASSUMED.server_price + plan.engines * ASSUMED.engine_price)
    primaries = plan.engines / (1 + ASSUMED.replicas)
    assert primaries == int(primaries)
    if plan.works:
        # The servers have the cores for the requests, and the primaries for their calls, within what is planned with.
        requests = (load.gets_ps * cost.server_get_us + load.sets_ps * cost.server_set_us) / 1e6
        assert requests <= plan.servers * ASSUMED.server_cores * ASSUMED.utilisation + 1e-6
        calls = (load.gets_ps * cost.engine_get_us + load.sets_ps * cost.engine_set_us) / 1e6
        assert calls <= primaries * ASSUMED.utilisation + 1e-6
        assert keys * (cost.entry_overhead_bytes + ASSUMED.value_bytes) <= primaries * 16e9 * 0.6 * (1 + 1e-9)
        # And one primary less would not do.
        if primaries > 1:
            fewer = plan_cluster(load, cost, ASSUMED, max_primaries=int(primaries) - 1)
            assert not fewer.works


def test_small_cluster_is_as_by_hand() -> None:
    plain = Assumptions(zipf=0, set_share=0, watchers=0, utilisation=0.5, value_bytes=1_000, round_trip_ms=1.0)
    cost = Cost(100, 100, 19.9, 19.9, 0)
    plan = plan_cluster(load_of(1e6, 1e5, plain), cost, plain)
    # 1e5 gets of 100 us are 10 cores, so 20 at one half: 5 nodes of 4. In the engine they are 1.99 cores, so 4 primaries.
    assert (plan.servers, plan.engines) == (5, 8)
    # Both queues are half full and take twice their service: 200 and 40 us, and two round trips.
    assert plan.get_ms == pytest.approx(2.24, rel=1e-2)
    assert plan.get_p99_ms == pytest.approx(2 + 0.2 * math.log(100) + 0.04, rel=1e-2)


def test_hottest_key_breaks_a_cluster_that_more_nodes_do_not_help() -> None:
    load = load_of(1e6, 1e6, ASSUMED)
    plan = plan_cluster(load, COSTS["cluster"], ASSUMED)
    assert (plan.works, plan.tightest.name) == (False, "the hottest key")
    assert "near cache" in plan.tightest.remedy
    assert not plan_cluster(load, COSTS["cluster"], replace(ASSUMED, max_primaries=10**6)).works
    assert plan_cluster(behind_near_caches(load, ASSUMED), COSTS["cluster"], ASSUMED).works


@given(keys=many_keys, rate=rates, zipf=st.floats(0, 1.5))
def test_near_caches_let_no_more_through_than_there_was(keys: float, rate: float, zipf: float) -> None:
    assumed = replace(ASSUMED, zipf=zipf)
    load = load_of(keys, rate, assumed)
    near = behind_near_caches(load, assumed)
    assert near.hot_gets_ps <= max(ASSUMED.client_processes / ASSUMED.near_ttl_seconds, 0) or near == load
    assert near.hot_gets_ps <= near.gets_ps * (1 + 1e-6) + 1e-6
    assert near.gets_ps <= load.gets_ps * (1 + 1e-6)
    assert (near.sets_ps, near.hot_sets_ps) == (load.sets_ps, load.hot_sets_ps)


def test_near_caches_of_equal_keys_let_each_key_through_once_for_each_process() -> None:
    assumed = replace(ASSUMED, zipf=0, set_share=0, client_processes=50, near_ttl_seconds=2.0)
    assert behind_near_caches(load_of(10, 1e6, assumed), assumed).gets_ps == pytest.approx(10 * 25)


def test_key_that_is_written_too_often_becomes_several() -> None:
    load = behind_near_caches(load_of(1e4, 1e7, ASSUMED), ASSUMED)
    split, parts = split_hot_keys(load, COSTS["cluster"], ASSUMED)
    assert parts > 1
    assert split.hot_sets_ps * parts == pytest.approx(load.hot_sets_ps)
    assert split.hot_sets_ps * COSTS["cluster"].engine_set_us / 1e6 <= ASSUMED.utilisation / 2


def test_one_writer_of_sqlite_breaks_first_where_much_is_set() -> None:
    busy = replace(ASSUMED, set_share=0.9)
    plan = plan_sqlite(load_of(1e4, 20_000, busy), COSTS["sqlite"], busy)
    assert (plan.works, plan.tightest.name) == (False, "one SQLite writer")
    # 12,000 sets a second are 60 % of what it can do.
    assert plan.tightest.used == pytest.approx(18_000 / 12_000)


def test_watcher_that_cannot_follow_its_namespace_is_named() -> None:
    assumed = replace(ASSUMED, zipf=0, set_share=0.5, namespaces=1)
    plan = plan_cluster(load_of(1e6, 1e6, assumed), COSTS["cluster"], assumed)
    assert (plan.works, plan.tightest.name) == (False, "changes for one watcher")
    assert plan_cluster(load_of(1e6, 1e6, assumed), COSTS["cluster"], replace(assumed, namespaces=20)).works


def test_watchers_cost_servers() -> None:
    load = load_of(1e6, 1e5, ASSUMED)
    alone = plan_cluster(load, COSTS["cluster"], replace(ASSUMED, watchers=0))
    watched = plan_cluster(load, COSTS["cluster"], replace(ASSUMED, watchers=100))
    events = load.sets_ps * 100 * ASSUMED.event_us / 1e6 / (ASSUMED.server_cores * ASSUMED.utilisation)
    assert watched.servers - alone.servers == pytest.approx(events, abs=1)


def test_several_clusters_share_all_but_the_hottest_key() -> None:
    load = load_of(1e9, 1e5, ASSUMED)
    one, two = (plan_several_clusters(load, COSTS["cluster"], ASSUMED, clusters) for clusters in (1, 2))
    assert one == plan_cluster(load, COSTS["cluster"], ASSUMED)
    assert two.engines == pytest.approx(one.engines, rel=0.1)
    hot = load_of(1e6, 1e6, ASSUMED)
    assert not plan_several_clusters(hot, COSTS["cluster"], ASSUMED, 20).works


@pytest.mark.parametrize(
    ("keys", "rate", "shape", "remedies"),
    [(1e4, 1e3, "memory", 0), (1e8, 1e4, "sqlite", 0), (1e4, 1e6, "cluster", 1), (1e6, 1e7, "cluster", 3)],
)
def test_cheapest_plan_that_works_is_chosen_with_as_few_remedies_as_it_needs(
    keys: float, rate: float, shape: str, remedies: int
) -> None:
    plan = best_plan(load_of(keys, rate, ASSUMED), COSTS, ASSUMED)
    assert (plan.works, plan.shape, len(plan.remedies)) == (True, shape, remedies)
    # Everything together, when all has to be there.
    others = [planner(load_of(keys, rate, ASSUMED), COSTS[name], ASSUMED) for name, planner in PLANNERS.items()]
    assert all(plan.price <= other.price for other in others if other.works)


def test_plan_that_cannot_work_says_what_breaks() -> None:
    plan = best_plan(load_of(1e9, 1e7, ASSUMED), {"memory": COSTS["memory"]}, ASSUMED)
    assert (plan.works, plan.shape) == (False, "memory")
    assert plan.tightest.used > 1


@shapes
@pytest.mark.parametrize("keys", [1e4, 1e6])
def test_highest_rate_works_and_a_little_more_does_not(shape: str, keys: float) -> None:
    rate, limit = highest_rate(shape, keys, COSTS[shape], ASSUMED)
    plans = [PLANNERS[shape](load_of(keys, one, ASSUMED), COSTS[shape], ASSUMED) for one in (rate * 0.999, rate * 1.001)]
    assert [plan.works for plan in plans] == [True, False]
    assert plans[1].tightest.name == limit.name


def test_keys_that_do_not_fit_leave_no_rate() -> None:
    rate, limit = highest_rate("redis", 1e9, COSTS["redis"], ASSUMED)
    assert (rate, limit.name) == (0.0, "memory")
