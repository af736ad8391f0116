"""A store on a cluster: keys on many nodes, slots that move, primaries that fail."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Generator

import pytest
from redis_servers import RedisCluster, RedisServer, may_start_cluster, needs_server, running_cluster

from aiokv import CallTimeoutError, ConnectError, RedisOptions, RejectedError, RetryPolicy
from aiokv.backends.capabilities import Entry
from aiokv.backends.redis.backend import RedisBackend
from aiokv.backends.redis.names import entry_key
from aiokv.backends.redis.topology import slot_of
from aiokv.backends.redis.urls import parse_url
from aiokv.backends.watching import Alive, Changed, Lost, Watch
from aiokv.errors import CallError
from aiokv.listing import clear_keys

pytestmark = [needs_server, may_start_cluster]


@pytest.fixture
def cluster(redis_cluster: RedisCluster) -> RedisCluster:
    for node in redis_cluster.primaries():
        node.ask("FLUSHALL")
    return redis_cluster


@pytest.fixture
async def backend(cluster: RedisCluster) -> AsyncGenerator[RedisBackend]:
    backend = RedisBackend(parse_url(cluster.url))
    yield backend
    await backend.aclose()


@pytest.fixture
def own_cluster() -> Generator[RedisCluster]:
    """A cluster that a test may break."""
    with running_cluster() as cluster:
        yield cluster


class Load:
    """Tasks that set and get keys of their own, and note what fails."""

    def __init__(self, backend: RedisBackend, tasks: int) -> None:
        self.failed: list[Exception] = []
        self.values: dict[str, str] = {}
        self._backend = backend
        self._task_count = tasks
        self._is_over = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        tasks = [asyncio.create_task(self._work(number)) for number in range(self._task_count)]
        try:
            yield
        finally:
            self._is_over = True
            await asyncio.gather(*tasks)

    async def _work(self, number: int) -> None:
        count = 0
        while not self._is_over:
            key, count = f"k{number}-{count % 50}", count + 1
            try:
                await self._backend.set("db", key, str(count), 600)
                self.values[key] = str(count)
                await self._backend.get("db", key)
            except Exception as error:  # noqa: BLE001 (any is a failed call)
                self.failed.append(error)
            await asyncio.sleep(0.005)


async def next_of(watch: Watch, kind: type) -> object:
    async with asyncio.timeout(15):
        async for event in watch:
            if isinstance(event, kind):
                return event
    raise AssertionError("the watch ended")


async def test_keys_of_one_namespace_are_on_every_node_whatever_braces_they_have(
    cluster: RedisCluster, backend: RedisBackend
) -> None:
    await backend.set_many("{db}", [Entry(f"{{same}}{i}", "v", 60) for i in range(300)])
    sizes = [node.ask("DBSIZE") for node in cluster.primaries()]
    assert sum(sizes) == 300
    assert min(sizes) > 50


@pytest.mark.parametrize("key", ["k", "{a}", "{", "}{", "{}", "a{b}c", "é", "x" * 500])
async def test_slot_is_the_one_that_the_server_computes(cluster: RedisCluster, key: str) -> None:
    wire_key = entry_key("db", key)
    assert cluster.nodes[0].ask("CLUSTER", "KEYSLOT", wire_key) == slot_of(wire_key)


async def test_one_node_of_the_url_is_enough(cluster: RedisCluster) -> None:
    backend = RedisBackend(parse_url(f"redis+cluster://127.0.0.1:1,{cluster.nodes[4].address}"))
    await backend.set_many("db", [Entry(f"k{i}", "v", 60) for i in range(100)])
    assert await backend.count("db") == 100
    await backend.aclose()


async def test_no_node_of_the_url_means_that_nothing_was_sent() -> None:
    backend = RedisBackend(parse_url("redis+cluster://127.0.0.1:1,127.0.0.1:2"), policy=RetryPolicy(total_timeout=0.5))
    with pytest.raises(ConnectError) as caught:
        await backend.set("db", "k", "v", 60)
    assert not caught.value.maybe_applied
    assert await backend.health() is not None
    await backend.aclose()


async def test_url_of_one_server_that_is_a_node_of_a_cluster_names_the_scheme(cluster: RedisCluster) -> None:
    backend = RedisBackend(parse_url(f"redis://{cluster.nodes[0].address}"))
    with pytest.raises(RejectedError, match=r"redis\+cluster"):
        await asyncio.gather(*(backend.get("db", f"k{i}") for i in range(20)))
    await backend.aclose()


async def test_replicated_writes_succeed(cluster: RedisCluster) -> None:
    backend = RedisBackend(parse_url(cluster.url), options=RedisOptions(durability="replicated"))
    await backend.set("db", "k", "v", 60)
    assert list(await backend.set_many("db", [Entry(f"k{i}", "v", 60) for i in range(200)])) == [None] * 200
    assert (await backend.claim("db", "k", "me", 10))[:2] == (True, 10.0)
    await backend.aclose()


async def test_cluster_is_well(backend: RedisBackend) -> None:
    assert await backend.health() is None


def move_slot(cluster: RedisCluster, slot: int, source: RedisServer, target: RedisServer) -> Generator[None]:
    """Move a slot, with a pause while it is half moved."""
    source_id, target_id = (node.ask("CLUSTER", "MYID").decode() for node in (source, target))
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 10_000)
    for key in keys[::2]:
        source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
    yield
    for key in source.ask("CLUSTER", "GETKEYSINSLOT", slot, 10_000):
        source.ask("MIGRATE", "127.0.0.1", target.port, key, 0, 5000)
    for node in (target, source, *cluster.primaries()):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", target_id)


async def test_slot_that_moves_costs_no_call(cluster: RedisCluster, backend: RedisBackend) -> None:
    slot = slot_of(entry_key("db", "k0"))
    keys = [f"k{i}" for i in range(60_000) if slot_of(entry_key("db", f"k{i}")) == slot]
    assert len(keys) > 1
    source, target = cluster.primaries()[:2]
    if source.ask("CLUSTER", "COUNTKEYSINSLOT", slot) == 0:
        await backend.set("db", "k0", "v", 60)
    owner = next(node for node in cluster.primaries() if node.ask("CLUSTER", "COUNTKEYSINSLOT", slot))
    source, target = owner, next(node for node in cluster.primaries() if node is not owner)
    await backend.set_many("db", [Entry(key, f"old {key}", 60) for key in keys])
    moving = move_slot(cluster, slot, source, target)
    next(moving)
    assert list(await backend.get_many("db", keys)) == [f"old {key}" for key in keys]
    assert [await backend.get("db", key) for key in keys] == [f"old {key}" for key in keys]
    await asyncio.gather(*(backend.set("db", key, f"new {key}", 60) for key in keys[:2]))
    next(moving, None)
    assert [await backend.get("db", key) for key in keys[:2]] == [f"new {key}" for key in keys[:2]]
    assert list(await backend.get_many("db", keys[2:])) == [f"old {key}" for key in keys[2:]]
    back = move_slot(cluster, slot, target, source)
    next(back)
    next(back, None)
    assert await backend.count("db") == len(keys)
    assert (await backend.clear("db")).deleted == len(keys)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "standing still"])
async def test_primary_that_fails_costs_no_call_and_the_watch_goes_on(own_cluster: RedisCluster, fault: str) -> None:
    backend = RedisBackend(parse_url(own_cluster.url))
    load = Load(backend, 10)
    victim = own_cluster.primaries()[0]
    async with backend.watch("db") as watch, load.running():
        await next_of(watch, Alive)
        if fault == "killed":
            victim.kill()
        else:
            victim.pause()
        # Once where continuity was lost, once where it is back.
        await next_of(watch, Lost)
        await next_of(watch, Lost)
        await next_of(watch, Changed)
        await asyncio.sleep(0.5)
    assert load.failed == []
    assert len(load.values) > 100
    assert await backend.health() is None
    await backend.set_many("db", [Entry(f"after {i}", "v", 60) for i in range(100)])
    listed = 0
    cursor = None
    while True:
        page = await backend.scan("db", "after", cursor, 50)
        listed += len(page.infos)
        cursor = page.cursor
        if cursor is None:
            break
    assert listed == 100
    victim.resume()
    await backend.aclose()


@pytest.mark.slow
async def test_shard_that_lacks_its_replica_holds_no_key_of_another_one_up(own_cluster: RedisCluster) -> None:
    backend = RedisBackend(parse_url(own_cluster.url), options=RedisOptions(durability="replicated"))
    keys = [f"k{i}" for i in range(60)]
    assert list(await backend.set_many("db", [Entry(key, "v", 600) for key in keys])) == [None] * 60
    primary, replica = own_cluster.nodes[0], own_cluster.nodes[3]
    replica.kill()
    started = time.monotonic()
    outcomes = await backend.set_many("db", [Entry(key, "w", 600) for key in keys])
    assert time.monotonic() - started < 8
    lacking = {key for key, outcome in zip(keys, outcomes, strict=True) if outcome is not None}
    with primary.client() as client:
        assert lacking == {key for key in keys if entry_key("db", key) in set(client.scan_iter(count=1000))}
    assert 0 < len(lacking) < 60
    assert all(outcome is None or isinstance(outcome, CallTimeoutError) for outcome in outcomes)
    assert str(replica.port) not in (problem := await backend.health() or "")
    assert primary.address in problem
    await backend.aclose()


@pytest.mark.slow
async def test_listing_outlives_a_failover(own_cluster: RedisCluster) -> None:
    backend = RedisBackend(parse_url(own_cluster.url), options=RedisOptions(durability="replicated"))
    keys = {f"k{i}" for i in range(600)}
    await backend.set_many("db", [Entry(key, "v", 600) for key in keys])
    found: set[str] = set()
    cursor: str | None = None
    is_killed = False
    started = time.monotonic()
    while True:
        page = await backend.scan("db", "", cursor, 40)
        found |= {info.key for info in page.infos}
        cursor = page.cursor
        if len(found) > 100 and not is_killed:
            own_cluster.primaries()[0].kill()
            is_killed = True
        if cursor is None:
            break
    assert is_killed
    assert found == keys
    assert time.monotonic() - started < 15
    await backend.aclose()


async def test_clear_that_fails_in_part_says_that_entries_are_gone(own_cluster: RedisCluster) -> None:
    backend = RedisBackend(parse_url(own_cluster.url), policy=RetryPolicy(attempts=1))
    try:
        await backend.set_many("db", [Entry(f"k{i}", "v", 60) for i in range(200)])
        # The others come before it, and their keys are gone by then.
        own_cluster.primaries()[-1].kill()
        with pytest.raises(CallError) as caught:
            await clear_keys(backend, "db", "")
        error = caught.value
        assert (error.verb, error.maybe_applied) == ("clear", True)
        assert "nothing was sent" not in error.reason
        assert error.reason.endswith("other entries were deleted before")
    finally:
        await backend.aclose()
