"""The model behind `scale.py`: from the cost of one call to nodes, money and latency. Pure arithmetic, without I/O.

Names end in their unit: `_us` microseconds, `_ms` milliseconds, `_ps` a second. A *shape* is a way to run aiokv. Each has
limits; a plan has as many nodes as its limits need, and says which limit is tightest or broken, and what to do about it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

MIB, GB = 2**20, 10**9
_EXACT_RANKS = 1_000
_P99 = math.log(100)
_MAX_CLUSTERS = 64
HOT_KEY_REMEDY = "a near cache for what is read, several keys for what is written"


class Cost(NamedTuple):
    """What a call of a shape costs, as measured on one core; CPU of the client is its owner's affair."""

    server_get_us: float
    server_set_us: float
    engine_get_us: float
    """CPU of the one engine node that answers."""
    engine_set_us: float
    entry_overhead_bytes: float
    """Bytes that an entry takes beside its value."""
    sets_ps: float = math.inf
    """Most durable sets of one writer."""
    commit_ms: float = 0.0


@dataclass(frozen=True)
class Assumptions:
    """What is not measured; each is an option of `scale.py`."""

    utilisation: float = 0.6
    """Share of a core, a link or a writer that is planned with."""
    value_bytes: int = 1_000
    set_share: float = 0.1
    """Share of requests that are sets."""
    zipf: float = 0.99
    """Exponent of the popularity of keys: the key of rank k gets a share of 1 / k ** zipf; 0 makes all equal."""
    batched_share: float = 0.0
    """Share of gets that reach servers in batches, as those of one turn of a client's loop do."""
    server_cores: int = 4
    server_price: float = 100.0
    """A month of a server node."""
    engine_gb: float = 16.0
    engine_price: float = 120.0
    """A month of an engine node, which has memory and one core for commands."""
    disk_gb: float = 1_000.0
    """Of the one machine with a SQLite file."""
    machine_cores: int = 32
    memory_share: float = 0.6
    """Share of an engine's memory that entries may fill; the rest is for copies at a fork, buffers and fragments."""
    replicas: int = 1
    """Of each primary."""
    max_primaries: int = 500
    link_gbit: float = 10.0
    """Network of a node, each way."""
    request_overhead_bytes: int = 400
    """Heads of request and answer."""
    round_trip_ms: float = 0.25
    """Between two machines."""
    variation: float = 1.0
    """Squared coefficient of variation of a call's CPU; 1 is exponential."""
    namespaces: float = 20
    """Sets are spread evenly over them."""
    watchers: int = 20
    """Connections that watch each namespace."""
    event_us: float = 15.0
    """CPU of one change for one watcher, in the server, and likewise in the watcher."""
    push_us: float = 1.0
    """CPU of an engine that tells one server process of one change."""
    client_processes: int = 200
    near_ttl_seconds: float = 1.0
    """Of the near cache that is the remedy for a hot key: each process asks for a key at most once in that time."""


@dataclass(frozen=True)
class Load:
    """What arrives: keys that are stored, gets and sets a second, and how many of each are for the hottest key."""

    keys: float
    gets_ps: float
    sets_ps: float
    hot_gets_ps: float
    hot_sets_ps: float

    @property
    def requests_ps(self) -> float:
        """Gets and sets."""
        return self.gets_ps + self.sets_ps


class Limit(NamedTuple):
    """A resource: how much of it is used, where 1 is all that the plan allows, and what to do past that."""

    name: str
    used: float
    remedy: str


@dataclass(frozen=True)
class Plan:
    """So many nodes of a shape for a load."""

    shape: str
    servers: int
    engines: int
    price: float
    get_ms: float
    get_p99_ms: float
    set_ms: float
    set_p99_ms: float
    limits: tuple[Limit, ...] = field(repr=False)
    remedies: tuple[str, ...] = ()

    @property
    def tightest(self) -> Limit:
        """The limit that is nearest to its end, or furthest past it."""
        return max(self.limits, key=lambda limit: limit.used)

    @property
    def works(self) -> bool:
        """Whether no limit is broken."""
        return self.tightest.used <= 1 + 1e-9


def harmonic(count: float, exponent: float) -> float:
    """Return the sum of `1 / k ** exponent` for k from 1 to count; exact up to a thousand, else by Euler and Maclaurin."""
    ranks = min(int(count), _EXACT_RANKS)
    exact = math.fsum(rank**-exponent for rank in range(1, ranks + 1))
    if count <= _EXACT_RANKS:
        return exact
    return exact + _integral(ranks, count, exponent) + (count**-exponent - ranks**-exponent) / 2


def _integral(begin: float, end: float, exponent: float) -> float:
    if abs(exponent - 1) < 1e-12:  # noqa: PLR2004 (as good as 1)
        return math.log(end / begin)
    return (end ** (1 - exponent) - begin ** (1 - exponent)) / (1 - exponent)


def load_of(keys: float, requests_ps: float, given: Assumptions) -> Load:
    """Return the load of so many keys and requests, with the share of the hottest key."""
    hottest = 1 / harmonic(keys, given.zipf)
    gets, sets = requests_ps * (1 - given.set_share), requests_ps * given.set_share
    return Load(keys, gets, sets, gets * hottest, sets * hottest)


def behind_near_caches(load: Load, given: Assumptions) -> Load:
    """Return what is left of a load where each client process remembers what it read for a while."""
    most_ps = given.client_processes / given.near_ttl_seconds
    if load.hot_gets_ps <= most_ps:
        return load
    # Ranks up to this one are asked for more often than the near caches let through.
    rank = load.keys if given.zipf == 0 else min(load.keys, (load.hot_gets_ps / most_ps) ** (1 / given.zipf))
    rest = load.hot_gets_ps * (harmonic(load.keys, given.zipf) - harmonic(math.floor(rank), given.zipf))
    return replace(load, gets_ps=math.floor(rank) * most_ps + max(0.0, rest), hot_gets_ps=most_ps)


def response_us(service_us: float, used: float, variation: float = 1.0) -> float:
    """Return the mean time in an M/G/1 queue and its service (Pollaczek and Khinchine); infinite where all of it is used."""
    if used >= 1:
        return math.inf
    return service_us * (1 + used * (1 + variation) / (2 * (1 - used)))


def _latency_ms(stages_us: Iterable[float], round_trips: int, fixed_ms: float, given: Assumptions) -> tuple[float, float]:
    """Return mean and 99th percentile of stages in a row: the slowest one's tail and the means of the others."""
    stages = list(stages_us)
    still_ms = round_trips * given.round_trip_ms + fixed_ms
    mean = sum(stages)
    return still_ms + mean / 1e3, still_ms + (mean + max(stages) * (_P99 - 1)) / 1e3


@dataclass(frozen=True)
class _Servers:
    """Server nodes for a load: how many, and the share of a core that is busy."""

    nodes: int
    busy: float
    watch_busy: float


def _bytes_ps(load: Load, given: Assumptions) -> float:
    return load.requests_ps * (given.value_bytes + given.request_overhead_bytes)


def _link_bytes_ps(given: Assumptions) -> float:
    return given.link_gbit * 1e9 / 8 * given.utilisation


def _events_ps(load: Load, given: Assumptions) -> float:
    return load.sets_ps * given.watchers


def _servers(load: Load, cost: Cost, given: Assumptions) -> _Servers:
    requests = (load.gets_ps * cost.server_get_us + load.sets_ps * cost.server_set_us) / 1e6
    watching = _events_ps(load, given) * given.event_us / 1e6
    by_cpu = (requests + watching) / (given.server_cores * given.utilisation)
    # A value comes from the engine and goes to the client: in one way each of the two counts once.
    by_link = _bytes_ps(load, given) / _link_bytes_ps(given)
    nodes = max(1, math.ceil(by_cpu - 1e-9), math.ceil(by_link - 1e-9))
    cores = nodes * given.server_cores
    return _Servers(nodes, (requests + watching) / cores, watching / cores)


def _watch_limits(load: Load, given: Assumptions) -> list[Limit]:
    one = load.sets_ps / given.namespaces * given.event_us / 1e6
    remedy = "spread the sets over more namespaces, so that a watcher follows fewer; or near caches with a ttl, without watch"
    return [Limit("changes for one watcher", one / given.utilisation, remedy)] if given.watchers else []


def plan_memory(load: Load, cost: Cost, given: Assumptions) -> Plan:
    """Plan one `aiokv serve --store memory://`: one process, one core."""
    busy = (
        load.gets_ps * cost.server_get_us + load.sets_ps * cost.server_set_us + _events_ps(load, given) * given.event_us
    ) / 1e6
    held = load.keys * (cost.entry_overhead_bytes + given.value_bytes)
    limits = (
        Limit("one process", busy / given.utilisation, "sqlite with workers, or redis"),
        Limit("memory", held / (given.engine_gb * GB * given.memory_share), "sqlite, or a cluster"),
        Limit("network", _bytes_ps(load, given) / _link_bytes_ps(given), "several servers, each with its namespaces"),
        *_watch_limits(load, given),
    )
    get, set_ = (
        _latency_ms([response_us(us, busy, given.variation)], 1, 0, given) for us in (cost.server_get_us, cost.server_set_us)
    )
    return Plan("memory", 1, 0, given.server_price, *get, *set_, limits)


def plan_sqlite(load: Load, cost: Cost, given: Assumptions) -> Plan:
    """Plan one machine: `aiokv serve --workers N` over one file, with one writer at a time."""
    servers = _servers(load, cost, given)
    busy = servers.busy * servers.nodes * given.server_cores / given.machine_cores
    cores = min(servers.nodes * given.server_cores, given.machine_cores)
    stored = load.keys * (cost.entry_overhead_bytes + given.value_bytes)
    limits = (
        Limit(
            "one SQLite writer",
            load.sets_ps / (cost.sets_ps * given.utilisation),
            "several servers, each with its namespaces, or a cluster",
        ),
        Limit("cores of one machine", busy / given.utilisation, "several servers, each with its namespaces, or a cluster"),
        Limit("disk", stored / (given.disk_gb * GB * given.memory_share), "a larger disk, or a cluster"),
        Limit("network", _bytes_ps(load, given) / _link_bytes_ps(given), "several servers, each with its namespaces"),
        *_watch_limits(load, given),
    )
    # A set waits for the commit under way and then for its own.
    get = _latency_ms([response_us(cost.server_get_us, servers.busy, given.variation)], 1, 0, given)
    set_ = _latency_ms([response_us(cost.server_set_us, servers.busy, given.variation)], 1, 1.5 * cost.commit_ms, given)
    return Plan("sqlite", 1, 0, given.server_price * cores / given.server_cores, *get, *set_, limits)


def plan_cluster(
    load: Load, cost: Cost, given: Assumptions, *, max_primaries: int | None = None, name: str = "cluster"
) -> Plan:
    """Plan servers without state over primaries that share the keys; `max_primaries=1` is a single Redis."""
    most = given.max_primaries if max_primaries is None else max_primaries
    servers = _servers(load, cost, given)
    held = load.keys * (cost.entry_overhead_bytes + given.value_bytes) / (given.engine_gb * GB * given.memory_share)
    # Each server process with a watcher of a namespace is told of its changes.
    pushes_ps = load.sets_ps * min(given.watchers, servers.nodes * given.server_cores)
    total = (load.gets_ps * cost.engine_get_us + load.sets_ps * cost.engine_set_us + pushes_ps * given.push_us) / 1e6
    hot = (load.hot_gets_ps * cost.engine_get_us + load.hot_sets_ps * cost.engine_set_us) / 1e6
    link = _bytes_ps(load, given) / _link_bytes_ps(given)
    hot_link = link * (load.hot_gets_ps + load.hot_sets_ps) / max(load.requests_ps, 1e-9)
    # The node of the hottest key has that one, and its part of the rest.
    by_cpu = (total - hot) / (given.utilisation - hot) if hot < given.utilisation else math.inf
    by_link = (link - hot_link) / (1 - hot_link) if hot_link < 1 else math.inf
    needed = max(1.0, held, by_cpu, by_link)
    primaries = most if needed > most else math.ceil(needed - 1e-9)
    busiest = hot + (total - hot) / primaries
    past = "several clusters, each with its namespaces" if most > 1 else "a cluster"
    cpu = ("the hottest key", HOT_KEY_REMEDY) if hot > busiest / 2 else ("CPU of the primaries", past)
    limits = (
        Limit(cpu[0], busiest / given.utilisation, cpu[1]),
        Limit("memory", held / primaries, past),
        Limit("network of the busiest primary", hot_link + (link - hot_link) / primaries, past),
        *_watch_limits(load, given),
    )
    get, set_ = (
        _latency_ms(
            [response_us(of_server, servers.busy, given.variation), response_us(of_engine, busiest, given.variation)],
            2,
            0,
            given,
        )
        for of_server, of_engine in ((cost.server_get_us, cost.engine_get_us), (cost.server_set_us, cost.engine_set_us))
    )
    engines = primaries * (1 + given.replicas)
    price = servers.nodes * given.server_price + engines * given.engine_price
    return Plan(name, servers.nodes, engines, price, *get, *set_, limits)


def plan_redis(load: Load, cost: Cost, given: Assumptions) -> Plan:
    """Plan servers without state over one Redis and its replicas."""
    return plan_cluster(load, cost, given, max_primaries=1, name="redis")


PLANNERS = {"memory": plan_memory, "sqlite": plan_sqlite, "redis": plan_redis, "cluster": plan_cluster}


def split_hot_keys(load: Load, cost: Cost, given: Assumptions) -> tuple[Load, int]:
    """Return a load whose hottest keys are several keys each, until one takes half a primary's room; and how many they are."""
    hot = (load.hot_gets_ps * cost.engine_get_us + load.hot_sets_ps * cost.engine_set_us) / 1e6
    parts = max(1, math.ceil(hot / (given.utilisation / 2)))
    return replace(load, hot_gets_ps=load.hot_gets_ps / parts, hot_sets_ps=load.hot_sets_ps / parts), parts


def plan_several_clusters(load: Load, cost: Cost, given: Assumptions, clusters: int) -> Plan:
    """Plan so many clusters, each with its part of the namespaces; the hottest key is in one of them."""
    gets, sets = load.gets_ps / clusters, load.sets_ps / clusters
    part = Load(load.keys / clusters, gets, sets, min(gets, load.hot_gets_ps), min(sets, load.hot_sets_ps))
    plan = plan_cluster(part, cost, replace(given, namespaces=given.namespaces / clusters))
    return replace(plan, servers=plan.servers * clusters, engines=plan.engines * clusters, price=plan.price * clusters)


def _remedied(load: Load, cost: Cost, given: Assumptions) -> Iterable[Plan]:
    """Yield plans of clusters with each set of remedies, as few clusters as work."""
    near_cache = f"NearCache(ttl={given.near_ttl_seconds:g})"
    near = behind_near_caches(load, given)
    split, parts = split_hot_keys(near, cost, given)
    for done, changed in (
        ((), load),
        ((near_cache,), near),
        ((near_cache, f"each of the hottest keys as {parts}"), split),
    ):
        for watching, watched in (((), given), (("no watch",), replace(given, watchers=0))):
            for clusters in range(1, int(min(_MAX_CLUSTERS, given.namespaces)) + 1):
                several = (f"{clusters} clusters",) if clusters > 1 else ()
                plan = plan_several_clusters(changed, cost, watched, clusters)
                yield replace(plan, remedies=(*done, *watching, *several))
                if plan.works:
                    break


def best_plan(load: Load, costs: Mapping[str, Cost], given: Assumptions) -> Plan:
    """Return the cheapest plan that works; else that with the fewest remedies; else the one that is broken least."""
    plans = [PLANNERS[shape](load, cost, given) for shape, cost in costs.items()]
    if not any(plan.works for plan in plans) and "cluster" in costs:
        plans += _remedied(load, costs["cluster"], given)
    working = [plan for plan in plans if plan.works]
    if working:
        return min(working, key=lambda plan: (len(plan.remedies), plan.price))
    return min(plans, key=lambda plan: plan.tightest.used)


def highest_rate(shape: str, keys: float, cost: Cost, given: Assumptions) -> tuple[float, Limit]:
    """Return the most requests a second that a shape takes for so many keys, and the limit that ends it; 0 where keys do."""
    planner, low, high = PLANNERS[shape], 0.0, 1.0
    if not (first := planner(load_of(keys, 0, given), cost, given)).works:
        return 0.0, first.tightest
    while planner(load_of(keys, high, given), cost, given).works:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if planner(load_of(keys, middle, given), cost, given).works else (low, middle)
    return low, planner(load_of(keys, high, given), cost, given).tightest
