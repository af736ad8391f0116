"""The suites of the contract, run against Redis: one server, and a cluster."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest
from backends_under_test import over_http
from redis_servers import ExpiryClock, RedisCluster, RedisServer, may_start_cluster, needs_server

from aiokv.backends.base import Backend
from aiokv.backends.capabilities import Entry, WatchBackend
from aiokv.backends.redis.backend import RedisBackend
from aiokv.backends.redis.urls import parse_url
from aiokv.backends.watching import Changed, WatchEvent
from aiokv.testing.contract import BackendContract, BatchContract, ClaimContract, ScanContract, WatchContract
from aiokv.testing.contract.watch import begun, events_until


@contextlib.asynccontextmanager
async def open_redis(url: str) -> AsyncGenerator[RedisBackend]:
    backend = RedisBackend(parse_url(url))
    yield backend
    await backend.aclose()


def told_keys(events: Sequence[WatchEvent]) -> list[str]:
    """Return the keys that events name; any other event is a fault."""
    assert all(isinstance(event, Changed) for event in events), events
    return [event.key for event in events if isinstance(event, Changed)]


class RedisContract(BackendContract, BatchContract, ScanContract, ClaimContract, WatchContract):
    """The suites, but for what tracking cannot tell: whether a change that was followed by another one was a delete."""

    async def test_changes_of_a_key_come_in_the_order_of_their_commits(self, backend: Backend, watching: WatchBackend) -> None:
        async with watching.watch("db") as watch:
            await begun(watch)
            for _ in range(3):
                await backend.set("db", "k", "v", 60)
                await backend.set("db", "k", "w", 60)
                await backend.delete("db", "k")
            await backend.set("db", "end", "v", 60)
            events = await events_until(watch, "end")
            assert set(told_keys(events)) == {"k"}
            assert events[-1] == Changed("k", is_delete=True)

    @pytest.mark.parametrize("key", ["é", "😀", "a b", "a\nb", "data: x", "\uffff", '"', "x" * 1000], ids=ascii)
    async def test_odd_keys_are_told_as_they_are(self, backend: Backend, watching: WatchBackend, key: str) -> None:
        async with watching.watch("a b") as watch:
            await begun(watch)
            await backend.set("a b", key, "v", 60)
            await backend.delete("a b", key)
            # On a cluster, changes of keys of several nodes come in any order.
            await backend.set("a b", key, "v", 60)
            async for event in watch:
                if isinstance(event, Changed):
                    assert event.key == key
                    if not event.is_delete:
                        break

    async def test_batches_and_clearing_are_told(self, backend: RedisBackend, watching: WatchBackend) -> None:  # type: ignore[override]
        async with watching.watch("db") as watch:
            await begun(watch)
            await backend.set_many("db", [Entry(key, "v", 60) for key in "abc"])
            await backend.delete_many("db", ["b"])
            await backend.clear("db", "a")
            counts: Counter[str] = Counter()
            gone: set[str] = set()
            async for event in watch:
                if isinstance(event, Changed):
                    counts[event.key] += 1
                    gone |= {event.key} if event.is_delete else set()
                    if gone == {"a", "b"} and counts["c"]:
                        break
            assert counts.keys() == {"a", "b", "c"}


# A busy machine takes its time.
_LIMIT = pytest.mark.timeout(60)


@_LIMIT
@needs_server
class TestRedis(RedisContract):
    @pytest.fixture
    def clock(self, redis_server: RedisServer) -> ExpiryClock:
        redis_server.ask("FLUSHALL")
        return ExpiryClock(redis_server)

    @pytest.fixture
    async def backend(self, redis_server: RedisServer, clock: ExpiryClock) -> AsyncGenerator[Backend]:  # noqa: ARG002 (empties it)
        async with open_redis(f"redis://{redis_server.address}") as backend:
            yield backend


@needs_server
class TestHttpOverRedis(TestRedis):
    @pytest.fixture
    async def backend(self, redis_server: RedisServer, clock: Any, tmp_path: Path) -> AsyncGenerator[Backend]:
        opener = over_http(lambda _folder, _clock: open_redis(f"redis://{redis_server.address}"))
        async with opener(tmp_path, clock) as backend:
            yield backend


@needs_server
@may_start_cluster
class TestRedisCluster(RedisContract):
    @pytest.fixture
    def clock(self, redis_cluster: RedisCluster) -> ExpiryClock:
        primaries = redis_cluster.primaries()
        for node in primaries:
            node.ask("FLUSHALL")
        return ExpiryClock(*primaries)

    @pytest.fixture
    async def backend(self, redis_cluster: RedisCluster, clock: ExpiryClock) -> AsyncGenerator[Backend]:  # noqa: ARG002 (empties it)
        async with open_redis(redis_cluster.url) as backend:
            set_now = backend.set

            async def set_later(db_name: str, key: str, value: str, ttl_seconds: int) -> None:
                # Changes of keys of several nodes come in no order: so what the suites wait for is set a moment later.
                await asyncio.sleep(0.1 if key == "end" else 0)
                await set_now(db_name, key, value, ttl_seconds)

            backend.set = set_later  # type: ignore[method-assign]
            yield backend
