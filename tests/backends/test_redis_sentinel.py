"""A store whose primary the sentinels name."""

import asyncio
import contextlib
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import pytest
from redis_servers import RedisServer, needs_server, running_redis

from aiokv import ConnectError, RetryPolicy
from aiokv.backends.redis.backend import RedisBackend
from aiokv.backends.redis.urls import parse_url
from aiokv.backends.watching import Alive, Changed, Lost, Watch

# A failover takes seconds, on a busy machine many.
pytestmark = [needs_server, pytest.mark.slow, pytest.mark.timeout(120)]


class Watched(NamedTuple):
    primary: RedisServer
    replica: RedisServer
    sentinels: list[RedisServer]

    @property
    def url(self) -> str:
        return "redis+sentinel://" + ",".join(sentinel.address for sentinel in self.sentinels) + "/main"


@pytest.fixture
def watched() -> Generator[Watched]:
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(running_redis())
        options = ("--replicaof", "127.0.0.1", str(primary.port))
        replica = stack.enter_context(running_redis(*options))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sentinels = [RedisServer(folder / str(number)) for number in range(3)]
        for sentinel in sentinels:
            stack.callback(sentinel.kill)
            sentinel.start_sentinel(primary, 2)
        for sentinel in sentinels:
            sentinel.wait()
        yield Watched(primary, replica, sentinels)


async def wait_for_sentinels(watched: Watched) -> None:
    """Wait until the replica has the primary's data, and the sentinels know each other and the replica."""
    async with asyncio.timeout(40):
        while (await asyncio.to_thread(watched.replica.ask, "INFO", "replication"))["master_link_status"] != "up":
            await asyncio.sleep(0.1)
        for sentinel in watched.sentinels:
            while True:
                known = (await asyncio.to_thread(sentinel.ask, "INFO", "sentinel"))["master0"]
                if (known["sentinels"], known["slaves"]) == (3, 1):
                    break
                await asyncio.sleep(0.1)


async def next_of(watch: Watch, kind: type) -> object:
    async with asyncio.timeout(40):
        async for event in watch:
            if isinstance(event, kind):
                return event
    raise AssertionError("the watch ended")


async def test_primary_that_fails_costs_no_call_and_the_watch_goes_on(watched: Watched) -> None:
    await wait_for_sentinels(watched)
    backend = RedisBackend(parse_url(watched.url))
    await backend.set("db", "k", "v", 60)
    async with backend.watch("db") as watch:
        await next_of(watch, Alive)
        watched.primary.kill()
        await backend.set("db", "k", "w", 60)
        assert await backend.get("db", "k") == "w"
        await next_of(watch, Lost)
        await next_of(watch, Alive)
        await backend.set("db", "k", "x", 60)
        assert await next_of(watch, Changed) == Changed("k")
    assert await backend.health() is None
    await backend.aclose()


async def test_name_that_no_sentinel_knows_is_no_store(watched: Watched) -> None:
    backend = RedisBackend(parse_url(watched.url.replace("/main", "/other")), policy=RetryPolicy(total_timeout=0.5))
    with pytest.raises(ConnectError, match="primary"):
        await backend.get("db", "k")
    await backend.aclose()
